"""Values between knots along one axis, here mostly the parameter share."""

import torch
from torch import Tensor


def interpolated(shares: Tensor, path: Tensor, share: Tensor) -> Tensor:
    """Rows of `path` (`m x d`, at increasing `shares`) at any share, the ends beyond them: `n` -> `n x d`."""
    right, weight = bracketed(shares, share.clamp(shares[0], shares[-1]))
    return torch.lerp(path[right - 1], path[right], weight.unsqueeze(-1))


def bracketed(knots: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Where values lie between increasing knots: the index of the knot to the right, and how far it is on the way there.

    A weight is 0 at the knot to the left and 1 at that to the right; beyond the ends the last two knots go on, with weights
    outside of 0 to 1. Both have the shape of `at`.
    """
    right = torch.searchsorted(knots, at.contiguous()).clamp(1, len(knots) - 1)
    left = knots[right - 1]
    return right, (at - left) / (knots[right] - left).clamp_min(1e-12)  # the dense model may be the only knot
