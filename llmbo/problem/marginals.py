"""What one grid level less costs in each block, after compensation, around one pruned member of the family.

These are measured, in the quality's unit; the marginal costs of the path's steps (`llmbo.problem.family`) are estimates per
parameter at the dense model. Such estimates mislead: compensation repairs some blocks better than others, and what a block is worth
changes once its neighbours are pruned. So it is measured, on few windows: the differences are paired (same tokens, one
block changed), which makes them far less noisy than the values themselves.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmbo.problem.family import ThresholdFamily
from llmbo.types import Evaluator


@dataclass(frozen=True)
class Marginals:
    """Quality lost by one grid level less in each block, after compensation, measured around one member of the family.

    Args:
        x: The member.
        cost: `d` differences in the quality's unit; None where the member has nothing left to take.
        noise: Standard error of one of these differences, or None if it could not be told.
        evaluations: What measuring them cost, in whole evaluations of a candidate.
    """

    x: tuple[int, ...]
    cost: tuple[float | None, ...]
    noise: float | None
    evaluations: float
    seconds: float = 0.0


def measure_marginals(
    family: ThresholdFamily,
    evaluators: Sequence[Evaluator],
    quality: str,
    evaluations: float,
    operating_point: float = 0.35,
    clock: Callable[[], float] = time.perf_counter,
) -> Marginals:
    """Take one level from each block in turn.

    Args:
        evaluators: Each on windows of its own; their disagreement gives the noise.
        operating_point: Where, as part of the way from the smallest member to the dense model.
        evaluations: What one pass of all of them over one candidate costs, in evaluations on the proxy windows.
    """
    start = clock()
    low, high = float(family.shares[0]), float(family.shares[-1])
    x = family.at(low + (high - low) * operating_point)
    base = [evaluator.evaluate([x])[0][quality] for evaluator in evaluators]
    costs: list[float | None] = []
    spreads: list[float] = []
    for dimension, level in enumerate(x):
        if level == 0:
            costs.append(None)
            continue
        less = (*x[:dimension], level - 1, *x[dimension + 1 :])
        differences = [e.evaluate([less])[0][quality] - before for e, before in zip(evaluators, base, strict=True)]
        costs.append(statistics.fmean(differences))
        if len(differences) > 1:
            spreads.append(statistics.variance(differences) / len(differences))
    noise = (statistics.fmean(spreads) * evaluations) ** 0.5 if spreads else None
    measured = 1 + sum(cost is not None for cost in costs)
    return Marginals(x, tuple(costs), noise, measured * evaluations, round(clock() - start, 3))
