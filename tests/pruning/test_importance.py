"""Scores equal slow direct computations, do not depend on the batch, and collecting them leaves no trace."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.block import Block
from pruning.importance import (
    METHODS,
    Importance,
    activation,
    block_influence,
    fisher,
    fluctuation,
    magnitude,
    taylor,
)
from pruning.projection import Projection, matrix_of
from pruning.statistics import collect_statistics, steps

CLOSE = {"rtol": 2e-4, "atol": 1e-5}  # statistics are float32
ONE_FAMILY = pytest.mark.parametrize("model", ["qwen2"], indirect=True)


def output_inputs(model: PreTrainedModel, anatomy: Anatomy, block: Block, windows: Tensor) -> Tensor:
    """`L x tokens x C` inputs of the blocks' output projections."""
    seen: list[Tensor] = []
    outputs = [block.output_of(layer) for layer in anatomy.layers_of(model)]

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0].flatten(0, -2))

    handles = [output.register_forward_pre_hook(keep) for output in outputs]
    with torch.no_grad():
        model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def per_unit(columns: Tensor, block: Block) -> Tensor:
    """Sum `L x C` over each unit's columns, one unit at a time: `L x U`."""
    width = block.columns_per_unit
    return torch.stack([columns[:, unit * width : (unit + 1) * width].sum(1) for unit in range(block.units)], dim=1)


def column_energy(model: PreTrainedModel, anatomy: Anatomy, block: Block) -> Tensor:
    return torch.stack(
        [matrix_of(block.output_of(layer)).detach().norm(dim=0) ** 2 for layer in anatomy.layers_of(model)]
    )


def test_statistics_do_not_depend_on_the_batch(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    whole = collect_statistics(model, windows, batch_size=len(windows))
    scores = {name: method(whole) for name, method in METHODS.items()}
    for batch_size in (1, 2, 3):
        split = collect_statistics(model, windows, batch_size)
        assert (split.num_windows, split.num_tokens) == (whole.num_windows, whole.num_tokens) == (5, 50)
        for block in anatomy.blocks:
            for name in ("total", "square", "taylor", "fisher", "cosine"):
                found, expected = getattr(split.blocks[block.kind], name), getattr(whole.blocks[block.kind], name)
                torch.testing.assert_close(found, expected, **CLOSE)
            torch.testing.assert_close(split.blocks[block.kind].gram, whole.blocks[block.kind].gram, **CLOSE)
        torch.testing.assert_close(split.layer_cosine, whole.layer_cosine, **CLOSE)
        for name, method in METHODS.items():
            found, expected = method(split).ranking(), scores[name].ranking()
            assert torch.equal(found.groups, expected.groups)
            assert torch.equal(found.neurons, expected.neurons)


@pytest.mark.parametrize("scored", [0, 1, 3])
def test_windows_without_a_backward_pass_add_to_moments_and_to_no_score(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, scored: int
) -> None:
    whole, part = collect_statistics(model, windows), collect_statistics(model, windows, scored=scored)
    assert (part.num_windows, part.num_scored_windows, part.num_tokens) == (5, scored, 50)
    torch.testing.assert_close(part.layer_cosine, whole.layer_cosine, **CLOSE)
    for block in anatomy.blocks:
        found, expected = part.blocks[block.kind], whole.blocks[block.kind]
        torch.testing.assert_close(found.gram, expected.gram, **CLOSE)
        torch.testing.assert_close(found.square, expected.square, **CLOSE)
        if not scored:
            assert not found.taylor.any() and not found.fisher.any()
    if scored:
        alone = collect_statistics(model, windows[:scored])
        for method in (taylor, fisher):
            torch.testing.assert_close(method(part).layers, method(alone).layers, **CLOSE)


@pytest.mark.parametrize("block_size", [5, 192])
def test_grams_are_second_moments_of_the_output_inputs(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pruning.statistics.GRAM_BLOCK", block_size)
    statistics = collect_statistics(model, windows)
    for block in anatomy.blocks:
        z = output_inputs(model, anatomy, block, windows)
        found = torch.stack(list(statistics.blocks[block.kind].gram.values())).double()
        torch.testing.assert_close(found, z.transpose(1, 2) @ z, **CLOSE)


@ONE_FAMILY
def test_without_refits_no_gram_matrix_is_ever_made_and_scores_are_the_same(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, shapes: Callable[[], AbstractContextManager[Any]]
) -> None:
    neurons = anatomy.intermediate_size
    with shapes() as made:
        whole = collect_statistics(model, windows)
    assert (neurons, neurons) in made.seen  # attention's are as large as a weight
    with shapes() as made:
        found = collect_statistics(model, windows, grams=lambda layer: False)
    assert made.seen and (neurons, neurons) not in made.seen
    for block in anatomy.blocks:
        assert not found.blocks[block.kind].gram
    for method in METHODS.values():
        for scores in ("groups", "neurons"):
            torch.testing.assert_close(getattr(method(found), scores), getattr(method(whole), scores), **CLOSE)


def gate_derivatives(
    model: PreTrainedModel, anatomy: Anatomy, block: Block, windows: Tensor, shape: tuple[int, ...], repeat: int
) -> Tensor:
    """Autograd's derivative of every window's mean loss by gates of `shape` on all blocks of one kind: `L x *shape`.

    Each gate multiplies `repeat` neighbouring columns of the output projection's `B x T x C` input. What a gate changes
    passes a norm behind the projection with the scale y/x of the dense model; the dense signal passes it as ever.
    """
    layers = anatomy.layers_of(model)
    gates = [torch.ones(shape, dtype=torch.double, requires_grad=True) for _ in layers]
    changes: list[Tensor] = []  # what the gate in force adds to the projection's result: zero, with a gradient
    handles = []
    for layer, gate in zip(layers, gates, strict=True):
        output, update = block.output_of(layer), block.update_of(layer)

        def remember(_: nn.Module, args: tuple[Tensor], gate: Tensor = gate, output: Projection = output) -> None:
            z = args[0].detach().view(*windows.shape, block.columns)
            changes.append(F.linear(z * gate.repeat_interleave(repeat, -1) - z, matrix_of(output).detach()))

        def add(norm: nn.Module, args: tuple[Tensor], y: Tensor, output: Projection = output) -> Tensor:
            scale = 1.0 if norm is output else (y / args[0]).detach()
            return y + changes.pop().view_as(y) * scale

        handles += [output.register_forward_pre_hook(remember), update.register_forward_hook(add)]
    logits = model(windows, use_cache=False).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none").mean(1)  # B
    for handle in handles:
        handle.remove()
    return torch.stack(torch.autograd.grad(losses.sum(), gates))


def test_taylor_is_the_derivative_by_an_explicit_gate(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    """One gate per window and column: |dL/dgate|, summed over a unit's columns, mean over windows."""
    found = taylor(collect_statistics(model, windows))
    for block in anatomy.blocks:
        derivatives = gate_derivatives(model, anatomy, block, windows, (len(windows), 1, block.columns), 1)
        expected = per_unit(derivatives.abs().mean((1, 2)), block)
        torch.testing.assert_close(found.of(block.kind).double(), expected, **CLOSE)
        assert expected.mean() > 1e-3
    torch.testing.assert_close(found.layers, found.groups.sum(1) + found.neurons.sum(1))


def test_fisher_is_the_squared_derivative_by_a_gate_per_token(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    """One gate per token and unit: half the mean square of the derivative of the window's summed loss."""
    found = fisher(collect_statistics(model, windows))
    for block in anatomy.blocks:
        shape = (*windows.shape, block.units)
        derivatives = gate_derivatives(model, anatomy, block, windows, shape, block.columns_per_unit)
        expected = (derivatives * (windows.shape[1] - 1)).square().mean((1, 2)) / 2
        torch.testing.assert_close(found.of(block.kind).double(), expected, **CLOSE)
        assert expected.mean() > 1e-3


def test_activation_is_the_energy_sent_to_the_residual_stream(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    found = activation(collect_statistics(model, windows))
    for block in anatomy.blocks:
        z = output_inputs(model, anatomy, block, windows)
        expected = per_unit((z**2).mean(1) * column_energy(model, anatomy, block), block)
        torch.testing.assert_close(found.of(block.kind).double(), expected, **CLOSE)


def test_fluctuation_is_the_energy_around_the_mean(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    found = fluctuation(collect_statistics(model, windows))
    for block in anatomy.blocks:
        z = output_inputs(model, anatomy, block, windows)
        expected = per_unit(z.var(1, correction=0) * column_energy(model, anatomy, block), block)
        torch.testing.assert_close(found.of(block.kind).double(), expected, **CLOSE)


def test_magnitude_is_the_squared_norm_of_a_units_weights(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    found = magnitude(collect_statistics(model, windows[:1]))
    for index, layer in enumerate(anatomy.layers_of(model)):
        for block in anatomy.blocks:
            for unit in range(block.units):
                own = [matrix_of(p)[rows.of(torch.tensor([unit]))] for p, rows in block.inputs_of(layer)]
                width = block.columns_per_unit
                own.append(matrix_of(block.output_of(layer))[:, unit * width : (unit + 1) * width])
                expected = sum(float((weight.detach() ** 2).sum()) for weight in own)
                assert found.of(block.kind)[index, unit].item() == pytest.approx(expected, rel=1e-5)


def test_a_unit_that_sends_nothing_ranks_last(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    silent = {"attention": anatomy.num_key_value_heads - 2, "mlp": 7}
    layer = anatomy.layers_of(model)[2]
    for block in anatomy.blocks:
        first = silent[block.kind] * block.columns_per_unit
        matrix_of(block.output_of(layer)).data[:, first : first + block.columns_per_unit] = 0
    statistics = collect_statistics(model, windows)
    for method in (taylor, fisher, activation, fluctuation):
        scores = method(statistics)
        for block in anatomy.blocks:
            found, order = scores.of(block.kind)[2], scores.ranking().of(block.kind)[2].tolist()
            assert found[silent[block.kind]] == 0
            assert (
                order.index(silent[block.kind]) >= (found > 0).sum() >= block.units / 2
            )  # of OPT's ReLUs some are dead


def test_a_ranking_is_descending_and_stable() -> None:
    scores = Importance(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1.0, 1.0, 2.0, 1.0, 2.0]]), torch.tensor([5.0]))
    assert scores.ranking().groups.tolist() == [[1, 2, 0]]
    assert scores.ranking().neurons.tolist() == [[2, 4, 0, 1, 3]]


def test_influence_is_one_minus_the_cosine_of_the_residual_stream(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    found = block_influence(collect_statistics(model, windows))
    streams: list[Tensor] = []
    updates: dict[str, list[Tensor]] = {"attention": [], "mlp": []}
    for layer in anatomy.layers_of(model):
        for block in anatomy.blocks:
            block.entrance_of(layer).register_forward_pre_hook(lambda _, args: streams.append(args[0].view(5, 10, -1)))
            block.update_of(layer).register_forward_hook(
                lambda _, args, update, kind=block.kind: updates[kind].append(update.view(5, 10, -1))
            )
    (final,) = [module for name, module in model.get_decoder().named_children() if "norm" in name or name == "ln_f"]
    final.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        model(windows, use_cache=False)
    attention, mlp = (anatomy.residual_scale * torch.stack(updates[kind]) for kind in ("attention", "mlp"))
    before, between, after = (torch.stack(streams[first::2][:5]) for first in (0, 1, 2))  # L x B x T x hidden_size
    torch.testing.assert_close(before + attention + mlp, after, rtol=0, atol=1e-12)

    def influence(before: Tensor, after: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(before, after, dim=-1).mean((1, 2))

    torch.testing.assert_close(found["layer"].double(), influence(before, after), **CLOSE)
    torch.testing.assert_close(found["attention"].double(), influence(before, before + attention), **CLOSE)
    torch.testing.assert_close(found["mlp"].double(), influence(between, between + mlp), **CLOSE)


def test_a_layer_that_adds_nothing_has_no_influence(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    for block in anatomy.blocks:
        for parameter in block.output_of(anatomy.layers_of(model)[3]).parameters():
            parameter.data.zero_()
    for influence in block_influence(collect_statistics(model, windows)).values():
        assert abs(influence[3]) < 1e-6
        assert influence[[0, 1, 2, 4]].min() > 1e-3


@pytest.mark.parametrize("raises", [False, True], ids=["normal end", "exception"])
def test_the_model_is_left_as_it_was(
    model: PreTrainedModel, windows: Tensor, raises: bool,
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    model.train()
    anatomy_of(model).mlp.module_of(anatomy_of(model).layers_of(model)[2]).requires_grad_(False)

    def on_layer(done: int) -> None:
        if raises and done > 2:
            raise KeyboardInterrupt

    with unchanged(model):
        try:
            collect_statistics(model, windows, on_layer=on_layer)
        except KeyboardInterrupt:
            assert raises
        else:
            assert not raises
    assert all(parameter.grad is None for parameter in model.parameters())


@ONE_FAMILY
def test_modules_in_different_modes_keep_them(
    model: PreTrainedModel, windows: Tensor, unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]]
) -> None:
    model.train()
    model.model.layers[1].eval()  # frozen by the user, say
    with unchanged(model):
        collect_statistics(model, windows)


@ONE_FAMILY
def test_progress_counts_layers_there_and_back(model: PreTrainedModel, windows: Tensor) -> None:
    for scored in (0, 2, None):
        seen: list[int] = []
        collect_statistics(model, windows, on_layer=seen.append, scored=scored)
        assert seen == list(range(1, 1 + steps(5, scored != 0)))


@ONE_FAMILY
def test_statistics_can_be_collected_without_gradients_around(model: PreTrainedModel, windows: Tensor) -> None:
    expected = collect_statistics(model, windows).blocks["mlp"].taylor
    with torch.no_grad():
        assert torch.equal(collect_statistics(model, windows).blocks["mlp"].taylor, expected)


@pytest.mark.parametrize("model", ["llama", "qwen2-sliding"], indirect=True)
@pytest.mark.parametrize("raises", [False, True], ids=["normal end", "exception"])
def test_no_activation_outlives_the_call(model: PreTrainedModel, windows: Tensor, raises: bool) -> None:
    """A hook that closed over its own tensor once kept every graph alive in a cycle until the collector came by."""

    def activations() -> int:
        return sum(type(thing) is Tensor and thing.ndim == 3 for thing in gc.get_objects())

    def on_layer(done: int) -> None:
        if raises:
            raise KeyboardInterrupt

    collect_statistics(model, windows)  # whatever is cached at the first run
    gc.collect()
    gc.disable()
    try:
        before = activations()
        with suppress(KeyboardInterrupt):
            collect_statistics(model, windows, on_layer=on_layer)
        assert activations() == before
    finally:
        gc.enable()
