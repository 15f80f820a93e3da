"""The refitted weight of every width is the closed-form least-squares one, however the cache behaves.

W: dense output weight, columns sorted by the ranking.   K, D: kept and removed columns.   G: E[z zT], columns alike. A bias is the
first column of W, kept whatever leaves; its z is 1.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.block import Block, BlockKind, expand_units
from pruning.compensation import CompensationTable, Ridge, factor_values, solved_values
from pruning.masks import Ranking
from pruning.projection import matrix_of
from pruning.statistics import Statistics, collect_statistics

RIDGES = pytest.mark.parametrize("ridge", [Ridge(0.03), Ridge(0.03, per_column=False)], ids=["column", "mean"])
ONE_FAMILY = pytest.mark.parametrize("model", ["llama-biased"], indirect=True)


class Projection(NamedTuple):
    """One output projection with its columns in ranking order."""

    layer: int
    block: Block
    weight: Tensor  # hidden_size x C
    gram: Tensor  # C x C
    damping: Tensor  # C
    biased: bool

    def refitted(self, table: CompensationTable, units: int) -> Tensor:
        """`hidden_size x K` of the table's."""
        weight, bias = (of(self.layer, self.block, units) for of in (table.weight, table.bias))
        assert weight is not None and (bias is not None) == self.biased
        return weight if bias is None else torch.cat([bias[:, None], weight], dim=1)

    def error(self, refitted: Tensor) -> float:
        """E|W z - V z_K|^2 of a `hidden_size x K` weight V."""
        difference = self.weight.clone()
        difference[:, : refitted.shape[1]] -= refitted
        return float((difference @ self.gram * difference).sum())

    def regularised_error(self, refitted: Tensor) -> float:
        kept = self.weight[:, : refitted.shape[1]]
        damping = self.damping[: refitted.shape[1]]
        return self.error(refitted) + float((damping * (refitted - kept).square()).sum())


@pytest.fixture
def ranking(anatomy: Anatomy, random_ranking: Callable[[Anatomy, int], Ranking]) -> Ranking:
    return random_ranking(anatomy, 0)


@pytest.fixture
def statistics(model: PreTrainedModel, windows: Tensor) -> Statistics:
    return collect_statistics(model, windows)


@pytest.fixture
def ridge() -> Ridge:
    return Ridge(0.03)


@pytest.fixture
def projections(
    model: PreTrainedModel, anatomy: Anatomy, statistics: Statistics, ranking: Ranking, ridge: Ridge
) -> list[Projection]:
    """Everything the closed form needs, in float64; taken before the table frees the Gram matrices."""
    found = []
    for block in anatomy.blocks:
        for index, layer in enumerate(anatomy.layers_of(model)):
            gram = statistics.blocks[block.kind].gram[index].double() / statistics.num_tokens
            order = ranking.columns(index, block).tolist()
            weight = matrix_of(block.output_of(layer)).detach().clone()
            diagonal = gram.diagonal()[order]
            damping = ridge.share * (diagonal if ridge.per_column else diagonal.mean().expand(len(order)))
            weight, gram, bias = weight[:, order], gram[order][:, order], block.output_of(layer).bias
            if bias is not None:
                mean = (statistics.blocks[block.kind].total[index].double() / statistics.num_tokens)[order]
                gram = torch.cat([torch.cat([mean.new_ones(1), mean])[None], torch.cat([mean[:, None], gram], 1)])
                weight = torch.cat([bias.detach()[:, None], weight], dim=1)
                damping = torch.cat([damping.new_zeros(1), damping])
            found.append(Projection(index, block, weight, gram, damping, bias is not None))
    return found


@pytest.fixture
def table(
    model: PreTrainedModel, statistics: Statistics, ranking: Ranking, projections: list[Projection], ridge: Ridge
) -> CompensationTable:
    return CompensationTable(model, statistics, ranking, ridge)


def every_width(projections: list[Projection]) -> Iterator[tuple[Projection, int]]:
    return ((projection, units) for projection in projections for units in range(1, projection.block.units + 1))


@RIDGES
def test_every_width_is_the_closed_form(table: CompensationTable, projections: list[Projection]) -> None:
    for projection, units in every_width(projections):
        kept = projection.biased + units * projection.block.columns_per_unit
        gram, weight = projection.gram, projection.weight
        system = gram[:kept, :kept] + projection.damping[:kept].clamp_min(1e-30).diag()
        expected = weight[:, :kept] + weight[:, kept:] @ torch.linalg.solve(system, gram[:kept, kept:]).T
        found = projection.refitted(table, units)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)  # factors are float32
        if units == projection.block.units:
            torch.testing.assert_close(found, weight, rtol=0, atol=1e-4)


def test_a_refit_never_hurts_and_is_the_optimum(table: CompensationTable, projections: list[Projection]) -> None:
    rng = torch.Generator().manual_seed(0)
    helped = []
    for projection, units in every_width(projections):
        refitted = projection.refitted(table, units)
        plain = projection.weight[:, : refitted.shape[1]]
        best, slack = projection.regularised_error(refitted), 1e-6 * projection.error(plain[:, :0])
        assert best <= projection.error(plain) + slack  # without refit the ridge costs nothing
        assert projection.error(refitted) <= projection.error(plain) + slack
        step = 0.01 * torch.randn(refitted.shape, generator=rng, dtype=torch.double)
        assert projection.regularised_error(refitted + step) > best
        helped.append(projection.error(refitted) < 0.9 * projection.error(plain))
    assert sum(helped) > len(helped) / 2


def test_the_error_falls_with_width(table: CompensationTable, projections: list[Projection]) -> None:
    """In the norm of G + ridge I, where every narrower refit, padded with zeros, is a wider candidate."""
    for projection in projections:
        errors = []
        for units in range(1, projection.block.units + 1):
            refitted = projection.refitted(table, units)
            removed = projection.weight[:, refitted.shape[1] :]
            lost = projection.damping[refitted.shape[1] :] * removed.square()
            errors.append(projection.regularised_error(refitted) + float(lost.sum()))
        dead = 1e-6 * errors[0]  # a unit that never speaks adds nothing
        assert all(wider < narrower + dead for narrower, wider in pairwise(errors))
        assert len({round(error, 6) for error in errors}) > len(errors) / 2
        assert abs(errors[-1]) < 1e-4 * errors[0]


@ONE_FAMILY
def test_more_ridge_stays_nearer_to_the_dense_columns(
    model: PreTrainedModel, windows: Tensor, ranking: Ranking, projections: list[Projection]
) -> None:
    ridges = (0.001, 0.03, 1.0, 1e6)
    tables = [CompensationTable(model, collect_statistics(model, windows), ranking, Ridge(ridge)) for ridge in ridges]
    for projection, units in every_width(projections):
        dense = projection.weight[:, projection.biased :][:, : units * projection.block.columns_per_unit]
        moved = [float((t.weight(projection.layer, projection.block, units) - dense).norm()) for t in tables]
        assert all(stiff <= loose + 1e-4 for loose, stiff in pairwise(moved))
        assert moved[-1] < 1e-3


@ONE_FAMILY
def test_a_projection_that_never_got_input_keeps_its_weight(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking
) -> None:
    for parameter in model.model.layers[2].mlp.up_proj.parameters():
        parameter.data.zero_()
    dense = model.model.layers[2].mlp.down_proj.weight.detach()
    table = CompensationTable(model, collect_statistics(model, windows), ranking)
    for units in (1, 12, 24):
        expected = dense[:, ranking.neurons[2, :units]]
        torch.testing.assert_close(table.weight(2, anatomy.mlp, units), expected, rtol=0, atol=1e-5)


@ONE_FAMILY
def test_collecting_and_factoring_leave_no_gradient(table: CompensationTable, projections: list[Projection]) -> None:
    assert not any(table.weight(p.layer, p.block, units).requires_grad for p, units in every_width(projections))


@ONE_FAMILY
def test_gram_matrices_are_freed(statistics: Statistics, table: CompensationTable) -> None:
    assert sum(gram.nbytes for block in statistics.blocks.values() for gram in block.gram.values()) == 0


@ONE_FAMILY
def test_the_cache_is_bounded_and_invisible(
    model: PreTrainedModel,
    windows: Tensor,
    ranking: Ranking,
    table: CompensationTable,
    projections: list[Projection],
    ridge: Ridge,
) -> None:
    bound = 3 * projections[-1].weight.nbytes  # a few of the 130 weights
    small = CompensationTable(model, collect_statistics(model, windows), ranking, ridge, cache_bytes=bound)
    seen: list[weakref.ref[Tensor]] = []
    for _ in range(2):
        for projection, units in every_width(projections):
            found = small.weight(projection.layer, projection.block, units)
            assert torch.equal(found, table.weight(projection.layer, projection.block, units))
            seen.append(weakref.ref(found))
            del found
            gc.collect(0)
            alive = {id(weight): weight.nbytes for weight in (ref() for ref in seen) if weight is not None}
            assert sum(alive.values()) <= bound
    assert sum(alive.values()) > bound / 2  # something is kept


@ONE_FAMILY
def test_the_least_recently_used_weight_leaves_first(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, ranking: Ranking
) -> None:
    bytes_per_unit = anatomy.hidden_size * 8
    table = CompensationTable(model, collect_statistics(model, windows), ranking, cache_bytes=20 * bytes_per_unit)

    def ask(units: int) -> weakref.ref[Tensor]:
        return weakref.ref(table.weight(0, anatomy.mlp, units))

    first, second = ask(9), ask(10)
    assert ask(9)() is first() is not None  # solved once
    third = ask(11)  # 9 + 10 + 11 units are too many: 10 was used longest ago
    assert first() is not None
    assert second() is None
    assert third() is not None
    largest = ask(24)  # larger than the whole bound: kept alone rather than refused
    assert largest() is not None
    assert first() is third() is None


@ONE_FAMILY
def test_filling_solves_everything_beforehand(
    table: CompensationTable, projections: list[Projection], monkeypatch: pytest.MonkeyPatch
) -> None:
    table.fill({"attention": [1, 2], "mlp": list(range(1, 25))})
    monkeypatch.setattr(torch.linalg, "solve_triangular", None)
    for projection, units in every_width(projections):
        table.weight(projection.layer, projection.block, units)


@pytest.mark.parametrize(("units", "width"), [([2, 0], 1), ([2, 0, 5], 3), ([], 4)])
def test_units_own_consecutive_columns(units: list[int], width: int) -> None:
    expected = [unit * width + offset for unit in units for offset in range(width)]
    assert expand_units(torch.tensor(units, dtype=torch.long), width).tolist() == expected


@ONE_FAMILY
def test_columns_of_a_group_are_its_heads(anatomy: Anatomy) -> None:
    group = anatomy.queries_per_group * anatomy.head_dim
    assert anatomy.attention.columns_of(torch.tensor([1])).tolist() == list(range(group, 2 * group))
    assert anatomy.mlp.columns_of(torch.tensor([7, 3])).tolist() == [7, 3]


def test_the_tables_size_follows_from_the_models(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Callable[[Anatomy, int], Ranking]
) -> None:
    ridge = Ridge(biases=False)  # a bias is one more column of a factor, which the sizes do not tell
    ranking = replace(random_ranking(anatomy, 0), heads=None)  # a factor more for every query head that groups may lack
    table = CompensationTable(model, collect_statistics(model, windows), ranking, ridge)
    widths: dict[BlockKind, list[int]] = {"attention": [1], "mlp": [5, 11, 24]}
    table.fill({"attention": [1], "mlp": [5, 11]})
    assert table.num_values == (solved_values(anatomy, widths), factor_values(anatomy))


@RIDGES
def test_float32_factors_refit_like_float64_ones_however_ill_conditioned(ridge: Ridge) -> None:
    """The ridge bounds the condition number: activations of few directions, one of them a thousand times the others."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 600,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 9,
    }
    rng = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).float()
    statistics = collect_statistics(model, torch.randint(9, (2, 8), generator=rng))
    spread = torch.logspace(0, -6, 200, dtype=torch.float64)[:, None]
    z = torch.randn(2000, 200, generator=rng, dtype=torch.float64) @ (
        spread * torch.randn(200, 600, generator=rng, dtype=torch.float64)
    )
    z[:, 7] *= 1e3
    gram = (z.T @ z).float()
    statistics.blocks["mlp"].gram[0], statistics.num_tokens = gram.clone(), len(z)
    anatomy = anatomy_of(model)
    ranking = Ranking(torch.arange(4)[None], torch.randperm(600, generator=rng)[None])
    table = CompensationTable(model, statistics, ranking, ridge)
    order = ranking.neurons[0]
    gram = (gram / len(z))[order][:, order].double()
    weight = model.model.layers[0].mlp.down_proj.weight.detach()[:, order].double()
    damping = ridge.share * (gram.diagonal() if ridge.per_column else gram.diagonal().mean().expand(600))

    def sent(weight: Tensor, kept: int) -> float:
        """Root mean square of what a weight makes of its inputs: weak columns may be off, as nobody sees them."""
        return float((weight @ gram[:kept, :kept] * weight).sum().clamp_min(0).sqrt())

    for kept in (1, 37, 300, 599):
        right = (weight @ (gram + damping.diag()))[:, :kept]
        expected = torch.linalg.solve((gram + damping.diag())[:kept, :kept], right.T).T
        found = table.weight(0, anatomy.mlp, kept).double()
        assert sent(found - expected, kept) < 1e-5 * sent(expected, kept)


def test_the_ridge_is_columns_by_tokens_of_each_columns_energy() -> None:
    gram = torch.tensor([[4.0, 1.0], [1.0, 0.5]])
    assert Ridge().of(gram, 100).tolist() == pytest.approx([2 / 100 * 4, 2 / 100 * 0.5])
    assert Ridge(times=8).of(gram, 400).tolist() == pytest.approx([8 * 2 / 400 * 4, 8 * 2 / 400 * 0.5])
