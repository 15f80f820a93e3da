"""A prepared problem on a real, if tiny, model: how the path is priced and corrected, and that its expansions foretell what is measured."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmbo.config import RunConfig
from llmbo.display.console import Console
from llmbo.display.progress import Display, Silence
from llmbo.models.loading import LoadedModel, load_model
from llmbo.problem.exchanges import with_exchanges
from llmbo.problem.expansion import ONE_LEVEL, STEPS, best_exchanges
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.method import DEFAULT, Method
from llmbo.problem.preparation import Problem, prepared
from llmbo.problem.prices import block_marginal_costs, unit_marginal_costs
from llmbo.problem.proxy import ProxyEvaluator
from llmbo.problem.recipe import DEFAULT_RECIPE, DENSE_PRICES, AllocationRecipe
from llmbo.problem.texts import load_windows
from pruning.block import BlockKind
from pruning.calibration import TokenWindows
from pruning.exchanges import exchange_costs
from pruning.importance import fisher
from pruning.likelihood import dense_distribution
from pruning.sensitivity import block_sensitivity
from pruning.statistics import collect_statistics


@dataclass(frozen=True)
class Opened:
    """A problem, and what its preparation measures, measured again."""

    config: RunConfig
    loaded: LoadedModel
    problem: Problem
    windows: Tensor
    sensitivity: dict[BlockKind, Tensor]

    def moved(self, method: Method = DEFAULT) -> ThresholdFamily:
        def measured(
            name: str, like: dict[str, Tensor], measure: Callable[[torch.Generator], dict[str, Tensor]]
        ) -> dict[str, Tensor]:
            found = measure(torch.Generator().manual_seed(0))
            assert {key: (p.shape, p.dtype) for key, p in found.items()} == {
                key: (p.shape, p.dtype) for key, p in like.items()
            }
            return found

        assert self.problem.family.prices is not None
        parts = self.problem.threshold_family, self.problem.family.prices, self.problem.supernet, self.windows
        method = replace(method, allocation=DENSE_PRICES)
        return with_exchanges(*parts, self.sensitivity, measured, lambda done: None, method)

    def orders(self) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
        """Every anchor, and first and second order of every block's `STEPS` from there, `d x steps` each."""
        space, supernet = self.problem.space, self.problem.supernet
        family, dense = self.problem.threshold_family, dense_distribution(supernet.model, self.windows)
        low = float(family.shares[0])
        for part in DEFAULT.anchors:
            x = family.at(low + (1 - low) * part)
            widths, generator = space.neighbouring_widths(x, STEPS), torch.Generator().manual_seed(0)
            costs, _ = exchange_costs(supernet, space.decode(x), widths, self.windows, dense, generator)
            first, second = torch.cat([costs[block.kind] for block in space.anatomy.blocks]).double().unbind(-1)
            yield x, first, second


@pytest.fixture(scope="module")
def opened(model_folder: Path, text_file: Path) -> Iterator[Opened]:
    config = RunConfig(
        model=str(model_folder), text=f"text:{text_file}", window=16, calibration_tokens=640, proxy_tokens=64,
        heldout_tokens=64, dtype="float32", device="cpu", min_share=0.2,
        recipe_search=True, recipe="dense-prices",
    )  # fmt: skip
    loaded = load_model(config.model, config.dtype, config.device)
    windows: TokenWindows = load_windows(config, loaded)
    with prepared(config, loaded, windows, Display(Console(), 0, view=Silence())) as problem:
        some = windows.calibration[: len(windows.calibration) // 4]
        generator = torch.Generator().manual_seed(config.seed)
        sensitivity = block_sensitivity(problem.supernet, some, problem.space.widths, generator)
        yield Opened(config, loaded, problem, some, sensitivity)


def test_the_path_is_priced_by_units_and_by_whole_blocks(
    opened: Opened, geometric_mean: Callable[..., list[list[float]]]
) -> None:
    problem, model = opened.problem, opened.loaded.model
    statistics = collect_statistics(model, problem.windows.calibration)
    importance = fisher(statistics)
    units = unit_marginal_costs(problem.space, importance)
    blocks = block_marginal_costs(problem.space, opened.sensitivity)
    both, by_units, by_blocks = (
        ThresholdFamily.from_marginal_costs(problem.space, costs, importance).path
        for costs in (geometric_mean(units, blocks), units, blocks)
    )
    assert torch.equal(problem.threshold_family.path, both)
    assert not torch.equal(both, by_units) and not torch.equal(both, by_blocks)  # else this would say nothing


def test_both_paths_are_what_their_own_prices_and_recipe_make(opened: Opened) -> None:
    """So recipes are tried around either, and the one before width exchanges knows of none."""
    moved, plain = opened.problem.family, opened.problem.threshold_family
    assert not torch.equal(moved.path, plain.path)  # else this would say nothing
    for family in (moved, plain):
        assert family.prices is not None
        assert torch.equal(family.prices.path(family.recipe), family.path)


SIZES = torch.linspace(0.25, 0.99, 40, dtype=torch.float64)
RISE = 1.25  # of KL on a few windows of a tiny model, whose noise that is


@pytest.mark.parametrize("recipe", [DENSE_PRICES, DEFAULT_RECIPE])
def test_a_path_gets_better_with_size_within_noise(opened: Opened, recipe: AllocationRecipe) -> None:
    """At forty sizes; models of the same sizes that are each allocated otherwise do not."""
    problem = opened.problem

    def highest_rise(rows: Tensor) -> float:
        """The most that a model is worse than a smaller one, as a factor."""
        found = problem.heldout().evaluate([tuple(row) for row in rows.int().tolist()])
        kl = torch.tensor([values["kl"] for values in found], dtype=torch.float64)
        return float((kl[1:] / kl.cummin(0).values[:-1]).max())

    path = problem.prices.members_of(recipe, SIZES)
    assert highest_rise(path) < RISE
    bonus = 2 * torch.rand(len(SIZES), problem.space.d, generator=torch.Generator().manual_seed(0)).double() - 1
    theta = recipe.theta[None].expand(len(SIZES), -1)
    others = problem.prices.members(theta, SIZES, 2 * bonus)[range(len(SIZES)), range(len(SIZES))]
    assert highest_rise(others) > 1.5 * RISE


def test_a_member_is_as_large_as_asked_for_within_a_level_and_exchanges_move_it_by_another(opened: Opened) -> None:
    problem = opened.problem
    level = float(problem.prices.shares[-1, 1])  # of an MLP; its first carries the norm as well
    for recipe in (DENSE_PRICES, DEFAULT_RECIPE):
        bare, own = (problem.prices.members_of(r, SIZES) for r in (recipe.bare, recipe))
        less = SIZES - problem.space.share(bare)
        assert (less >= -1e-9).all() and (less < level).all()
        assert not torch.equal(bare, own)  # else this would say nothing of exchanges
        assert ((problem.space.share(own) - problem.space.share(bare)).abs() <= 1.01 * level).all()


@pytest.mark.parametrize("weight", [0.7, 1.0])
def test_anchors_take_the_exchanges_that_pay_by_both_orders_up_and_down(opened: Opened, weight: float) -> None:
    """Narrowing and widening each have a price of their own; the weight of the second order and the anchors are the method's."""
    moved = opened.moved(replace(DEFAULT, second_order=weight))
    rows, exchanges = {tuple(row) for row in moved.path.int().tolist()}, []
    for x, first, second in opened.orders():
        exchanges.append(best_exchanges(opened.problem.space, x, (first + weight * second)[:, ONE_LEVEL]))
        assert tuple((torch.tensor(x) + exchanges[-1]).int().tolist()) in rows, x
    assert any(bool(exchange.any()) for exchange in exchanges)  # else this would say nothing


def test_nothing_is_exchanged_without_anchors_or_where_the_second_order_weighs_all(opened: Opened) -> None:
    path = opened.problem.threshold_family.path

    def exchanged(**constants: object) -> int:
        moved = {tuple(row) for row in opened.moved(replace(DEFAULT, **constants)).path.int().tolist()}
        return len(moved - {tuple(row) for row in path.int().tolist()})

    assert exchanged(second_order=0.7) > 0
    assert exchanged(second_order=1e6) == 0
    assert exchanged(second_order=0.7, anchors=()) == 0


def test_expansions_foretell_what_a_level_changes_and_slopes_alone_do_not(opened: Opened) -> None:
    """Against the KL measured a level down and up of every block at every anchor, on the windows of the expansion."""
    problem, space, found = opened.problem, opened.problem.space, opened.moved().expansions
    evaluator = ProxyEvaluator.on(opened.windows, space, problem.supernet)
    assert found is not None
    rows: list[tuple[int, float, float, float]] = []
    for number, (x, slopes, _) in enumerate(opened.orders()):
        here = evaluator.evaluate([x])[0]["kl"]
        for block, column in itertools.product(range(space.d), ONE_LEVEL):
            there = (*x[:block], x[block] + STEPS[column], *x[block + 1 :])
            if 0 <= there[block] <= space.max_levels[block]:
                foretold = found.changes_at(torch.tensor([there], dtype=torch.float64))[0, number]
                change = evaluator.evaluate([there])[0]["kl"] - here
                rows.append((STEPS[column], change, float(foretold), float(slopes[block, column])))
    step, change, foretold, slope = torch.tensor(rows, dtype=torch.float64).T
    assert (foretold - change).square().mean() < 0.5 * (slope - change).square().mean()
    down = step < 0
    assert change[down].sum() / 2 < foretold[down].sum() < 2 * change[down].sum()
    assert slope[down].sum() < change[down].sum() / 2  # else this would say nothing of the second order
