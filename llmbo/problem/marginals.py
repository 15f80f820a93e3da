"""What one grid level less costs in each block, after compensation, around one pruned member of the family.

Importance of the dense model misleads: compensation repairs some blocks better than others, and what a block is worth
changes once its neighbours are pruned. So it is measured, on few windows: the differences are paired (same tokens, one
block changed), which makes them far less noisy than the values themselves.
"""

import statistics
import time
from collections.abc import Callable, Sequence

from llmbo.advisor.context import Marginals
from llmbo.problem.family import ThresholdFamily
from llmbo.types import Evaluator

OPERATING_POINT = (
    0.35  # of the way from the smallest member to the dense model: where most of a front's gain is decided
)


def measure_marginals(
    family: ThresholdFamily,
    evaluators: Sequence[Evaluator],
    quality: str,
    evaluations: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Marginals:
    """Take one level from each block in turn.

    Args:
        evaluators: Each on windows of its own; their disagreement gives the noise.
        evaluations: What one pass of all of them over one candidate costs, in evaluations on the proxy windows.
    """
    start = clock()
    low, high = float(family.shares[0]), float(family.shares[-1])
    x = family.at(low + (high - low) * OPERATING_POINT)
    base = [evaluator.evaluate(x)[quality] for evaluator in evaluators]
    costs: list[float | None] = []
    spreads: list[float] = []
    for dimension, level in enumerate(x):
        if level == 0:
            costs.append(None)
            continue
        less = (*x[:dimension], level - 1, *x[dimension + 1 :])
        differences = [e.evaluate(less)[quality] - before for e, before in zip(evaluators, base, strict=True)]
        costs.append(statistics.fmean(differences))
        if len(differences) > 1:
            spreads.append(statistics.variance(differences) / len(differences))
    noise = (statistics.fmean(spreads) * evaluations) ** 0.5 if spreads else None
    measured = 1 + sum(cost is not None for cost in costs)
    return Marginals(x, tuple(costs), noise, measured * evaluations, round(clock() - start, 3))
