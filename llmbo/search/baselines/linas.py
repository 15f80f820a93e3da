"""LINAS: evolution on predictors that are cheap to fit, anew in every round (Cummings et al. 2022, arXiv:2205.10358).

Each round fits a predictor to all trials, runs many generations of NSGA-II on it, and has the best of what comes out evaluated.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.optimize import minimize
from torch import Tensor

from llmbo.errors import ConfigError
from llmbo.problem.objectives import Objective, outcomes, ref_point
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import RandomProposer, fresh, topped_up
from llmbo.search.baselines.nsga2 import ETA
from llmbo.search.pareto import by_gain
from llmbo.types import Proposal, Trial, TrialState

DAMPINGS = 10.0 ** np.arange(-4, 3)  # of the ridge, times the mean square of its singular values
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Ridge:
    """What each block adds at each of its levels, by ridge regression.

    Positive values, as KL is, span factors of thirty and more, so errors count as parts of them. There are two ways to see to that,
    the logarithm as a sum over blocks, or the value, weighted; the one with the smaller relative error on trials left out is
    taken, as DyNAS-T does with its two predictors (a ridge and a support vector machine).

    A block has one feature per level, whether it keeps as much. These span what DyNAS-T's one-hot features do, but damping draws
    neighbouring levels together, so that a level nobody measured is believed to lie between them.

    Args:
        tops: Highest level of every block, `d`.
        coefficients: Of the features, as many as all `tops` together.
        constant: What a model without any block is predicted.
        log: Whether logarithms are predicted.
    """

    tops: Matrix
    coefficients: Matrix
    constant: float
    log: bool = False

    @classmethod
    def of(cls, levels: Matrix, values: Matrix, tops: Matrix) -> "Ridge":
        """Fit `n` values at `n x d` levels, `n` at least 2."""
        features, equal = _features(levels, tops), np.ones_like(values)
        if not (values > 0).all():
            coefficients, constant, _ = _fitted(features, values, equal)
            return cls(tops, coefficients, constant)
        coefficients, constant, left_out = _fitted(features, values, values.min() / values)
        of_logs, constant_of_logs, left_out_logs = _fitted(features, np.log(values), equal)
        if np.abs(np.exp(left_out_logs) / values - 1).mean() <= np.abs(left_out / values - 1).mean():
            return cls(tops, of_logs, constant_of_logs, log=True)
        return cls(tops, coefficients, constant)

    def __call__(self, levels: Matrix) -> Matrix:
        """`m x d` -> `m`."""
        predicted = self.constant + _features(levels, self.tops) @ self.coefficients
        return np.exp(predicted) if self.log else predicted


def _fitted(features: Matrix, targets: Matrix, weights: Matrix) -> tuple[Matrix, float, Matrix]:
    """Ridge regression with damping by generalised cross-validation (Golub et al. 1979).

    Args:
        features: `n x p`.
        weights: Of each target's residual, `n`.

    Returns:
        Coefficients (`p`), constant, and what each target is predicted without it (`n`).
    """
    n, parts = len(targets), np.square(weights) / np.square(weights).sum()
    middle, mean = parts @ features, float(parts @ targets)
    left, roots, right = np.linalg.svd(weights[:, None] * (features - middle), full_matrices=False)
    wanted = weights * (targets - mean)

    def kept(damping: float) -> Matrix:
        return np.square(roots) / (np.square(roots) + damping)

    def error(damping: float) -> float:
        residuals = wanted - left @ (kept(damping) * (left.T @ wanted))
        return float(np.square(residuals).sum() / (n - 1 - kept(damping).sum()) ** 2)

    damping = min(DAMPINGS * np.square(roots).mean(), key=error)
    coefficients = right.T @ (roots / (np.square(roots) + damping) * (left.T @ wanted))
    residuals = targets - mean - (features - middle) @ coefficients
    left_out = targets - residuals / (1 - parts - np.square(left) @ kept(damping))
    return coefficients, mean - float(middle @ coefficients), left_out


def _features(levels: Matrix, tops: Matrix) -> Matrix:
    """Whether each block keeps each of its levels: `n x d` -> `n x sum(tops)` of 0 and 1."""
    kept = [column[:, None] >= np.arange(1, int(top) + 1) for column, top in zip(levels.T, tops, strict=True)]
    return np.concatenate(kept, axis=1).astype(np.float64)


class _Predicted(Problem):
    """What a model is believed to have, for pymoo, where smaller is better: known objectives exactly, all others by a predictor.

    Allowed is what is legal and believed to beat the reference point, so no generation is spent on what would not count.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], complete: Sequence[Trial]) -> None:
        low, high = space.bounds.numpy()
        super().__init__(
            n_var=space.d, n_obj=len(objectives), n_ieq_constr=1 + len(objectives), xl=low, xu=high, vtype=int
        )
        self.space, self.objectives = space, objectives
        levels = np.array([trial.x for trial in complete], dtype=np.float64)
        self._predictors = {
            objective.name: Ridge.of(levels, np.array([trial.values[objective.name] for trial in complete]), high)
            for objective in objectives
            if not objective.known
        }

    def outcomes(self, X: Tensor) -> Tensor:
        """`n x d` levels -> `n x m`; larger is better."""
        columns = [
            objective.sign
            * (
                self.space.cost(objective.name, X)
                if objective.known
                else torch.from_numpy(self._predictors[objective.name](X.numpy()))
            )
            for objective in self.objectives
        ]
        return torch.stack(columns, -1)

    def _evaluate(self, x: Any, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        X = torch.from_numpy(np.asarray(x, dtype=np.float64))
        Y, worst = self.outcomes(X), ref_point(self.objectives)
        out["F"] = -Y.numpy()
        short = (worst - Y) / worst.abs().clamp_min(1e-12)
        out["G"] = torch.cat([~self.space.legal(X)[:, None], short], dim=-1).numpy()


@dataclass(frozen=True)
class LinasProposer:
    """A round is one iteration: predictors are fitted to all complete trials before it, and NSGA-II starts from these.

    Known objectives are exact and never predicted. Intel's DyNAS-T has the whole last population evaluated. A round has
    room for a few of it: each in turn is the one that is believed to add most hypervolume to what is measured, is being measured, or
    was chosen before it. Those that are believed to add nothing come last, by rank.

    Args:
        population, generations: Of NSGA-II on the predictors; DyNAS-T's are 50 and, by model, 100 to 400.

    Raises:
        ConfigError: Fewer than two in the population, or no generation.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    population: int = 50
    generations: int = 100

    def __post_init__(self) -> None:
        for key, least in (("population", 2), ("generations", 1)):
            if getattr(self, key) < least:
                raise ConfigError(f"The key {key} of LINAS must be at least {least}, got {getattr(self, key)}.")

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        complete = [trial for trial in trials if trial.complete]
        if len(complete) < 2:  # nothing to fit
            return topped_up([], trials, q, self.space, seed)
        problem = _Predicted(self.space, self.objectives, complete)
        evolved = self._evolved(problem, complete, seed)
        new = [proposal.x for proposal in fresh(evolved, trials, len(evolved), self.space, "linas")]
        running = [trial.x for trial in trials if trial.state is TrialState.RUNNING]
        known = torch.cat([outcomes(complete, self.objectives), problem.outcomes(_matrix(running, self.space.d))])
        chosen = by_gain(problem.outcomes(_matrix(new, self.space.d)), known, ref_point(self.objectives), q)
        return topped_up([Proposal(new[index], "linas") for index in chosen], trials, q, self.space, seed)

    def _evolved(self, problem: Problem, complete: Sequence[Trial], seed: int) -> list[tuple[int, ...]]:
        """The last population, front by front."""
        start = [trial.x for trial in complete]
        missing = self.population - len(start)
        strays = RandomProposer(self.space).propose(complete, missing, seed) if missing > 0 else []
        algorithm = NSGA2(
            pop_size=self.population,
            sampling=np.array([*start, *(stray.x for stray in strays)]),
            crossover=SBX(prob=0.9, eta=ETA, vtype=float, repair=RoundingRepair()),
            mutation=PM(eta=ETA, vtype=float, repair=RoundingRepair()),
        )
        with warnings.catch_warnings():  # SBX divides by the distance of equal parents
            warnings.simplefilter("ignore", RuntimeWarning)
            last = minimize(problem, algorithm, ("n_gen", self.generations), seed=seed % 2**32).pop
        return [tuple(int(level) for level in row) for row in last.get("X")]


def _matrix(points: Sequence[tuple[int, ...]], d: int) -> Tensor:
    return torch.tensor(points, dtype=torch.float64).view(len(points), d)
