"""Smoothing along depth: means of neighbours, symmetric, that leave alone what is even."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmbo.problem.depth import binomial_smoothed, gaussian_kernel, gaussian_smoothed

SMOOTHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "binomial": binomial_smoothed,
    "binomial before nothing": lambda profiles: binomial_smoothed(profiles, "constant"),
    "gaussian": lambda profiles: gaussian_smoothed(profiles, 1.5),
}


def profiles(layers: int, n: int = 5) -> Tensor:
    return torch.randn(n, layers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("layers", [1, 2, 3, 30])
@pytest.mark.parametrize("name", SMOOTHINGS)
def test_a_mirrored_profile_is_smoothed_to_the_mirror_image(name: str, layers: int) -> None:
    rows, smoothed = profiles(layers), SMOOTHINGS[name]
    torch.testing.assert_close(smoothed(rows).flip(-1), smoothed(rows.flip(-1)))
    torch.testing.assert_close(smoothed(2 * rows - rows.roll(1, 0)), 2 * smoothed(rows) - smoothed(rows).roll(1, 0))


@pytest.mark.parametrize("layers", [1, 2, 3, 30])
def test_what_is_even_stays_and_what_alternates_goes(layers: int) -> None:
    even = torch.full((1, layers), 0.7, dtype=torch.float64)
    torch.testing.assert_close(binomial_smoothed(even), even)
    torch.testing.assert_close(gaussian_smoothed(even, 1.5), even)
    inside = binomial_smoothed((-1.0) ** torch.arange(layers, dtype=torch.float64)[None])[:, 1:-1]
    assert not inside.any()


def test_ends_see_themselves_again_or_nothing() -> None:
    row = torch.tensor([[4.0, 8.0, 0.0]], dtype=torch.float64)
    assert binomial_smoothed(row).tolist() == [[5.0, 5.0, 2.0]]
    assert binomial_smoothed(row, "constant").tolist() == [[4.0, 5.0, 2.0]]


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_the_kernel_is_a_function_of_distance_whose_width_is_its_scale(scale: float) -> None:
    kernel = gaussian_kernel(12, scale)
    assert float(kernel[4, 4]) == 1 and float(kernel[2, 5]) == pytest.approx(float(kernel[9, 6]))
    assert float(kernel[3, 5]) == pytest.approx(torch.exp(torch.tensor(-0.5 * (2 / scale) ** 2)).item())
    scales = torch.tensor([scale, 1.0], dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(gaussian_kernel(12, scales)[0], kernel)


def test_a_wide_gaussian_keeps_little_but_the_mean() -> None:
    rows = profiles(30)
    narrow, wide = (gaussian_smoothed(rows, scale).std(-1) for scale in (0.1, 20.0))
    torch.testing.assert_close(narrow, rows.std(-1))
    assert (wide < 0.2 * rows.std(-1)).all()
