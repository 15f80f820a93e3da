"""A recipe's path: the dense model's prices give the path of before, and every model is as large as it may be."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from llmbo.errors import ConfigError
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.prices import Prices
from llmbo.problem.recipe import BOUNDS, DENSE_PRICES, LARGEST_BONUS, AllocationRecipe, bounds
from llmbo.problem.space import SearchSpace
from pruning.anatomy import anatomy_of

NEUTRAL = 0.5**0.5  # the share at which numbers by size count for nothing


def random_costs(space: SearchSpace, seed: int) -> list[list[float]]:
    drawn = torch.Generator().manual_seed(seed)
    tops = space.bounds[1].int().tolist()
    return [(9 * torch.rand(top, generator=drawn)).exp().sort(descending=True).values.tolist() for top in tops]


def random_theta(n: int, seed: int = 0) -> Tensor:
    low, high = bounds()
    return low + (high - low) * torch.rand(n, len(low), generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def space(make_toy: Callable[..., Any]) -> SearchSpace:
    toy: SearchSpace = make_toy(5, 60, 0.3, 7).space
    return toy


@pytest.fixture
def prices(space: SearchSpace) -> Prices:
    return Prices.of(space, random_costs(space, 1), random_costs(space, 2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("limits", [{}, {"kv_bytes": 0.6}, {"params_share": 0.7, "flops": 0.75}])
def test_the_dense_models_prices_give_the_path_of_thresholds_member_for_member(
    space: SearchSpace,
    make_toy: Callable[..., Any],
    geometric_mean: Callable[..., Any],
    seed: int,
    limits: dict[str, float],
) -> None:
    dense = {name: float(space.cost(name, space.bounds[1])) for name in limits}
    space = replace(space, limits={name: share * dense[name] for name, share in limits.items()})
    fisher, sensitivity = random_costs(space, seed), random_costs(space, seed + 10)
    expected = ThresholdFamily.from_marginal_costs(
        space, geometric_mean(fisher, sensitivity), make_toy(5, 60, 0.3, 7).importance
    )
    found = Prices.of(space, fisher, sensitivity).path(DENSE_PRICES)
    assert torch.equal(found, expected.path) and len(found) > 15


@pytest.mark.parametrize("names", [("kv_bytes",), ("flops", "kv_bytes")])
def test_steps_are_worth_what_they_bring_for_the_costs_that_are_searched(
    space: SearchSpace, names: tuple[str, ...]
) -> None:
    """Log prices are per weight, but for what weighs hardly anything; levels that weigh nothing are taken before all others."""
    costs = random_costs(space, 1)
    plain, priced = (Prices.of(replace(space, priced_by=by), costs, costs) for by in (("params_share",), names))
    share, dense = torch.tensor([0.5**0.5], dtype=torch.float64), space.bounds[1]
    difference = (priced.log_prices_of(DENSE_PRICES, share) - plain.log_prices_of(DENSE_PRICES, share))[0]
    for block in (0, space.d - 1):
        for level in range(1, int(dense[block]) + 1):
            less, more = dense.clone(), dense.clone()
            less[block], more[block] = level - 1, level
            weights = [
                sum(float(space.cost(name, x) / space.cost(name, dense)) for name in names) / len(names)
                for x in (less, more)
            ]
            size = float(space.share(more) - space.share(less))
            per_weight = math.log(size / max(weights[1] - weights[0], 1e-3 * size))
            assert float(priced.per_weight[block, level - 1]) == pytest.approx(per_weight, abs=1e-6)
            assert float(difference[block, level - 1]) == pytest.approx(per_weight, abs=3.0)  # prices never rise
    if names == ("kv_bytes",):
        with_attention = priced.path(DENSE_PRICES)[:, : space.num_layers].sum(-1) < dense[: space.num_layers].sum()
        assert (priced.path(DENSE_PRICES)[with_attention][:, space.num_layers :] == dense[-1]).all()


@pytest.mark.parametrize("weights", [{"flops": 1}, {"flops": 2, "kv_bytes": 1}, {"flops": 1, "kv_bytes": 3}])
def test_costs_of_another_weight_are_attention_of_another_price(space: SearchSpace, weights: dict[str, int]) -> None:
    """So a recipe needs no weights of costs: what layers cost is alike, and only attention and MLPs differ in it."""
    fisher, sensitivity = random_costs(space, 1), random_costs(space, 2)
    names = tuple(name for name, times in weights.items() for _ in range(times))
    even, other = (
        Prices.of(replace(space, priced_by=by), fisher, sensitivity) for by in (("flops", "kv_bytes"), names)
    )
    change = other.per_weight - even.per_weight
    attention, mlp = (
        change[rows][even.steps[rows]] for rows in (slice(space.num_layers), slice(space.num_layers, None))
    )
    shift = float(attention.mean() - mlp.mean())
    assert float(attention.std() + mlp.std()) < 0.01 < abs(shift)
    found = other.path(DENSE_PRICES)
    assert torch.equal(found, even.path(replace(DENSE_PRICES, attention=shift)))
    assert not torch.equal(found, even.path(DENSE_PRICES))


def test_requests_of_the_pilot_decode_to_what_it_kept() -> None:
    """54 recipes that a language model asked for on SmolLM2, and what each kept at a share of 0.6 with the formula's first version.

    Of its prices the mean over each block's steps was written down, to which the prices of today are moved here; their course within a
    block is today's. So what is kept is the same within a level, but for some blocks.
    """
    pilot = json.loads((Path(__file__).parents[1] / "data" / "recipe_pilot.json").read_text(encoding="utf-8"))
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
    )
    with torch.device("meta"):
        space = SearchSpace(anatomy_of(AutoModelForCausalLM.from_config(config)))
    prices = Prices.of(
        space, *([[math.exp(v) for v in row] for row in pilot[of]] for of in ("log_fisher", "log_sensitivity"))
    )
    share, near, near_default = torch.tensor([0.6], dtype=torch.float64), [], []
    for asked in pilot["requests"]:
        tilts = {"attention_level_tilt": asked["lev"], "mlp_level_tilt": asked["lev"]}
        profile = (*asked["attention"], *asked["mlp"])
        recipe = AllocationRecipe(fisher_weight=asked["f"], **tilts, width_exchanges=0.0, profile=profile)
        kept = torch.tensor(asked["kept"], dtype=torch.float64)
        for of, found in ((recipe, near), (DENSE_PRICES, near_default)):
            found.append(float(((prices.members_of(of, share)[0] - kept).abs() <= 1).double().mean()))
    assert len(near) == 54 and min(near) > 0.8 and sum(near) / 54 > 0.94
    assert sum(near_default) / 54 < 0.85  # else this would say nothing of the recipes


def test_a_model_is_no_larger_than_asked_for_and_nothing_more_would_fit(prices: Prices) -> None:
    space, share = prices.space, torch.tensor([0.33, 0.5, 0.71, 0.9], dtype=torch.float64)
    members = prices.members(random_theta(20), share)
    left = share - space.share(members)
    assert (left >= -1e-8).all()
    for step in torch.eye(space.d, dtype=torch.float64):
        more = members + step
        inside = (more <= space.bounds[1]).all(-1)
        assert (~inside | (space.share(more.minimum(space.bounds[1])) > share)).all()


def test_steps_that_break_a_limit_are_left_to_others(prices: Prices) -> None:
    limit = 0.4 * float(prices.space.cost("kv_bytes", prices.space.bounds[1]))
    limited = replace(prices, space=replace(prices.space, limits={"kv_bytes": limit}))
    members = limited.members(random_theta(20), torch.tensor([0.6], dtype=torch.float64))
    assert (limited.space.cost("kv_bytes", members) <= limit).all()
    assert (limited.space.share(members) > 0.55).all()


def test_many_at_once_are_what_each_is_alone(prices: Prices) -> None:
    theta, share = random_theta(6), torch.tensor([0.4, 0.8], dtype=torch.float64)
    alone = [[prices.members(row[None], one[None])[0, 0] for one in share] for row in theta]
    assert torch.equal(prices.members(theta, share), torch.stack([torch.stack(row) for row in alone]))


def test_prices_never_rise_within_a_block(prices: Prices) -> None:
    found = prices.log_prices(random_theta(20), torch.tensor([0.4, 0.9], dtype=torch.float64))
    assert (found[..., 1:] <= found[..., :-1]).all()


@pytest.mark.parametrize("name", [name for name in BOUNDS if name != "width_exchanges"])
def test_every_number_does_what_it_says(prices: Prices, name: str) -> None:
    """It moves prices; one by size does so for small models as its namesake does, and not at the neutral share."""
    space = prices.space
    corrections = torch.stack([torch.linspace(-1, 1, space.d, dtype=torch.float64), torch.zeros(space.d)])
    prices = replace(prices, anchors=torch.tensor([0.5, 1.0], dtype=torch.float64), corrections=corrections)
    shares = torch.tensor([NEUTRAL, 0.5], dtype=torch.float64)

    def at(**numbers: float) -> Tensor:
        theta = AllocationRecipe.of(numbers).theta
        return prices.log_prices(theta[None], shares)[0]

    default, raised = at(), at(**{name: getattr(DENSE_PRICES, name) + 0.2})
    changed = (~torch.isclose(default, raised)).flatten(1).any(-1).tolist()
    if named := name.removesuffix("_by_size") if name.endswith("_by_size") else "":
        assert changed == [False, True]
        torch.testing.assert_close(raised[1], at(**{named: getattr(DENSE_PRICES, named) + 0.1})[1])
    else:
        assert changed == [True, True]


def test_width_is_exchanged_as_far_as_a_recipe_says_and_less_towards_the_dense_model(prices: Prices) -> None:
    space = prices.space
    give = torch.zeros(space.d, dtype=torch.float64)
    give[-1], give[-2] = 2.0, -2.0
    exchanges, nothing = torch.stack([give, 0 * give]), torch.zeros(2, space.d, dtype=torch.float64)
    known = replace(
        prices, anchors=torch.tensor([0.5, 1.0], dtype=torch.float64), corrections=nothing, exchanges=exchanges
    )
    shares = torch.tensor([0.5, 0.75], dtype=torch.float64)
    for weight in (0.0, 0.5, 1.0):
        theta = replace(DENSE_PRICES, width_exchanges=weight).theta[None]
        plain, moved = prices.members(theta, shares)[0], known.members(theta, shares)[0]
        offsets = weight * (2 - 2 * space.share(plain)).clamp(max=1)[:, None] * give
        torch.testing.assert_close(moved, (plain + offsets).round().clamp(*space.bounds), rtol=0, atol=0)
    assert not torch.equal(moved, plain)  # else this would say nothing


def test_what_is_dearer_at_pruned_members_keeps_more(prices: Prices) -> None:
    space = prices.space
    block, half = torch.eye(space.d, dtype=torch.float64)[-1], torch.tensor([0.5], dtype=torch.float64)
    found = replace(
        prices, anchors=torch.tensor([0.5, 1.0], dtype=torch.float64), corrections=torch.stack([9 * block, 0 * block])
    )
    plain, corrected = (AllocationRecipe.of({"pruned_members": w}).theta[None] for w in (0.0, 1.0))
    levels = [int(found.members(theta, half)[0, 0, -1]) for theta in (plain, corrected)]
    assert levels[1] == space.max_levels[-1] > levels[0]


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"fisher_wait": 0.2}, "did you mean fisher_weight"),
        ({"mlp_slope": 7}, "mlp_slope must lie between -1 and 1, got 7"),
        ({"mlp_slope": "0.2"}, "got '0.2'"),
        ({"mlp_slope": float("nan")}, "got nan"),
        ({"mlp_slope": True}, "got True"),
        ({"profile": {"mlp": [0.1, 9]}}, "profile must lie between -2 and 2, got 9"),
        ({"profile": {"mlp": [0.1, [1]]}}, r"got \[1\]"),
        ({"profile": {"mlp": [0.1], "attention": [0.1, 0.2]}}, "as many numbers as there are layers"),
        ({"profile": {"mlp": 0.1}}, "must be lists"),
        ({"profile": {"mpl": [0.1]}}, '"attention": '),
        ({"profile": [0.1]}, '"attention": '),
    ],
)
def test_a_bad_number_is_named(numbers: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AllocationRecipe.of(numbers)


def test_a_profile_makes_its_blocks_dearer_alone_or_among_many(prices: Prices) -> None:
    """As the polynomial that it spells out does, and block by block; a wrong length is refused before anything is computed."""
    L, share = prices.space.num_layers, torch.tensor([0.4, 0.7], dtype=torch.float64)
    depth = torch.linspace(-1, 1, L, dtype=torch.float64)
    spelled = AllocationRecipe.of({"profile": {"mlp": (0.4 * depth).tolist()}})
    sloped = AllocationRecipe.of({"mlp_slope": 0.4})
    torch.testing.assert_close(prices.path(spelled), prices.path(sloped))
    theta = torch.stack([sloped.theta, DENSE_PRICES.theta, spelled.theta])
    bonus = torch.stack([recipe.bonus(L) for recipe in (sloped, DENSE_PRICES, spelled)])
    members = prices.members(theta, share, bonus)
    torch.testing.assert_close(members[2], members[0])
    assert not torch.equal(members[1], members[0])
    dear = torch.eye(2 * L, dtype=torch.float64)[[0, L]] * LARGEST_BONUS
    for block, row in zip((0, L), prices.members(theta[[1, 1]], share, dear), strict=True):
        assert (row[:, block] >= members[1, :, block]).all()
        assert (row - members[1]).abs().sum() > 0
    with pytest.raises(ConfigError, match="2 numbers for each kind, the model has 5 layers"):
        prices.path(AllocationRecipe.of({"profile": {"attention": [0.1, 0.2]}}))


def test_numbers_survive_being_written_and_clamped() -> None:
    low, high = bounds()
    recipe = AllocationRecipe.clamped(random_theta(1)[0])
    assert AllocationRecipe.of(recipe.to_dict()) == recipe and torch.equal(recipe.theta, random_theta(1)[0])
    own = AllocationRecipe.clamped(recipe.theta, torch.tensor([0.5, -9.0]))
    assert own.profile == (0.5, -LARGEST_BONUS) and AllocationRecipe.of(json.loads(json.dumps(own.to_dict()))) == own
    assert AllocationRecipe.clamped(recipe.theta, torch.zeros(2)) == recipe
    assert torch.equal(AllocationRecipe.clamped(high + 1).theta, high) and torch.equal(
        AllocationRecipe.clamped(low - 1).theta, low
    )
