"""What the pool is made of: a quarter each of four kinds of candidates, each bound to the front or the family by a law."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmbo.search.pool import candidate_pool, smooth_changes

SIZE = 2000


@pytest.fixture
def deep(make_toy: Callable[..., Any]) -> Any:
    return make_toy(24, 48, 0.4, 4)


@pytest.fixture
def front(deep: Any) -> Tensor:
    """Ten members, and as many points beside them."""
    members = deep.family.path[:: max(1, len(deep.family.path) // 10)][:10]
    beside = members + smooth_changes(deep.space, len(members), torch.Generator().manual_seed(1))
    return torch.cat([members, beside.round().clamp(*deep.space.bounds)])


@pytest.fixture
def quarters(deep: Any, front: Tensor) -> dict[str, Tensor]:
    pool = candidate_pool(deep.family, front, torch.Generator().manual_seed(0), SIZE)
    kinds = pool[-SIZE:].split(SIZE // 4)
    return dict(zip(("carried", "smooth", "single", "crossed"), kinds, strict=True))


def distance(rows: Tensor, to: Tensor) -> Tensor:
    """Of each row, the mean number of levels from the nearest of `to`."""
    return torch.cdist(rows, to, p=1).amin(1) / rows.shape[1]


def test_smooth_changes_have_the_size_and_the_smoothness_they_are_drawn_with(deep: Any) -> None:
    L = deep.space.num_layers
    changes = smooth_changes(deep.space, 6000, torch.Generator().manual_seed(0)) / deep.space.bounds[1]
    low, high = 0.02, 0.15  # amplitude, uniform in between
    expected = ((high**3 - low**3) / (3 * (high - low))) ** 0.5
    torch.testing.assert_close(changes.std(0), torch.full((deep.space.d,), expected).double(), rtol=0.06, atol=0)
    # A Gaussian kernel of width s correlates neighbours by exp(-1 / 4 s^2); inner layers, where it is not cut off.
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    inner = changes[:, :L][:, L // 2 - 1 : L // 2 + 1]
    correlation = float(torch.corrcoef(inner.T)[0, 1])
    assert correlation == pytest.approx(float(torch.exp(-1 / (4 * scales**2)).mean()), abs=0.02)
    profiles = changes.view(-1, 2, L)[:, :, L // 2]
    assert abs(float(torch.corrcoef(profiles.T)[0, 1])) < 0.05  # attention and MLPs change apart


def test_members_are_carried_to_members_and_half_of_them_changed(deep: Any) -> None:
    """A front on the family has no deviation: what is carried lies on the family, and beside it by a smooth change."""
    pool = candidate_pool(deep.family, deep.family.path[::3], torch.Generator().manual_seed(0), SIZE)
    carried = pool[-SIZE:][: SIZE // 4]
    path = deep.family.profile(torch.linspace(*deep.family.shares[[0, -1]].tolist(), 3000).double()).round()
    far = distance(carried, path)
    assert 0.4 < float((far < 0.05).double().mean()) < 0.62
    typical = float(smooth_changes(deep.space, 500, torch.Generator().manual_seed(3)).abs().mean())
    assert 0.4 * typical < float(far[far >= 0.05].mean()) < 1.2 * typical


def test_what_deviates_is_carried_with_its_deviation_to_other_sizes(deep: Any) -> None:
    L = deep.space.num_layers
    deviation = torch.cat([torch.zeros(L), 3 * torch.tensor([1.0, -1.0]).repeat(L // 2)]).double()
    point = deep.family.profile(torch.tensor([0.7]).double()) + deviation
    pool = candidate_pool(deep.family, point.round().clamp(*deep.space.bounds), torch.Generator().manual_seed(0), SIZE)
    carried = pool[-SIZE:][: SIZE // 4]
    share, ends = deep.space.share(carried), deep.family.shares[[0, -1]]
    spread = (share - ends[0]) / (ends[1] - ends[0])
    assert float(spread.quantile(0.1)) < 0.25 and float(spread.quantile(0.9)) > 0.75
    kept = carried - deep.family.profile(share)
    assert float(torch.nn.functional.cosine_similarity(kept, deviation[None], dim=-1).median()) > 0.7


def test_smooth_candidates_lie_around_the_front(deep: Any, front: Tensor, quarters: dict[str, Tensor]) -> None:
    typical = float(smooth_changes(deep.space, 500, torch.Generator().manual_seed(3)).abs().mean())
    assert 0.3 * typical < float(distance(quarters["smooth"], front).mean()) < 1.2 * typical


def test_single_steps_are_a_few_of_one_level_up_or_down(deep: Any, front: Tensor, quarters: dict[str, Tensor]) -> None:
    nearest = front[torch.cdist(quarters["single"], front, p=1).argmin(1)]
    steps = quarters["single"] - nearest
    assert steps.abs().max() == 1 and (steps > 0).any() and (steps < 0).any()
    assert 1 < float(steps.abs().sum(1).mean()) < 4  # three on average, some of them off the grid


def test_crossovers_take_every_level_from_one_of_two_points_of_like_size(
    deep: Any, front: Tensor, quarters: dict[str, Tensor]
) -> None:
    ordered = front[deep.space.share(front).argsort()]
    crossed = quarters["crossed"]
    pairs = torch.stack([ordered[:-1], ordered[1:]], 1)  # (n - 1) x 2 x d
    of_pair = (crossed[:, None, None] == pairs[None]).any(2).all(-1)  # candidates x pairs
    assert of_pair.any(1).all()
    mixed = ~(crossed[:, None] == front[None]).all(-1).any(1)
    assert mixed.double().mean() > 0.5
