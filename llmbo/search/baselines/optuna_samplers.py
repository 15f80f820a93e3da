"""Optuna's own samplers through ask-and-tell, on an in-memory study that is rebuilt from the trials every round."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import optuna
import torch
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import novel
from llmbo.search.baselines.genes import Genes, Levels, RecipeNumbers
from llmbo.search.threads import one_thread
from llmbo.types import Proposal, Trial, TrialState

optuna.logging.set_verbosity(optuna.logging.ERROR)  # or every round tells of its study
POPULATION = 20
ASKS = {"tpe": 20, "nsga2": 50, "gp": 3}  # per wanted candidate, before a batch is filled up at random


class _NsgaII(NSGAIISampler):
    """NSGA-II whose generations follow from the trials' numbers, as a study that is rebuilt every round needs it."""

    def get_trial_generation(self, study: optuna.Study, trial: FrozenTrial) -> int:
        if trial.state.is_finished():
            return trial.number // POPULATION
        return sum(known.state.is_finished() for known in study.get_trials(deepcopy=False)) // POPULATION

    def get_population(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
        complete = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
        return [trial for trial in complete if self.get_trial_generation(study, trial) == generation]


# Every sampler starts at once: the initial design has been evaluated before it is asked.
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, constant_liar=True, n_startup_trials=1),
    "nsga2": lambda seed: _NsgaII(seed=seed, population_size=POPULATION),
    "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=1, deterministic_objective=True),
}
_STATES = {
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.FAILED: OptunaState.FAIL,
    TrialState.RUNNING: OptunaState.RUNNING,
}


@dataclass(frozen=True)
class OptunaProposer:
    """A sampler's answers.

    Args:
        sampler: One of `SAMPLERS`.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    sampler: str

    @cached_property
    def genes(self) -> Genes:
        return Levels(self.space)

    @cached_property
    def _distributions(self) -> Mapping[str, BaseDistribution]:
        return {
            name: IntDistribution(int(low), int(high)) if self.genes.whole else FloatDistribution(low, high)
            for name, low, high in zip(self.genes.names, *self.genes.bounds.tolist(), strict=True)
        }

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        with one_thread(), torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(seed)  # the GP sampler draws from the global generator, too
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = self._study(trials, seed)
            asked = self.genes.points(self._asked(study, q), f"optuna-{self.sampler}")
            found = novel(asked, trials, q, self.space)
        return self.genes.topped_up(found, trials, q, seed)

    def _study(self, trials: Sequence[Trial], seed: int) -> optuna.Study:
        study = optuna.create_study(
            sampler=SAMPLERS[self.sampler](seed % 2**32),  # NumPy takes no larger one
            directions=["maximize" if objective.maximize else "minimize" for objective in self.objectives],
        )
        for trial, row in zip(trials, self.genes.of(trials).tolist(), strict=True):
            study.add_trial(
                create_trial(
                    state=_STATES[trial.state],
                    params=dict(zip(self._distributions, row, strict=True)),
                    distributions=dict(self._distributions),
                    values=[trial.values[o.name] for o in self.objectives] if trial.complete else None,
                )
            )
        return study

    def _asked(self, study: optuna.Study, q: int) -> Iterator[Sequence[float]]:
        """What the sampler says; asked trials stay RUNNING, so that a batch is spread by samplers that can."""
        for _ in range(ASKS[self.sampler] * q):
            trial = study.ask(dict(self._distributions))
            yield [trial.params[name] for name in self._distributions]


@dataclass(frozen=True, kw_only=True)
class OptunaRecipes(OptunaProposer):
    """The same over recipes and their members' shares."""

    family: ThresholdFamily

    @cached_property
    def genes(self) -> Genes:
        return RecipeNumbers(self.family)
