"""What another width of one block is said to change equals direct computation at the pruned model, and asking leaves no trace.

And it is what KL truly changes by, in sign and order of magnitude, on models that were trained: see `trained`.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.compensation import CompensationTable
from pruning.exchanges import exchange_costs
from pruning.importance import activation
from pruning.likelihood import DenseDistribution, dense_distribution
from pruning.masks import Ranking
from pruning.sensitivity import block_sensitivity
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet

Draw = Callable[[Anatomy, int], Ranking]
FAMILIES = [
    "llama",
    "gemma2",
    "gpt-neox",
    "gpt2",
    "opt",
    "granite",
]  # each adds to the residual stream in a way of its own


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def opened(model: PreTrainedModel, windows: Tensor, ranking: Ranking, compensated: bool) -> Supernet:
    table = CompensationTable(model, collect_statistics(model, windows), ranking) if compensated else None
    return Supernet(model, ranking, table)


def all_widths(anatomy: Anatomy) -> dict[BlockKind, Tensor]:
    """Every width of every block."""
    return {block.kind: torch.arange(block.units + 1).repeat(anatomy.num_hidden_layers, 1) for block in anatomy.blocks}


def pruned(anatomy: Anatomy) -> Architecture:
    """Some of everything: a layer without attention, one without neurons, one whole."""
    groups = [anatomy.num_key_value_heads] * anatomy.num_hidden_layers
    neurons = [anatomy.intermediate_size // 2] * anatomy.num_hidden_layers
    groups[0], neurons[0] = 0, anatomy.intermediate_size
    if anatomy.num_hidden_layers > 2:
        groups[2], neurons[1] = 1, 0
    return Architecture(tuple(groups), tuple(neurons))


@pytest.mark.parametrize("compensated", [False, True])
def test_first_orders_are_derivatives_of_the_divergence(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw, compensated: bool
) -> None:
    """Blocks are blended from their own output towards that of the other width; autograd says what the first bit changes."""
    architecture, widths = pruned(anatomy), all_widths(anatomy)
    dense = dense_distribution(model, windows, k=8)
    with opened(model, windows, random_ranking(anatomy, 2), compensated) as supernet:
        found, kl = exchange_costs(supernet, architecture, widths, windows, dense, generator())
        torch.testing.assert_close(kl, supernet.qualities([architecture], windows, dense)[0].kl, rtol=1e-6, atol=1e-9)
        for block in anatomy.blocks:
            assert found[block.kind].shape == (*widths[block.kind].shape, 2)
            for layer, own in enumerate(architecture.units(block.kind)):
                assert not found[block.kind][layer, own].any()  # staying costs nothing
                others = [units for units in range(block.units + 1) if units != own]
                changed = found[block.kind][layer, others, 1] > 0  # but by dead units of a ReLU
                assert changed.sum() >= len(others) / 2
        index = min(1, anatomy.num_hidden_layers - 1)
        block = anatomy.blocks[1]
        own, other = architecture.units("mlp")[index], anatomy.intermediate_size
        expected = blended(supernet, architecture, index, own, other, windows, dense)
    assert float(found[block.kind][index, other, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-7)


def blended(
    supernet: Supernet,
    architecture: Architecture,
    index: int,
    own: int,
    other: int,
    windows: Tensor,
    dense: DenseDistribution,
) -> float:
    """d KL / d t of an MLP that adds (1 - t) own + t other to the residual stream, at t = 0."""
    block = next(block for block in supernet.anatomy.blocks if block.kind == "mlp")
    widest = Architecture(
        architecture.kv_groups,
        tuple(max(own, other) if layer == index else units for layer, units in enumerate(architecture.neurons)),
    )
    dense_layer = supernet.anatomy.layers_of(supernet.model)[index]
    bias, norm = block.output_of(dense_layer).bias, block.update_of(dense_layer)
    weights = {units: supernet.output_weight(index, block, units) for units in (own, other) if units}
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    inputs: list[Tensor] = []

    def blend(module: object, args: tuple[Tensor], output: Tensor) -> Tensor:
        def of(units: int) -> Tensor:
            if not units:
                return torch.zeros_like(output)
            y = inputs[0][..., : units * block.columns_per_unit] @ weights[units].T
            y = y if bias is None else y + bias
            return norm.forward(y) if block.places.post_norm else y

        return (1 - t) * of(own) + t * of(other)

    with supernet.active(widest) as model, torch.enable_grad():
        kept = [layer for layer in range(supernet.anatomy.num_hidden_layers) if widest.keeps_layer(layer)]
        layer = supernet.anatomy.layers_of(model)[kept.index(index)]
        handles = [
            block.output_of(layer).register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
            block.update_of(layer).register_forward_hook(blend),
        ]
        logits = model(windows, use_cache=False).logits[:, :-1]
        for handle in handles:
            handle.remove()
        ids, top, others = dense.top_ids.clone(), dense.top_logprobs.clone(), dense.rest_logprobs.clone()
        logprobs = logits.log_softmax(-1).gather(-1, ids)
        rest = torch.log(1 - logprobs.exp().sum(-1))
        kl = (top.exp() * (top - logprobs)).sum(-1) + others.exp() * (others - rest)
        (slope,) = torch.autograd.grad(kl.mean(), t)
    return float(slope)


def around(anatomy: Anatomy) -> tuple[Architecture, dict[BlockKind, Tensor]]:
    """A model of about half its size, one attention and one MLP dropped, and the widths near to each block's own, nothing among them.

    The first layer stays as it is: all models live by it, and no expansion sees so far.
    """
    layers, groups, neurons = anatomy.num_hidden_layers, anatomy.num_key_value_heads, anatomy.intermediate_size
    kept_groups, kept_neurons = [max(1, groups // 2)] * layers, [neurons // 3] * layers
    kept_groups[3] = kept_neurons[2] = 0
    near = torch.tensor([[-2, -1, 1, 2]])
    groups_tried = torch.tensor(kept_groups)[:, None] + near
    neurons_tried = torch.tensor(kept_neurons)[:, None] + neurons // 12 * torch.cat(
        [near, near.new_tensor([[-99]])], -1
    )
    kept_groups[0], kept_neurons[0] = groups, neurons
    groups_tried[0], neurons_tried[0] = groups, neurons
    return Architecture(tuple(kept_groups), tuple(kept_neurons)), {
        "attention": groups_tried.clamp(0, groups), "mlp": neurons_tried.clamp(0, neurons),
    }  # fmt: skip


def true_changes(
    supernet: Supernet,
    architecture: Architecture,
    widths: dict[BlockKind, Tensor],
    windows: Tensor,
    dense: DenseDistribution,
) -> dict[BlockKind, Tensor]:
    """What KL really changes by, measured width by width."""

    @functools.cache
    def kl(groups: tuple[int, ...], neurons: tuple[int, ...]) -> float:
        return supernet.quality(Architecture(groups, neurons), windows, dense, len(windows)).kl or 0.0

    def change(kind: BlockKind, layer: int, units: int) -> float:
        kept = {"attention": list(architecture.kv_groups), "mlp": list(architecture.neurons)}
        kept[kind][layer] = units
        return kl(*map(tuple, kept.values())) - kl(architecture.kv_groups, architecture.neurons)

    return {
        kind: torch.tensor([[change(kind, layer, units) for units in row] for layer, row in enumerate(rows.tolist())])
        for kind, rows in widths.items()
    }


def compare(expected: dict[BlockKind, Tensor], true: dict[BlockKind, Tensor]) -> tuple[float, Tensor]:
    """Spearman's correlation of all changes, and the ratios of those that are not small, dropped blocks among them."""
    a, b = (torch.cat([changes[kind].flatten() for kind in ("attention", "mlp")]) for changes in (expected, true))
    a, b = a[b != 0], b[b != 0]
    return float(spearmanr(a, b).statistic), (a / b)[b.abs() > 0.2 * b.abs().max()]


@pytest.mark.parametrize("family", FAMILIES)
def test_on_trained_models_expansions_tell_sign_and_size_of_the_true_change(
    trained: Callable[[str], PreTrainedModel], prose: Callable[[int, int], Tensor], family: str
) -> None:
    """And so does block sensitivity at the dense model. Second order sees large changes too small; in front of a norm it is off by 1e5."""
    model, windows = trained(family), prose(8, -1)
    anatomy = anatomy_of(model)
    statistics = collect_statistics(model, prose(64, -2))
    ranking = activation(statistics).ranking()
    dense = dense_distribution(model, windows, k=model.config.vocab_size - 1)
    with Supernet(model, ranking, CompensationTable(model, statistics, ranking)) as supernet:
        architecture, widths = around(anatomy)
        found, _ = exchange_costs(supernet, architecture, widths, windows, dense, generator())
        changes = true_changes(supernet, architecture, widths, windows, dense)
        some = {block.kind: sorted({0, block.units // 4, block.units // 2}) for block in anatomy.blocks}
        sensitivity = block_sensitivity(supernet, windows, some, generator())
        every = {kind: torch.tensor([row] * anatomy.num_hidden_layers) for kind, row in some.items()}
        losses = true_changes(supernet, Architecture.full(anatomy), every, windows, dense)
    spearman, ratios = compare({kind: orders.sum(-1) for kind, orders in found.items()}, changes)
    assert spearman > 0.8 and (ratios > 0).float().mean() > 0.8
    assert 0.2 < ratios.median() < 2 and ratios.abs().max() < 3
    spearman, ratios = compare(sensitivity, losses)
    assert spearman > 0.9 and 0.03 < ratios.min() and ratios.max() < 2


@pytest.mark.parametrize("model", ["llama", "gpt2"], indirect=True)
def test_at_the_dense_model_changes_are_the_block_sensitivity(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw
) -> None:
    widths = all_widths(anatomy)
    dense = dense_distribution(model, windows)
    with opened(model, windows, random_ranking(anatomy, 3), True) as supernet:
        found, _ = exchange_costs(
            supernet, Architecture.full(anatomy), widths, windows, dense, generator(), batch_size=2
        )
        rows = {kind: units[0].tolist() for kind, units in widths.items()}
        sensitivity = block_sensitivity(supernet, windows, rows, generator(), batch_size=2)
    for kind, costs in found.items():
        assert costs[..., 0].abs().max() < 1e-6  # the divergence has its minimum there
        predicted = windows.shape[1] - 1
        expected = sensitivity[kind] * windows.shape[1] / predicted
        torch.testing.assert_close(costs[..., 1], expected, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt2"], indirect=True)
def test_a_dropped_layer_can_come_back_and_asking_leaves_no_trace(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw,
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    full = Architecture.full(anatomy)
    dropped = Architecture((0, *full.kv_groups[1:]), (0, *full.neurons[1:]))
    up = {
        "attention": torch.tensor([[1]] + [[anatomy.num_key_value_heads]] * (anatomy.num_hidden_layers - 1)),
        "mlp": torch.tensor([[anatomy.intermediate_size]] * anatomy.num_hidden_layers),
    }
    dense = dense_distribution(model, windows)
    done: list[int] = []
    with unchanged(model), opened(model, windows, random_ranking(anatomy, 1), False) as supernet:
        found, _ = exchange_costs(supernet, dropped, up, windows, dense, generator(), on_layer=done.append)
        stay, _ = exchange_costs(
            supernet,
            dropped,
            {kind: torch.zeros_like(units) for kind, units in up.items()},
            windows,
            dense,
            generator(),
        )
    assert found["mlp"][0].any() and found["attention"][0].any()
    assert not found["mlp"][1:].any()  # they stay as they are
    assert not stay["mlp"][0].any() and stay["mlp"][1:].any()
    assert done[-1] == 2 * anatomy.num_hidden_layers
    assert all(parameter.grad is None for parameter in model.parameters())
