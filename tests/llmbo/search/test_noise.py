"""What is said of chance is true of windows drawn again: intervals cover, and pairing sees what means hide."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmbo.search.noise import gain_errors, half_width, surely_better

DRAWS = 4000


def pairs(n: int, common: float, own: float) -> tuple[Tensor, Tensor]:
    """Log-normal windows of two candidates that are equally good, `DRAWS x n` each."""
    rng = torch.Generator().manual_seed(n)
    hard, first, second = torch.randn(3, DRAWS, n, generator=rng, dtype=torch.float64)
    return (common * hard + own * first).exp(), (common * hard + own * second).exp()


def test_two_that_are_equal_are_rarely_told_apart_and_a_small_sure_difference_is_seen() -> None:
    first, second = pairs(12, 0.5, 0.1)
    assert surely_better(first, second).double().mean() < 0.035  # 2.5 % on each side
    better = surely_better(0.8 * first, second)
    assert better.double().mean() > 0.9 and not surely_better(second, 0.8 * first).any()
    apart = (second.mean(-1) - 0.8 * first.mean(-1)).abs()
    assert (apart < half_width(second)).double().mean() > 0.9  # which their own intervals do not tell
    assert not surely_better(first[0], first[0])


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
