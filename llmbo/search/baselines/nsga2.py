"""NSGA-II (Deb et al. 2002) with pymoo's operators, as a pure function of the stored trials."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective, to_maximize
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import novel
from llmbo.search.baselines.genes import Genes, Levels, RecipeNumbers
from llmbo.types import Proposal, Trial

POPULATION = 20
MAX_MATINGS = 20  # before a batch is filled up at random
ETA = 3.0  # distribution index of both operators that pymoo's documentation gives for integers


@dataclass(frozen=True)
class Nsga2Proposer:
    """One round is one generation: its offspring and their parents compete for `population` places.

    The population is rebuilt from the trials, round by round, so nothing is kept between calls. Illegal offspring and
    repeats are mated again.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    population: int = POPULATION

    @cached_property
    def genes(self) -> Genes:
        return Levels(self.space)

    @cached_property
    def _problem(self) -> Problem:
        low, high = self.genes.bounds.numpy()
        kind = int if self.genes.whole else float
        return Problem(n_var=len(low), n_obj=len(self.objectives), xl=low, xu=high, vtype=kind)

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        operators = {  # of real numbers pymoo's defaults
            "crossover": SBX(prob=0.9, eta=ETA, vtype=float, repair=RoundingRepair()),
            "mutation": PM(eta=ETA, vtype=float, repair=RoundingRepair()),
        }
        algorithm = NSGA2(pop_size=self.population, **(operators if self.genes.whole else {}))
        algorithm.setup(self._problem, seed=seed)
        parents = self._survivors(algorithm, [trial for trial in trials if trial.complete])
        offspring = self.genes.points(self._offspring(algorithm, parents, q), "nsga2")
        return self.genes.topped_up(novel(offspring, trials, q, self.space), trials, q, seed)

    def _survivors(self, algorithm: NSGA2, complete: Sequence[Trial]) -> Population:
        parents = Population.empty()
        for _, generation in groupby(complete, key=lambda trial: trial.round):
            group = list(generation)
            children = Population.new(
                X=self.genes.of(group).numpy(),
                F=-to_maximize([trial.values for trial in group], self.objectives).numpy(),
                CV=np.zeros((len(group), 1)),
            )
            parents = algorithm.survival.do(
                self._problem,
                Population.merge(parents, children),
                n_survive=self.population,
                random_state=algorithm.random_state,
            )
        return parents

    def _offspring(self, algorithm: NSGA2, parents: Population, q: int) -> Iterator[Sequence[float]]:
        for _ in range(MAX_MATINGS):
            with warnings.catch_warnings():  # SBX divides by the distance of equal parents
                warnings.simplefilter("ignore", RuntimeWarning)
                children: Any = algorithm.mating.do(
                    self._problem,
                    parents,
                    q,
                    algorithm=algorithm,
                    random_state=algorithm.random_state,
                    n_max_iterations=2,
                )
            yield from children.get("X").tolist()


@dataclass(frozen=True, kw_only=True)
class Nsga2Recipes(Nsga2Proposer):
    """The same over recipes and their members' shares."""

    family: ThresholdFamily

    @cached_property
    def genes(self) -> Genes:
        return RecipeNumbers(self.family)
