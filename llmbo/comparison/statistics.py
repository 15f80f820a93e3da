"""Means, bands and paired tests over seeds. Larger is better throughout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

RESAMPLES = 10_000
LEVEL = 0.95
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Band:
    """A mean over seeds and its bootstrap band."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedTest:
    """Differences of two arms, seed by seed.

    Args:
        wins: Seeds in which the first is strictly ahead.
        p: Two-sided Wilcoxon signed-rank test; with n seeds it cannot fall below 2^(1-n). None with a single seed.
    """

    difference: Band
    wins: int
    seeds: int
    p: float | None


def band(values: Sequence[float]) -> Band:
    """Percentile bootstrap over seeds of the mean of `values`."""
    (low,), (high,) = bands(np.asarray(values, dtype=np.float64)[:, None])
    return Band(float(np.mean(values)), float(low), float(high))


def bands(values: Array) -> tuple[Array, Array]:
    """Bootstrap band of the mean over the rows of `num_seeds x n`: low and high, `n` each. The same draws for every column."""
    rng = np.random.default_rng(0)
    draws = rng.integers(len(values), size=(RESAMPLES, len(values)))
    weights = np.stack([(draws == row).mean(1) for row in range(len(values))], axis=1)  # RESAMPLES x num_seeds
    tail = 100 * (1 - LEVEL) / 2
    low, high = np.percentile(weights @ values, [tail, 100 - tail], axis=0)
    return low, high


def paired(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Test `first` against `second`, paired by position."""
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    p = None
    if len(differences) > 1:
        p = 1.0 if not differences.any() else float(wilcoxon(differences).pvalue)
    return PairedTest(band(differences.tolist()), int((differences > 0).sum()), len(differences), p)


def evaluations_to_reach(trace: Sequence[float], value: float) -> int | None:
    """The smallest number of evaluations after which a never falling `trace` is at `value`."""
    return next((index + 1 for index, reached in enumerate(trace) if reached >= value), None)
