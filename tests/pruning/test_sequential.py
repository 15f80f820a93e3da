"""Refits in sequence are the least-squares fits at the pruned model's own inputs, in every family."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import Block
from pruning.compensation import CompensationTable, Ridge
from pruning.errors import InvalidArchitecture
from pruning.masks import PruningMask, Ranking
from pruning.projection import matrix_of
from pruning.sequential import refit_to_dense, sequential_refit
from pruning.shrinking import shrink
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet

RIDGE = Ridge(0.05)
ONE_FAMILY = pytest.mark.parametrize("model", ["llama-biased"], indirect=True)


@pytest.fixture
def text() -> Tensor:
    """`40 x 10` token ids."""
    return torch.randint(97, (40, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def ranking(anatomy: Anatomy, random_ranking: Callable[[Anatomy, int], Ranking]) -> Ranking:
    return random_ranking(anatomy, 0)


@pytest.fixture
def supernet(model: PreTrainedModel, ranking: Ranking) -> Iterator[Supernet]:
    with Supernet(model, ranking) as opened:
        yield opened


@pytest.fixture
def architecture(anatomy: Anatomy) -> Architecture:
    """Every kind of layer: narrow, without attention, dense, without MLP."""
    return Architecture((1, 0, anatomy.num_key_value_heads, 1, 1), (11, 5, 24, 0, 17))


class Seen:
    """What passes a block of a running model: `z`, the output projection's result `y`, the layer's input and output, all `tokens x`."""

    def __init__(self, model: PreTrainedModel, layer: nn.Module, block: Block, text: Tensor, scale: float) -> None:
        output = block.output_of(layer)
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(
                module: nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...] | None = None
            ) -> None:
                value = args[0] if result is None else result if isinstance(result, Tensor) else result[0]
                seen[name] = value.detach().flatten(0, -2)

            return hook

        with ExitStack() as stack, torch.no_grad():
            for handle in (
                output.register_forward_pre_hook(keep("z")),
                output.register_forward_hook(keep("y")),
                block.update_of(layer).register_forward_hook(keep("update")),
                block.entrance_of(layer).register_forward_pre_hook(keep("norm")),
                layer.register_forward_hook(keep("after")),
            ):
                stack.callback(handle.remove)
            model(text, use_cache=False)
        self.z, self.y, self.update = seen["z"], seen["y"], seen["update"]
        # attention adds to what enters the layer, the MLP comes last; in a parallel layer the two have one norm's input
        self.before = seen["norm"] if block.kind == "attention" else seen["after"] - scale * seen["update"]


def narrowed(architecture: Architecture, anatomy: Anatomy) -> list[tuple[int, Block, int]]:
    return [
        (index, block, units)
        for index in range(anatomy.num_hidden_layers)
        for block in anatomy.blocks
        if 0 < (units := architecture.units(block.kind)[index]) < block.units
    ]


@pytest.mark.parametrize(
    "model",
    ["llama", "gemma2", "phi3", "gpt-neox", "gpt-neox-sequential", "gpt2", "opt", "cohere2", "granite", "exaone4"],
    indirect=True,
)
def test_every_block_is_the_least_squares_fit_at_the_pruned_models_inputs(
    supernet: Supernet, anatomy: Anatomy, architecture: Architecture, text: Tensor
) -> None:
    refits = sequential_refit(supernet, architecture, text, RIDGE, batch_size=16)
    blocks = narrowed(architecture, anatomy)
    scale = anatomy.residual_scale
    assert len(blocks) == 6
    for index, block, units in blocks:
        layer = anatomy.layers_of(supernet.model)[index]
        dense = Seen(supernet.model, layer, block, text, scale)
        with supernet.using(refits).active(architecture) as model:
            pruned = Seen(model, layer, block, text, scale)
        target = dense.y if block.places.post_norm else dense.y + (dense.before - pruned.before) / scale
        output = supernet.output_of(index, block)
        anchor, z = matrix_of(output)[:, : units * block.columns_per_unit].detach().T, pruned.z
        damping = (RIDGE.share * z.square().mean(0) * len(z)).sqrt().clamp_min(1e-6)  # type: ignore[operator]  # ReLU leaves units dead
        if output.bias is not None:
            anchor = torch.cat([output.bias.detach()[None], anchor])
            z, damping = torch.cat([torch.ones(len(z), 1), z], dim=1), torch.cat([torch.zeros(1), damping])
        rows, goals = torch.cat([z, damping.diag()]), torch.cat([target, damping[:, None] * anchor])
        expected = torch.linalg.lstsq(rows, goals, driver="gelsd").solution.T
        found = refits.weight(index, block, units)
        if (bias := refits.bias(index, block, units)) is not None:
            found = torch.cat([bias[:, None], found], dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_where_nothing_was_removed_before_it_is_the_tables_closed_form(
    model: PreTrainedModel, anatomy: Anatomy, ranking: Ranking, text: Tensor
) -> None:
    full = Architecture.full(anatomy)
    table = CompensationTable(model, collect_statistics(model, text, scored=0), ranking, RIDGE)
    with Supernet(model, ranking) as supernet:
        for block, units, name in ((anatomy.attention, 1, "kv_groups"), (anatomy.mlp, 7, "neurons")):
            widths = list(full.units(block.kind))
            widths[2] = units
            refits = sequential_refit(supernet, replace(full, **{name: tuple(widths)}), text, RIDGE)
            expected = table.weight(2, block, units)
            torch.testing.assert_close(refits.weight(2, block, units), expected, rtol=0, atol=1e-4)
            if (bias := table.bias(2, block, units)) is not None:
                torch.testing.assert_close(refits.bias(2, block, units), bias, rtol=0, atol=1e-4)


def test_the_refitted_supernet_is_the_shrunken_model(
    model: PreTrainedModel,
    ranking: Ranking,
    architecture: Architecture,
    text: Tensor,
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
) -> None:
    with Supernet(model, ranking) as supernet:
        refits = sequential_refit(supernet, architecture, text, RIDGE)
        with supernet.using(refits).active(architecture):
            expected = logits(model, text[:3])
    small = shrink(model, PruningMask.from_architecture(architecture, ranking), refits)
    torch.testing.assert_close(logits(small, text[:3]), expected, rtol=0, atol=1e-9)


@ONE_FAMILY
def test_a_model_that_is_brought_layer_by_layer_gets_the_same_refits(
    model: PreTrainedModel, ranking: Ranking, architecture: Architecture, text: Tensor, anatomy: Anatomy
) -> None:
    seen: list[int] = []
    with Supernet(model, ranking) as supernet:
        refits = sequential_refit(supernet, architecture, text, RIDGE, batch_size=40)
    with Supernet(model, ranking, resident=False) as supernet:
        brought = sequential_refit(supernet, architecture, text, RIDGE, batch_size=7, on_layer=seen.append)
    assert seen == [1, 2, 3, 4, 5]
    for index, block, units in narrowed(architecture, anatomy):
        torch.testing.assert_close(brought.weight(index, block, units), refits.weight(index, block, units))


@ONE_FAMILY
def test_fitting_leaves_the_model_and_refuses_other_widths(
    model: PreTrainedModel,
    ranking: Ranking,
    anatomy: Anatomy,
    architecture: Architecture,
    text: Tensor,
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:
    with unchanged(model), Supernet(model, ranking) as supernet:
        refits = sequential_refit(supernet, architecture, text, RIDGE)
    assert not refits.weight(0, anatomy.mlp, 11).requires_grad
    with pytest.raises(InvalidArchitecture, match=r"Layer 0 has no refit for 10 units of mlp.*expected 11"):
        refits.weight(0, anatomy.mlp, 10)
    with pytest.raises(InvalidArchitecture, match=r"Layer 3 has no refit for 5 units of mlp.*expected none"):
        refits.bias(3, anatomy.mlp, 5)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_a_trained_model_loses_less_than_with_refits_at_the_dense_models_inputs(
    name: str,
    trained: Callable[[str], PreTrainedModel],
    prose: Callable[[int, int], Tensor],
    random_ranking: Callable[[Anatomy, int], Ranking],
) -> None:
    model = trained(name)
    anatomy, windows, unseen = anatomy_of(model), prose(64, 1000), prose(32, 2000)
    ranking = random_ranking(anatomy, 0)
    table = CompensationTable(model, collect_statistics(model, windows, scored=0), ranking)
    groups = anatomy.num_key_value_heads
    architecture = Architecture((groups, groups // 2, groups, groups // 2, groups), (16, 10, 12, 10, 12))
    with Supernet(model, ranking, table) as supernet:
        dense = supernet.distribution(unseen)
        refits = sequential_refit(supernet, architecture, windows)
        plain = supernet.quality(architecture, unseen, dense).kl
        sequential = supernet.using(refits).quality(architecture, unseen, dense).kl
    assert sequential is not None and plain is not None and sequential < 0.97 * plain


@ONE_FAMILY
def test_what_was_cut_is_refitted_as_the_supernet_would_be(
    model: PreTrainedModel, ranking: Ranking, text: Tensor
) -> None:
    architecture = Architecture(
        (1, 0, 1, 1, 1), (11, 5, 9, 0, 17)
    )  # without whole blocks, which that leaves as they are
    with Supernet(model, ranking) as supernet:
        refits = sequential_refit(supernet, architecture, text, RIDGE)
    mask = PruningMask.from_architecture(architecture, ranking)
    expected, small = shrink(model, mask, refits), shrink(model, mask)
    refit_to_dense(small, model, architecture, text, RIDGE)
    for (name, one), other in zip(expected.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(other, one, msg=name)
    before = {name: weight.clone() for name, weight in small.named_parameters()}
    refit_to_dense(small, model, architecture, text, Ridge(1e9))  # drawn to what they are by then
    for name, weight in small.named_parameters():
        torch.testing.assert_close(weight, before[name], msg=name)
