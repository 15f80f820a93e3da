"""Width is exchanged between blocks where that pays and is legal, and what is expected of other models agrees with what was measured."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmbo.problem.expansion import STEPS, best_exchanges, expansions, informed
from llmbo.problem.family import Expansions, ThresholdFamily
from llmbo.problem.prices import Prices
from llmbo.problem.recipe import DENSE_PRICES, AllocationRecipe
from llmbo.problem.space import SearchSpace
from pruning.block import BlockKind


@pytest.fixture
def anchors(family: ThresholdFamily) -> list[tuple[int, ...]]:
    """Two members, or one where the family has no more."""
    parts = [family.path[len(family.path) * part // 4] for part in (1, 2)]
    return list(dict.fromkeys(tuple(row.int().tolist()) for row in parts))


def measured(space: SearchSpace, anchors: list[tuple[int, ...]]) -> tuple[list[Tensor], dict[BlockKind, Tensor]]:
    """Random costs of steps from the anchors, those of steps that are not there like the last that is, and block sensitivity."""
    generator = torch.Generator().manual_seed(0)
    costs = []
    for x in anchors:
        by_level = torch.rand(space.d, int(space.bounds[1].max()) + 1, generator=generator, dtype=torch.float64)
        reached = (torch.tensor(x)[:, None] + torch.tensor(STEPS)).clamp_min(0).minimum(space.bounds[1][:, None].long())
        own = by_level.gather(1, torch.tensor(x)[:, None])
        costs.append(by_level.gather(1, reached) - own)
    sensitivity = {
        kind: torch.rand(space.num_layers, len(widths), generator=generator).sort(-1, descending=True).values
        for kind, widths in space.widths.items()
    }
    return costs, sensitivity  # type: ignore[return-value]


def exchanged(
    family: ThresholdFamily, exchanges: dict[tuple[int, ...], Tensor], weight: float = 1.0
) -> tuple[ThresholdFamily, ThresholdFamily]:
    """Two families along the path of prices like the given one's: without exchanges and with them."""
    tops = family.space.bounds[1].int().tolist()
    costs = [[float((family.path[:, i] >= level).sum()) for level in range(1, top + 1)] for i, top in enumerate(tops)]
    prices = Prices.of(family.space, costs, costs)
    around = Expansions(torch.ones(1), torch.zeros(1, family.space.d, 1))
    recipe = replace(DENSE_PRICES, width_exchanges=weight)
    after = informed(prices, DENSE_PRICES.bare, exchanges, [], around)
    return family.moved_to(prices.path(recipe)), family.moved_to(after.path(recipe))


def test_expansions_give_back_what_was_measured_and_add_up_over_blocks(
    family: ThresholdFamily, anchors: list[tuple[int, ...]]
) -> None:
    space = family.space
    costs, sensitivity = measured(space, anchors)
    found = expansions(space, anchors, costs, sensitivity)
    torch.testing.assert_close(found.shares, space.share(torch.tensor([*anchors, space.max_levels])))
    for number, (x, cost) in enumerate(zip(anchors, costs, strict=True)):
        assert float(found.changes_at(torch.tensor([x]))[0, number]) == 0
        for block, (column, step) in itertools.product(range(space.d), enumerate(STEPS)):
            if 0 <= x[block] + step <= space.max_levels[block]:
                there = torch.tensor([[*x[:block], x[block] + step, *x[block + 1 :]]])
                assert float(found.changes_at(there)[0, number]) == pytest.approx(float(cost[block, column]))
    narrowed = torch.tensor([tuple(max(0, level - 1) for level in space.max_levels)])
    alone = sum(float(sensitivity[block.kind][:, -2].sum()) for block in space.anatomy.blocks)
    assert float(found.changes_at(narrowed)[0, -1]) == pytest.approx(alone)


def test_beyond_the_steps_costs_go_on_as_straight_lines(make_toy: Callable[..., Any]) -> None:
    space = make_toy(3, 100, 0.1, 7).space
    x = tuple(top // 2 for top in space.max_levels)
    slope = torch.linspace(-1, 1, space.d, dtype=torch.float64)
    costs = slope[:, None] * torch.tensor(STEPS, dtype=torch.float64)
    _, sensitivity = measured(space, [x])
    changes = expansions(space, [x], [costs], sensitivity).changes[0]
    for block, top in enumerate(space.max_levels):
        levels = torch.arange(top + 1, dtype=torch.float64)
        torch.testing.assert_close(changes[block, : top + 1], slope[block] * (levels - x[block]))


def test_nothing_is_expected_of_members_and_each_anchor_speaks_for_its_own_size(
    family: ThresholdFamily, anchors: list[tuple[int, ...]]
) -> None:
    space = family.space
    assert not family.expected_change(family.path, family.shares).any()  # nothing is known at all
    anchors = [x for x in anchors if x != space.max_levels]  # the dense model has its own, block sensitivity
    known = replace(family, expansions=expansions(space, anchors, *measured(space, anchors)))
    torch.testing.assert_close(
        known.expected_change(family.path, family.shares),
        torch.zeros(len(family.path), dtype=torch.float64),
        rtol=0,
        atol=1e-9,
    )
    assert known.expansions is not None
    weights = known.expansions.weights(family.shares)
    torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights), dtype=torch.float64))
    for number, x in enumerate((*anchors, space.max_levels)):
        assert float(known.expansions.weights(space.share(torch.tensor([x])))[0, number]) == pytest.approx(1)


def test_expectations_are_differences_to_the_member_of_the_same_size(make_toy: Callable[..., Any]) -> None:
    """Equal widths in other layers: the same size as a member, a change that is known."""
    toy = make_toy(4, 24, 0.1, 4)
    d, most = toy.space.d, int(toy.space.bounds[1].max()) + 1
    per_level = torch.rand(d, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    changes = -per_level * torch.arange(most, dtype=torch.float64)
    known = replace(toy.family, expansions=Expansions(torch.tensor([1.0], dtype=torch.float64), changes[None]))
    for member in toy.family.path[:-1]:
        swapped = member.clone()
        swapped[:4] = member[:4].flip(0)
        expected = (member - swapped) @ per_level[:, 0]
        assert float(known.expected_change(swapped[None], toy.space.share(swapped[None]))) == pytest.approx(
            float(expected)
        )


def test_exchanging_nothing_changes_nothing(family: ThresholdFamily) -> None:
    middle = tuple(family.path[len(family.path) // 2].int().tolist())
    some = torch.where(torch.tensor(middle) > 0, -1.0, 1.0).double()
    for exchanges, weight in (({}, 1.0), ({middle: 0 * some}, 1.0), ({middle: some}, 0.0)):
        plain, still = exchanged(family, exchanges, weight)
        assert torch.equal(still.path, plain.path) and torch.equal(still.shares, plain.shares)


def test_anchors_exchange_others_follow_and_all_stay_legal(
    family: ThresholdFamily, anchors: list[tuple[int, ...]]
) -> None:
    space = family.space
    costs = [torch.randn(space.d, 2, generator=torch.Generator().manual_seed(seed)) for seed in range(len(anchors))]
    exchanges = [best_exchanges(space, x, cost) for x, cost in zip(anchors, costs, strict=True)]
    _, corrected = exchanged(family, dict(zip(anchors, exchanges, strict=True)))
    assert space.legal(corrected.path).all() and (corrected.shares.diff() > 0).all()
    assert tuple(corrected.path[-1].int().tolist()) == space.max_levels
    torch.testing.assert_close(corrected.shares, space.share(corrected.path), rtol=0, atol=0)
    rows = {tuple(row) for row in corrected.path.int().tolist()}
    shares = {round(share, 12) for share in corrected.shares.tolist()}
    for x, exchange in zip(anchors, exchanges, strict=True):
        target = torch.tensor(x) + exchange
        if bool(space.legal(target[None])):
            there = tuple(target.int().tolist())
            assert there in rows or round(float(space.share(target)), 12) in shares  # another member of its size


def test_an_exchange_that_breaks_a_limit_is_not_made(make_toy: Callable[..., Any]) -> None:
    """Less attention in the limit's stead would be legal; more of it is not."""
    toy = make_toy(4, 24, 0.3, 4)
    limit = 0.5 * float(toy.space.cost("kv_bytes", toy.space.bounds[1]))
    space = replace(toy.space, limits={"kv_bytes": limit})
    family = ThresholdFamily.from_importance(space, toy.importance)
    x = family.at(0.5)
    up = torch.tensor([1.0] * space.num_layers + [-1.0] * space.num_layers)
    offsets = torch.minimum(up, space.bounds[1] - torch.tensor(x)).clamp_min(-torch.tensor(x))
    plain, corrected = exchanged(family, {x: offsets})
    assert torch.equal(corrected.path, plain.path) and (space.cost("kv_bytes", plain.path) <= limit).all()
    _, free = exchanged(replace(family, space=toy.space), {x: offsets})
    assert (space.cost("kv_bytes", free.path) > limit).any()  # else this would say nothing


@pytest.mark.parametrize("seed", range(4))
def test_the_best_moves_are_the_best_of_all(make_toy: Callable[..., Any], seed: int) -> None:
    """Against every combination of a level less, none and a level more."""
    space = make_toy(3, 24, 0.1, 8).space
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randn(space.d, 2, generator=generator)
    x = tuple(int(torch.randint(top + 1, (), generator=generator)) for top in space.max_levels)
    found = best_exchanges(space, x, costs)
    here = torch.tensor(x, dtype=torch.float64)
    steps = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=space.d)), dtype=torch.float64)
    rows = here + steps
    possible = ((rows >= 0) & (rows <= space.bounds[1])).all(-1)
    steps = steps[possible & (space.share(rows.clamp(*space.bounds)) <= space.share(here) + 1e-12)]

    def cost(exchange: torch.Tensor) -> torch.Tensor:
        return torch.where(
            exchange < 0, costs[:, 0].double(), torch.where(exchange > 0, costs[:, 1].double(), 0.0)
        ).sum(-1)

    assert any(torch.equal(found, row) for row in steps)
    assert float(cost(found)) == pytest.approx(float(cost(steps).min()), rel=2e-3, abs=1e-9)


def test_nothing_is_exchanged_when_every_exchange_costs(family: ThresholdFamily) -> None:
    x = family.at(0.5)
    assert not best_exchanges(family.space, x, torch.ones(family.space.d, 2)).any()


@pytest.mark.parametrize("numbers", [{}, {"mlp_slope": 0.4, "attention_first": -0.8}])
def test_blocks_that_are_dearer_at_pruned_members_get_dearer_there_alone(
    make_toy: Callable[..., Any], numbers: dict[str, float]
) -> None:
    """By the factor over the recipe's own price that was measured, shared with neighbours, bounded, and not at the dense model."""
    recipe = AllocationRecipe.of(numbers).bare
    toy = make_toy(6, 60, 0.3, 7)
    space = toy.space
    costs = [[1.0] * int(top) for top in space.bounds[1]]
    prices, half = Prices.of(space, costs, costs), space.max_levels[-1] // 2
    anchor = (1,) * 6 + (half,) * 6
    said = prices.log_prices_of(recipe, torch.tensor([0.5], dtype=torch.float64))[0].exp()
    levels = int(space.bounds[1].max()) + 1
    factor = torch.ones(space.d, dtype=torch.float64)
    factor[8], factor[1] = 1.5, 1e9  # a middle MLP, and an attention that seems to be worth anything
    change = torch.zeros(space.d, levels, dtype=torch.float64)
    falls = (factor[:, None] * said * prices.shares).where(prices.steps, 0.0)
    change[:, : falls.shape[1]] = falls.flip(-1).cumsum(-1).flip(-1)
    around = Expansions(torch.tensor([0.5, 1.0], dtype=torch.float64), torch.stack([change, 0 * change]))
    found = informed(prices, recipe, {anchor: 0 * factor}, [anchor], around)
    at, dense = found.corrections
    assert not dense.any() and not found.exchanges.any()
    torch.testing.assert_close(found.anchors, space.share(torch.tensor([anchor, space.max_levels])))
    assert 0.3 * math.log(1.5) < float(at[8]) < math.log(1.5) and float(at[8]) > float(at[7]) > float(at[6]) >= 0
    assert 0.3 < float(at[1]) <= 0.75
    torch.testing.assert_close(at[[4, 5, 11]], torch.zeros(3, dtype=torch.float64), atol=0.02, rtol=0)
    unsound = informed(prices, recipe, {anchor: 0 * factor}, [], replace(around, shares=torch.ones(1)))
    assert not unsound.corrections.any()
