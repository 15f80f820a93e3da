"""What is said of chance is true of windows drawn again: intervals cover, variances are right, and pairing sees what means hide."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor

from llmbo.search.noise import gain_errors, half_width, log_ratio_variances, paired_log_ratio, surely_better

DRAWS = 4000


def pairs(n: int, common: float, own: float, ratio: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-normal windows of two candidates, `DRAWS x n` each, the first's mean `ratio` times the second's."""
    rng = torch.Generator().manual_seed(n)
    hard, first, second = torch.randn(3, DRAWS, n, generator=rng, dtype=torch.float64)
    return ratio * (common * hard + own * first).exp(), (common * hard + own * second).exp()


@pytest.mark.parametrize("ratio", [1.0, 1.5])
@pytest.mark.parametrize("n", [4, 12, 48])
def test_the_interval_of_a_log_ratio_covers_the_truth(n: int, ratio: float) -> None:
    estimates, variances = paired_log_ratio(*pairs(n, 0.25, 0.1, ratio))
    quantile = student.ppf(0.975, n - 1)
    covered = (estimates - torch.tensor(ratio).log()).abs() <= quantile * variances.sqrt()
    assert 0.935 < covered.double().mean() < 0.965


@pytest.mark.parametrize("n", [4, 12])
def test_the_variance_is_right_for_skewed_windows(n: int) -> None:
    """By the delta method it would be 0.82 and 0.92 of it."""
    estimates, variances = paired_log_ratio(*pairs(n, 0.5, 0.2))
    assert 0.95 < variances.mean() / estimates.var() < 1.12


def test_two_that_are_equal_are_rarely_told_apart_and_a_small_sure_difference_is_seen() -> None:
    first, second = pairs(12, 0.5, 0.1)
    assert surely_better(first, second).double().mean() < 0.035  # 2.5 % on each side
    better = surely_better(0.8 * first, second)
    assert better.double().mean() > 0.9 and not surely_better(second, 0.8 * first).any()
    apart = (second.mean(-1) - 0.8 * first.mean(-1)).abs()
    assert (apart < half_width(second)).double().mean() > 0.9  # which their own intervals do not tell
    assert not surely_better(first[0], first[0])


def test_every_trial_has_the_variance_of_the_windows_that_it_saw(toy: Any) -> None:
    trials = toy.trials(toy.random_points(3, 0))
    windows, reference = torch.rand(2, 6, dtype=torch.float64) + 0.5
    seen = [
        replace(trials[0], windows={"kl": windows.tolist()}),
        replace(trials[1], windows={"kl": windows[:4].tolist()}),
    ]
    found = log_ratio_variances([*seen, replace(trials[2], windows={})], reference.tolist(), "kl")
    assert found[0] == paired_log_ratio(windows, reference)[1]
    assert found[1] == paired_log_ratio(windows[:4], reference[:4])[1] != found[0]
    assert found[2].isnan()  # of an earlier version
    assert log_ratio_variances([], reference.tolist(), "kl").shape == (0,)
    scaled = log_ratio_variances(
        [replace(trials[0], windows={"kl": (3 * reference).tolist()})], reference.tolist(), "kl"
    )
    assert scaled.item() == pytest.approx(0, abs=1e-25)  # every window has the same ratio


def test_the_error_of_a_gain_is_that_of_differences_to_the_path_between_its_neighbours(toy: Any) -> None:
    """What is hard for all cancels out; what is a trial's own stays, over as many windows as it saw."""
    path = [tuple(row) for row in toy.family.path[[3, -4]].int().tolist()]
    members, others = toy.trials(path), toy.trials(toy.random_points(3, 0), "qnehvi")
    hard, own = torch.rand(2, 6, dtype=torch.float64)
    low, high = (trial.values["params_share"] for trial in members)
    shown = [
        replace(
            trial,
            number=n,
            values={**trial.values, "params_share": share},
            windows={"kl": (scale * hard + rest).tolist()},
        )
        for n, (trial, share, scale, rest) in enumerate(
            [(members[0], low, 2.0, 0.0), (members[1], high, 1.0, 0.0), (others[0], (low + high) / 2, 1.5, 0.1)]
            + [(others[n], low + 0.25 * (high - low), 1.75, own) for n in (1, 2)]
        )
    ]
    shown[4] = replace(shown[4], windows={"kl": shown[4].windows["kl"][:4]})
    found = gain_errors(shown, "kl")
    assert found[2] == pytest.approx(0, abs=1e-12) and found.keys() == {2, 3, 4}
    assert found[3] == pytest.approx(float(own.std() / 6**0.5)) and found[4] == pytest.approx(float(own[:4].std() / 2))
    assert gain_errors(shown, "accuracy") == {} == gain_errors(shown[1:], "kl")
