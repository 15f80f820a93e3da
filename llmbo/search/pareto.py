"""Non-dominated set and dominated hypervolume. Everything here assumes maximisation (see `objectives.to_maximize`)."""

import torch
from botorch.utils.multi_objective.hypervolume import Hypervolume
from botorch.utils.multi_objective.pareto import is_non_dominated
from torch import Tensor


def pareto_front(Y: Tensor) -> list[int]:
    """Indices of the non-dominated rows of `n x m`; of equal rows the first. Rows at -inf are no points."""
    if not len(Y):
        return []
    return (is_non_dominated(Y, deduplicate=True) & Y.isfinite().all(-1)).nonzero().flatten().tolist()


def hypervolume(Y: Tensor, ref_point: Tensor) -> float:
    """Volume dominated by the rows of `n x m` and bounded by `ref_point` (`m`), in the product of the units."""
    better = Y[(Y > ref_point).all(-1)]
    if not len(better):
        return 0.0
    return float(Hypervolume(ref_point).compute(better[is_non_dominated(better)]))


def hypervolume_trace(Y: Tensor, ref_point: Tensor) -> list[float]:
    """Hypervolume of the first 1, 2, .., n rows. Never falls."""
    trace: list[float] = []
    front = Y[:0]
    for row in Y:
        dominated = bool((front >= row).all(-1).any())
        if dominated:
            trace.append(trace[-1])
            continue
        front = torch.cat([front[~(row >= front).all(-1)], row[None]])
        trace.append(hypervolume(front, ref_point))
    return trace


def by_gain(Y: Tensor, known: Tensor, ref_point: Tensor, q: int) -> list[int]:
    """Indices of `q` rows of `n x m`, each adding most hypervolume to `known` and those before it; of equal ones the first."""
    chosen: list[int] = []
    while len(chosen) < min(q, len(Y)):
        left = [index for index in range(len(Y)) if index not in chosen]
        chosen.append(max(left, key=lambda index: hypervolume(torch.cat([known, Y[[*chosen, index]]]), ref_point)))
    return chosen
