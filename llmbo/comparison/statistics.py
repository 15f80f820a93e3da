"""Means over seeds, their intervals, and paired tests. Larger is better throughout.

Intervals are Student's t over the seeds of the optimiser: what another draw of its random numbers would change. Model, text and
windows are the same under every seed, so no interval speaks of other ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t, wilcoxon

LEVEL = 0.95
FEWEST_SEEDS = (
    4  # below, nothing is called ahead: t has at most two degrees of freedom, and Wilcoxon's p is 0.25 at best
)
Array = NDArray[np.float64]
Verdict = Literal["ahead", "behind", ""]


@dataclass(frozen=True)
class Band:
    """A mean over seeds and its interval; low and high are None with a single seed, which has none."""

    mean: float
    low: float | None
    high: float | None


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

    @property
    def verdict(self) -> Verdict:
        """Whether the first is ahead or behind: the interval of enough seeds is without zero."""
        low, high = self.difference.low, self.difference.high
        if self.seeds < FEWEST_SEEDS or low is None or high is None:
            return ""
        return "ahead" if low > 0 else "behind" if high < 0 else ""


def band(values: Sequence[float]) -> Band:
    """The mean of one value for each seed, with its interval."""
    return bands(np.asarray(values, dtype=np.float64)[:, None])[0]


def bands(values: Array) -> list[Band]:
    """One for each column of `num_seeds x n`."""
    means = values.mean(0)
    if len(values) == 1:
        return [Band(mean, None, None) for mean in means.tolist()]
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(0, ddof=1) / np.sqrt(len(values))
    return [Band(m, m - h, m + h) for m, h in zip(means.tolist(), half.tolist(), strict=True)]


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
