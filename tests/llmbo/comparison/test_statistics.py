"""Intervals hold what they promise, with few seeds too, and say nothing where nothing can be said."""

import numpy as np
import pytest
from scipy.stats import t

from llmbo.comparison.page import _band
from llmbo.comparison.schema import BandPart
from llmbo.comparison.statistics import FEWEST_SEEDS, LEVEL, band, bands, paired

DRAWS = 20_000


@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 6, 20])
def test_an_interval_covers_the_true_mean_as_often_as_it_says(seeds: int) -> None:
    """Every column is a comparison of its own. Percentile bootstraps cover 50 to 86 % with two to six seeds."""
    values = np.random.default_rng(seeds).normal(3.0, 2.0, (seeds, DRAWS))
    covered = np.mean([found.low <= 3.0 <= found.high for found in bands(values)])  # type: ignore[operator]
    assert covered == pytest.approx(LEVEL, abs=4 * np.sqrt(LEVEL * (1 - LEVEL) / DRAWS))


def test_it_is_the_textbooks_interval() -> None:
    values = [0.41, 0.43, 0.42, 0.46]
    found = band(values)
    low, high = t.interval(LEVEL, 3, loc=np.mean(values), scale=np.std(values, ddof=1) / 2)
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))


def test_one_seed_has_a_mean_and_no_interval() -> None:
    found = band([0.4])
    assert (found.mean, found.low, found.high) == (0.4, None, None)
    assert _band(BandPart(mean=0.4, low=None, high=None)) == "0.4000"
    assert paired([0.4], [0.1]).p is None


@pytest.mark.parametrize("seeds", range(1, 7))
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_nothing_is_ahead_on_three_seeds_or_fewer(seeds: int, sign: int) -> None:
    """However clear the differences are: here they lie within a thousandth of each other."""
    noise = np.linspace(-0.0005, 0.0005, seeds)
    found = paired((sign + noise).tolist(), [0.0] * seeds)
    expected = {1: "ahead", -1: "behind", 0: ""}[sign] if seeds >= FEWEST_SEEDS else ""
    assert FEWEST_SEEDS > 3 and found.verdict == expected
