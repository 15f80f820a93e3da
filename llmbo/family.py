"""The threshold family: one path of nested models from the dense one down, the strongest baseline there is without search.

A block's level is given by how many of its units have a Fisher score per parameter above one global threshold; *which*
units stay follows from another ranking (see `pruning.importance`). LLM-Pruner (arXiv:2305.11627) thresholds Taylor scores
instead; under compensation the Fisher allocation loses a tenth less (`experiments/problem_r`).
Lowering the threshold adds one grid level to one block at a time, so the family is a list of points, not a formula.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from llmbo.space import SearchSpace
from pruning.importance import Importance


@dataclass(frozen=True)
class ThresholdFamily:
    """The legal members, smallest first, the dense model last.

    Args:
        path: `num_members x d` levels; every row adds one level to the row before.
        shares: `num_members` parameter shares, increasing.
        importance: `d` importances, each block's summed over its units.
    """

    space: SearchSpace
    path: Tensor
    shares: Tensor
    importance: Tensor

    @classmethod
    def from_importance(cls, space: SearchSpace, importance: Importance) -> "ThresholdFamily":
        """Build the family from scores that are comparable across layers (`taylor` or `fisher`)."""
        steps: list[tuple[float, int]] = []  # (threshold at which the step happens, dimension that gains a level)
        dimension = 0
        for block in space.anatomy.blocks:
            density = (
                (importance.of(block.kind).double().cpu() / block.parameters_per_unit).sort(-1, descending=True).values
            )
            widths = space.widths[block.kind]
            # A level is reached when the count of units above the threshold rounds to it: half-way to its width.
            midpoints = torch.tensor([(low + high - 1) // 2 for low, high in pairwise(widths)])
            for row in density[:, midpoints].tolist():
                steps += [(threshold, dimension) for threshold in row]
                dimension += 1
        points = [[0] * space.d]
        for _, dimension in sorted(steps, key=lambda step: (-step[0], step[1])):
            points.append(points[-1].copy())
            points[-1][dimension] += 1
        path = torch.tensor(points, dtype=torch.float64)
        path = path[space.legal(path)]
        totals = torch.cat([importance.of(block.kind).double().cpu().sum(-1) for block in space.anatomy.blocks])
        return cls(space, path, space.share(path), totals.clamp_min(1e-6 * totals.mean()))

    def at(self, share: float) -> tuple[int, ...]:
        """The member whose parameter share is nearest."""
        return tuple(self.path[int((self.shares - share).abs().argmin())].int().tolist())

    def profile(self, share: Tensor) -> Tensor:
        """Levels of the family at any share, interpolated between members: `n` -> `n x d`, not rounded."""
        share = share.clamp(self.shares[0], self.shares[-1])
        right = torch.searchsorted(self.shares, share.contiguous()).clamp(1, len(self.shares) - 1)
        low, high = self.shares[right - 1], self.shares[right]
        weight = ((share - low) / (high - low).clamp_min(1e-12)).unsqueeze(-1)  # the dense model may be the only member
        return torch.lerp(self.path[right - 1], self.path[right], weight)
