"""The threshold family is one nested path of legal models up to the dense one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmbo.family import ThresholdFamily
from llmbo.space import SearchSpace
from pruning.cost import dense_block_parameters
from pruning.importance import Importance

CASES = [(4, 24, 0.4, 0), (3, 100, 0.1, 7), (2, 24, 0.9, 24), (5, 24, 0.05, 3)]


@pytest.fixture(params=[(case, seed) for case in CASES for seed in range(2)], ids=str)
def family(request: pytest.FixtureRequest, make_toy: Callable[..., Any]) -> ThresholdFamily:
    case, seed = request.param
    return make_toy(*case, seed=seed).family


def test_every_member_adds_one_level_to_the_one_before(family: ThresholdFamily) -> None:
    steps = family.path[1:] - family.path[:-1]
    assert steps.sum(-1).eq(1).all() and steps.count_nonzero(-1).eq(1).all()


def test_members_are_legal_and_grow_to_the_dense_model(family: ThresholdFamily) -> None:
    assert family.space.legal(family.path).all()
    torch.testing.assert_close(family.shares, family.space.share(family.path), rtol=0, atol=0)
    assert (family.shares.diff() > 0).all()
    assert tuple(family.path[-1].int().tolist()) == family.space.max_levels
    assert family.importance.shape == (family.space.d,) and (family.importance > 0).all()


def test_the_family_starts_at_the_smallest_share(family: ThresholdFamily) -> None:
    """No more than one step above it, or a legal member would be missing."""
    space = family.space
    steps = [
        max(high - low for low, high in zip(space.widths[block.kind], space.widths[block.kind][1:], strict=False))
        * block.parameters_per_unit
        + block.fixed_parameters
        for block in space.anatomy.blocks
    ]
    assert family.shares[0] < space.min_share + max(steps) / dense_block_parameters(space.anatomy)


def test_at_gives_the_nearest_member(family: ThresholdFamily) -> None:
    for share in torch.linspace(-0.1, 1.1, 25).tolist():
        distance = abs(float(family.space.share(torch.tensor(family.at(share), dtype=torch.float64))) - share)
        assert distance == pytest.approx(min(abs(member - share) for member in family.shares.tolist()), abs=1e-12)


def test_the_profile_passes_through_every_member(family: ThresholdFamily) -> None:
    torch.testing.assert_close(family.profile(family.shares), family.path, rtol=0, atol=1e-9)


def test_the_profile_interpolates_and_stays_inside(family: ThresholdFamily) -> None:
    middle = (family.shares[1:] + family.shares[:-1]) / 2
    torch.testing.assert_close(family.profile(middle), (family.path[1:] + family.path[:-1]) / 2, rtol=0, atol=1e-9)
    outside = family.profile(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(outside, family.path[[0, -1]], rtol=0, atol=0)


def test_levels_count_the_units_above_a_common_threshold(make_space: Callable[..., SearchSpace]) -> None:
    """With a step of one neuron the definition is exact: a member keeps just the units above one density."""
    space = make_space(3, 24, 0.1, 1)
    rng = torch.Generator().manual_seed(5)
    groups, neurons = torch.rand(3, 2, generator=rng) * 30, torch.rand(3, 24, generator=rng)
    family = ThresholdFamily.from_importance(space, Importance(groups, neurons, groups.sum(-1) + neurons.sum(-1)))
    densities = [
        (groups / space.anatomy.attention.parameters_per_unit).double(),
        (neurons / space.anatomy.mlp.parameters_per_unit).double(),
    ]
    expected = set()
    for threshold in torch.cat([density.flatten() for density in densities]).tolist():
        expected.add(tuple(int(row.ge(threshold).sum()) for density in densities for row in density))
    assert {tuple(row) for row in family.path.int().tolist()} <= expected


def test_scaling_all_scores_changes_nothing(make_toy: Callable[..., Any]) -> None:
    toy = make_toy()
    scaled = Importance(
        *(1e-6 * scores for scores in (toy.importance.groups, toy.importance.neurons, toy.importance.layers))
    )
    torch.testing.assert_close(ThresholdFamily.from_importance(toy.space, scaled).path, toy.family.path, rtol=0, atol=0)


def test_a_more_important_block_never_keeps_less(make_toy: Callable[..., Any]) -> None:
    toy = make_toy()
    neurons = toy.importance.neurons.clone()
    neurons[1] *= 4
    favoured = ThresholdFamily.from_importance(
        toy.space, Importance(toy.importance.groups, neurons, toy.importance.layers)
    )
    dimension = toy.space.num_layers + 1
    for share in toy.family.shares:
        assert favoured.profile(share[None])[0, dimension] >= toy.family.profile(share[None])[0, dimension] - 1e-9
