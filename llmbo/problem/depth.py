"""Smoothing along depth: neighbouring layers resemble each other, and one layer's measurement is noisy.

Two kernels are used, on purpose: a Gaussian of any width where profiles are drawn or noise is averaged out over several layers, and
the narrowest binomial filter where only the nearest neighbours count.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def gaussian_kernel(layers: int, scale: float | Tensor) -> Tensor:
    """exp(-(i - j)^2 / 2 scale^2) between layers i and j, not normalised, `layers x layers`; a scale may be `.. x 1 x 1`."""
    depth = torch.arange(layers, dtype=torch.float64)
    return torch.exp(-((depth[:, None] - depth) ** 2) / (2 * scale**2))


def gaussian_smoothed(profiles: Tensor, scale: float) -> Tensor:
    """Weighted means over layers, `.. x layers`; weights sum to 1 at the ends, too."""
    kernel = gaussian_kernel(profiles.shape[-1], scale)
    return profiles @ (kernel / kernel.sum(-1, keepdim=True)).T


def binomial_smoothed(profiles: Tensor, ends: Literal["replicate", "constant"] = "replicate") -> Tensor:
    """Every layer with half of either neighbour, (1, 2, 1) / 4, `n x layers`.

    Args:
        ends: What stands beyond the first and last layer: the same again, or 0.
    """
    padded = F.pad(profiles, (1, 1), mode=ends)
    return (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
