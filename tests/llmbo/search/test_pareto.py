"""Front and hypervolume against their definitions, closed forms and a Monte Carlo estimate."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from llmbo.search.pareto import by_gain, hypervolume, hypervolume_trace, pareto_front


def points(n: int, m: int, seed: int, ties: bool = False) -> Tensor:
    Y = torch.rand(n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (Y * 5).floor() / 5 if ties else Y


def dominates(a: Tensor, b: Tensor) -> bool:
    return bool((a >= b).all() and (a > b).any())


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_front_is_what_nobody_dominates(m: int, seed: int, ties: bool) -> None:
    Y = points(40, m, seed, ties)
    expected = []
    for index, row in enumerate(Y):
        if not any(dominates(other, row) for other in Y) and not any(torch.equal(row, Y[kept]) for kept in expected):
            expected.append(index)
    assert sorted(pareto_front(Y)) == expected


@pytest.mark.parametrize("ties", [False, True])
def test_the_order_of_trials_does_not_change_front_and_volume(ties: bool) -> None:
    Y, ref = points(30, 2, 3, ties), torch.tensor([0.1, 0.2], dtype=torch.float64)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    front, permuted = Y[pareto_front(Y)], Y[order][pareto_front(Y[order])]
    assert sorted(front.tolist()) == sorted(permuted.tolist())
    assert hypervolume(Y, ref) == pytest.approx(hypervolume(Y[order], ref), abs=1e-12)


def test_equal_points_count_once() -> None:
    Y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert pareto_front(Y) == [0, 1]
    assert hypervolume(Y, torch.tensor([-1.0, -1.0], dtype=torch.float64)) == pytest.approx(3)


def test_no_points_give_nothing() -> None:
    empty, ref = torch.empty(0, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    assert pareto_front(empty) == [] and hypervolume(empty, ref) == 0 and hypervolume_trace(empty, ref) == []


@pytest.mark.parametrize(
    ("Y", "ref", "volume"),
    [
        ([[2.0, 3.0]], [0.0, 0.0], 6.0),
        ([[2.0, 3.0]], [2.0, 0.0], 0.0),  # on the reference's edge
        ([[2.0, 3.0], [1.0, 5.0]], [3.0, 0.0], 0.0),  # all outside
        ([[-1.0, 9.0], [2.0, 3.0]], [0.0, 0.0], 6.0),  # one outside adds nothing
        ([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]], [0.0, 0.0], 6.0),  # a staircase
        ([[-1.0, -2.0]], [-2.0, -4.0], 2.0),
        ([[1.0, 2.0, 3.0]], [0.0, 0.0, 0.0], 6.0),
        ([[1.0, 1.0, 2.0], [2.0, 1.0, 1.0]], [0.0, 0.0, 0.0], 3.0),
    ],
)
def test_volumes_with_a_closed_form(Y: list[list[float]], ref: list[float], volume: float) -> None:
    assert hypervolume(torch.tensor(Y, dtype=torch.float64), torch.tensor(ref, dtype=torch.float64)) == pytest.approx(
        volume
    )


def test_a_fine_front_approaches_the_area_under_its_curve() -> None:
    angle = torch.linspace(0, math.pi / 2, 2000, dtype=torch.float64)
    quarter_circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert hypervolume(quarter_circle, torch.zeros(2, dtype=torch.float64)) == pytest.approx(math.pi / 4, abs=1e-3)


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("seed", range(2))
def test_the_volume_agrees_with_monte_carlo(m: int, seed: int) -> None:
    Y = points(12, m, seed)
    ref = torch.full((m,), 0.15, dtype=torch.float64)
    samples = points(200_000, m, 99)
    hit = ((samples > ref) & (samples[:, None] <= Y).all(-1).any(-1)[:, None]).all(-1)
    assert hypervolume(Y, ref) == pytest.approx(float(hit.double().mean()), abs=0.006)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("m", [2, 3])
def test_the_trace_is_the_volume_of_every_prefix(m: int, ties: bool) -> None:
    Y, ref = points(25, m, 4, ties) - 0.2, torch.zeros(m, dtype=torch.float64)
    trace = hypervolume_trace(Y, ref)
    assert trace == pytest.approx([hypervolume(Y[: n + 1], ref) for n in range(len(Y))], abs=1e-12)
    assert all(after >= before for before, after in itertools.pairwise(trace))


def test_what_failed_is_no_point_even_where_nothing_else_is() -> None:
    """A failed trial is worse than anything, and -inf does not dominate -inf."""
    none = torch.full((3, 2), -math.inf, dtype=torch.float64)
    assert pareto_front(none) == []
    assert pareto_front(torch.cat([none, torch.tensor([[-1.0, -2.0]]).double()])) == [3]
    assert pareto_front(torch.tensor([[-1.0, -math.inf], [-math.inf, -1.0]]).double()) == []


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_chosen_by_gain_adds_nearly_as_much_as_any_choice(m: int, seed: int) -> None:
    """Hypervolume is submodular, so that choosing greedily gives 1 - 1/e of the largest gain at least."""
    Y, known, ref = points(9, m, seed), points(4, m, seed + 50), torch.full((m,), 0.2, dtype=torch.float64)

    def gain(rows: Sequence[int]) -> float:
        return hypervolume(torch.cat([known, Y[list(rows)]]), ref) - hypervolume(known, ref)

    chosen = by_gain(Y, known, ref, 3)
    best = max(gain(rows) for rows in itertools.combinations(range(9), 3))
    assert best * (1 - 1 / math.e) <= gain(chosen) and gain(chosen[:1]) == max(gain([row]) for row in range(9))
    everything = by_gain(Y, known, ref, 20)
    assert everything[:3] == chosen and sorted(everything) == list(range(9))
    gains = [gain(everything[: n + 1]) - gain(everything[:n]) for n in range(9)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(gains))
