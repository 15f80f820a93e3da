"""The threshold family is one nested path of legal models up to the dense one."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.interpolation import bracketed, interpolated
from llmbo.problem.prices import block_marginal_costs, unit_marginal_costs
from llmbo.problem.space import SearchSpace
from pruning.cost import dense_block_parameters
from pruning.importance import Importance


def test_every_member_adds_one_level_to_the_one_before(family: ThresholdFamily) -> None:
    steps = family.path[1:] - family.path[:-1]
    assert steps.sum(-1).eq(1).all() and steps.count_nonzero(-1).eq(1).all()


def test_members_are_legal_and_grow_to_the_dense_model(family: ThresholdFamily) -> None:
    assert family.space.legal(family.path).all()
    torch.testing.assert_close(family.shares, family.space.share(family.path), rtol=0, atol=0)
    assert (family.shares.diff() > 0).all()
    assert tuple(family.path[-1].int().tolist()) == family.space.max_levels
    assert family.importance.shape == (family.space.d,) and (family.importance > 0).all()


def test_no_member_is_without_attention_however_little_that_matters(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(3, 100, 0.1, 7)
    groups = 1e-9 * toy.importance.groups
    family = ThresholdFamily.from_importance(
        toy.space, Importance(groups, toy.importance.neurons, toy.importance.layers)
    )
    assert (family.path[:, :3].sum(-1) > 0).all() and (family.path[0, 3:] == toy.space.bounds[1, 3:]).all()


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


@pytest.mark.parametrize(("neurons", "step"), [(24, 1), (24, 2), (25, 5), (24, 7), (100, 8), (10, 10)])
def test_a_level_costs_what_the_unit_scores_with_which_the_count_rounds_to_it(
    make_space: Callable[..., SearchSpace], neurons: int, step: int
) -> None:
    """Half-way between two widths, and there upwards: of widths 0 and 4 the second, and of 0 and 5 the third best unit decides."""
    space = make_space(2, neurons, 0.1, step)
    rng = torch.Generator().manual_seed(5)
    scores = {"attention": torch.rand(2, 2, generator=rng), "mlp": torch.rand(2, neurons, generator=rng)}
    found = unit_marginal_costs(space, Importance(scores["attention"], scores["mlp"], torch.ones(2)))
    rows = [(block, row) for block in space.anatomy.blocks for row in scores[block.kind].double()]
    for costs, (block, row) in zip(found, rows, strict=True):
        best, widths = row.sort(descending=True).values / block.parameters_per_unit, space.widths[block.kind]
        for level, cost in enumerate(costs, 1):
            count = next(n for n in range(1, block.units + 1) if n - widths[level - 1] >= widths[level] - n)
            assert cost == pytest.approx(float(best[count - 1]), rel=1e-12), (block.kind, level)


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


def test_without_refit_block_sensitivity_and_scores_agree_on_units_that_differ_little(
    make_toy: Callable[..., Any],
) -> None:
    """Where every unit of a block costs the same and costs add up, both marginal costs are that cost per parameter."""
    space = make_toy().space
    groups, neurons = torch.rand(4, 1).expand(4, 2), torch.rand(4, 1).expand(4, 24)
    importance = Importance(groups, neurons, groups.sum(-1) + neurons.sum(-1))
    costs = {
        block.kind: importance.of(block.kind)[:, :1] * (block.units - torch.tensor(space.widths[block.kind])).float()
        for block in space.anatomy.blocks
    }
    blocks = [block for block in space.anatomy.blocks for _ in range(4)]
    by_units, by_blocks = unit_marginal_costs(space, importance), block_marginal_costs(space, costs)
    for units, whole, block in zip(by_units, by_blocks, blocks, strict=True):
        fixed = block.fixed_parameters / (block.units * block.parameters_per_unit)  # norms leave with the last unit
        assert whole == pytest.approx(units, rel=max(1e-6, 30 * fixed))
        assert all(b <= a + 1e-15 for a, b in itertools.pairwise(whole))


def test_marginal_costs_of_blocks_are_the_slopes_of_the_convex_hull(make_toy: Callable[..., Any]) -> None:
    space = make_toy(4, 24, 0.4, 8).space  # four levels of neurons
    mlp = space.anatomy.mlp
    costs = {"attention": torch.zeros(4, 3), "mlp": torch.tensor([[9.0, 8.5, 1.0, 0.0]] * 4)}
    found = block_marginal_costs(space, costs)[4]
    step = 8 * mlp.parameters_per_unit
    first = 8.0 / (2 * step + mlp.fixed_parameters)  # from level 0 to 2 in one edge: level 1 lies above the hull
    assert found == pytest.approx([first, first, 1.0 / step])


def test_a_cost_that_rises_with_width_is_taken_for_noise(make_toy: Callable[..., Any]) -> None:
    space = make_toy(4, 24, 0.4, 8).space
    found = block_marginal_costs(space, {"attention": torch.rand(4, 3), "mlp": torch.rand(4, 4)})
    assert all(cost >= 0 for row in found for cost in row)
    assert all(b <= a for row in found for a, b in itertools.pairwise(row))


def test_interpolation_meets_its_rows_and_stops_at_the_ends() -> None:
    shares, path = torch.tensor([0.2, 0.5, 1.0]).double(), torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 2.0]]).double()
    found = interpolated(shares, path, torch.tensor([0.0, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0]).double())
    expected = [[0, 0], [0, 0], [0.5, 1], [1, 2], [2, 2], [3, 2], [3, 2]]
    torch.testing.assert_close(found, torch.tensor(expected).double())
    alone = interpolated(shares[:1], path[:1], torch.tensor([0.1, 0.9]).double())
    torch.testing.assert_close(alone, path[:1].expand(2, 2))


def test_values_lie_between_the_knots_around_them_or_beyond_the_last_two() -> None:
    knots = torch.tensor([-1.0, 0.0, 2.0]).double()
    at = torch.tensor([[-3.0, -1.0, -0.25], [0.5, 2.0, 5.0]]).double()
    right, weight = bracketed(knots, at)
    assert right.tolist() == [[1, 1, 1], [2, 2, 2]]
    torch.testing.assert_close(weight, torch.tensor([[-2.0, 0.0, 0.75], [0.25, 1.0, 2.5]]).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(knots[right - 1] + weight * (knots[right] - knots[right - 1]), at)


def test_under_limits_the_family_goes_on_with_what_they_leave(make_toy: Callable[..., Any]) -> None:
    """Nested, within every limit, and near to those that bind: a limit on the KV cache does not stop MLPs from growing."""
    toy = make_toy()
    limits = {"kv_bytes": 0.6 * toy.dense["kv_bytes"]}
    limited = replace(toy, space=replace(toy.space, limits=limits)).family
    assert (limited.path.diff(dim=0).sum(-1) >= 1).all() and (limited.path.diff(dim=0) >= 0).all()
    assert (toy.space.cost("kv_bytes", limited.path) <= limits["kv_bytes"]).all()
    assert (limited.path[-1, toy.space.num_layers :] == toy.space.bounds[1, toy.space.num_layers :]).all()
