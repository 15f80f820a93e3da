"""The types of a GGUF file of a given size that cost the model least, and output projections that make up for what their inputs lose.

Every block has one type for its matrices, and so have the embeddings and the head. What a type costs a block alone is E[(h du)^2] / 2, the
second-order KL divergence from the model that is exported (as in `pruning.sensitivity`), with du the change of what its output
projection gives; embeddings and head are measured. Costs are added up, and steps to coarser types taken, the cheapest per byte first,
until the file is small enough; those that turn out not to be needed are taken back. Then each output projection is refitted in sequence
(`pruning.sequential`) at the inputs that the coarse blocks before it and its own coarse inputs really give. All that is asked for is the
model itself and some text.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning.block import Block, BlockKind
from pruning.compensation import Ridge
from pruning.errors import UnsupportedExport
from pruning.export.gguf_file import check_gguf
from pruning.export.gguf_size import file_size
from pruning.export.gguf_tensors import shapes
from pruning.export.hf import Pruned
from pruning.export.quantise import SEARCHED, Mixture, Stored, check_library, fitting, quantised, searched_kinds
from pruning.export.rebuild import cast
from pruning.gradients import loss_gradient
from pruning.likelihood import Head, dense_distribution, frozen, quality
from pruning.projection import Projection, matrix_of
from pruning.sequential import TOKENS_PER_COLUMN, refit_block
from pruning.streams import Reached, goals_behind
from pruning.walk import Walk

PRICED_TOKENS = 2048
POSITIONS = "position_embd.weight"
RIDGE = Ridge()
SEED = 0  # of the tokens that are drawn to tell costs
PARTS: dict[BlockKind, str] = {"attention": "attn", "mlp": "ffn"}
Group = tuple[int, BlockKind] | str  # a block of a layer by position, or a tensor outside the layers


@dataclass(frozen=True)
class Step:
    """From some types to coarser ones of one group of matrices."""

    group: Group
    kind: Type
    saved: int  # bytes
    slope: float  # nats per byte


def searched(
    pruned: Pruned, size: int, windows: Tensor, name: str, on_layer: Callable[[int], None] = lambda done: None
) -> tuple[Pruned, Mixture, str]:
    """The model in float32 with its output projections refitted, the types of a file of at most `size` bytes, and what was done, in a line.

    Memory: a copy of the model, and the hidden states of all windows six times. Time: some ten forward passes.

    Args:
        windows: `num_windows x length` token ids to fit to; too few of them, and there are no refits.
        name: The model's name in the file.
        on_layer: Told how many layers have been priced, and then how many are refitted beyond that: up to twice their number.

    Raises:
        UnsupportedExport: No such file is so small, or llama.cpp cannot hold the model.
    """
    kinds = searched_kinds(pruned.anatomy.hidden_size)
    check_library(kinds)
    model = copy.deepcopy(pruned.model)
    cast(model, torch.float32)
    pruned = replace(pruned, model=model)
    groups = _groups(pruned)
    fixed: dict[Group, Type] = (
        {POSITIONS: Type.F16} if groups.pop(POSITIONS, None) else {}
    )  # as in all of llama.cpp's file types
    finest, coarsest = (_mixture(dict.fromkeys(groups, kind) | fixed, kinds[-1]) for kind in (kinds[0], kinds[-1]))
    largest, smallest = (file_size(pruned, mixture, name) for mixture in (finest, coarsest))
    if size < smallest:
        raise UnsupportedExport(
            f"No file of this model is as small as {size} bytes: with {kinds[-1].name.lower()} throughout it has {smallest}. "
            "Ask for that, or take a smaller model."
        )
    some = windows[: max(1, PRICED_TOKENS // windows.shape[1])]
    with frozen(model):
        outside = [group for group in groups if isinstance(group, str)]
        costs = _costs(pruned, kinds, some, on_layer) | _outside_costs(model, outside, kinds, some)
        chosen = _chosen(groups, kinds, costs, largest - size)
        least = TOKENS_PER_COLUMN * max(matrix_of(output).shape[1] for output in _outputs(pruned))
        if enough := windows.numel() >= least:
            _refit(pruned, chosen, windows, on_layer)
    refits = "output projections refitted behind them" if enough else (
        f"no refits to them, which need {least} calibration tokens, and there are {windows.numel()}"
    )  # fmt: skip
    return pruned, _mixture(chosen | fixed, kinds[-1]), f"Types searched for at most {size / 1e6:.1f} MB; {refits}."


def _present(pruned: Pruned) -> list[list[Block]]:
    """What blocks every layer of the pruned model has."""
    pairs = zip(pruned.architecture.kv_groups, pruned.architecture.neurons, strict=True)
    return [
        [block for block, units in zip(pruned.anatomy.blocks, pair, strict=True) if units] for pair in pairs if any(pair)
    ]  # fmt: skip


def _outputs(pruned: Pruned) -> list[Projection]:
    layers = zip(pruned.anatomy.layers_of(pruned.model), _present(pruned), strict=True)
    return [block.output_of(layer) for layer, blocks in layers for block in blocks]


def _groups(pruned: Pruned) -> dict[Group, list[tuple[int, ...]]]:
    """Shapes of the matrices that have one type together."""
    found: dict[Group, list[tuple[int, ...]]] = {}
    for tensor, shape in shapes(pruned, check_gguf(pruned.model.config, pruned.anatomy, pruned.architecture)).items():
        if len(shape) > 1:
            place = re.match(r"blk\.(\d+)\.(attn|ffn)_", tensor)
            kind: dict[str, BlockKind] = {part: kind for kind, part in PARTS.items()}
            found.setdefault((int(place[1]), kind[place[2]]) if place else tensor, []).append(shape)
    return found


def _mixture(chosen: Mapping[Group, Type], other: Type) -> Mixture:
    """Stand-ins of zeros are in no group, and of the `other` type."""
    patterns = [
        (f"^{re.escape(group)}$" if isinstance(group, str) else rf"^blk\.{group[0]}\.{PARTS[group[1]]}_", kind)
        for group, kind in chosen.items()
    ]
    return Mixture(SEARCHED[:-1], other, None, tuple(patterns))


def _steps(
    groups: Mapping[Group, Sequence[tuple[int, ...]]], kinds: Sequence[Type], costs: Mapping[Group, Sequence[float]]
) -> list[Step]:
    """Along the lower convex hull of every group's costs by size, the cheapest per byte first."""
    steps = []
    for group, some in groups.items():
        sizes = [sum(Stored.of(kind, shape).padded for shape in some) for kind in kinds]
        at = 0
        while True:
            slopes = {
                later: max(0.0, costs[group][later] - costs[group][at]) / (sizes[at] - sizes[later])
                for later in range(at + 1, len(kinds))
                if sizes[later] < sizes[at]
            }
            if not slopes:
                break
            best = min(slopes, key=lambda later: (slopes[later], -later))
            steps.append(Step(group, kinds[best], sizes[at] - sizes[best], slopes[best]))
            at = best
    return sorted(steps, key=lambda step: step.slope)


def _chosen(
    groups: Mapping[Group, Sequence[tuple[int, ...]]],
    kinds: Sequence[Type],
    costs: Mapping[Group, Sequence[float]],
    excess: int,
) -> dict[Group, Type]:
    """The type of every group, of a file `excess` bytes smaller than with the finest of `kinds` throughout.

    The last step may save far more than is asked for, as that of the embeddings does: of those before it the dearest per byte that need not
    be are taken back.
    """
    chosen, taken = dict.fromkeys(groups, kinds[0]), list[tuple[Step, Type]]()
    for step in _steps(groups, kinds, costs):
        if excess <= 0:
            break
        taken.append((step, chosen[step.group]))
        chosen[step.group], excess = step.kind, excess - step.saved
    for step, before in reversed(taken):
        if chosen[step.group] == step.kind and excess + step.saved <= 0:
            chosen[step.group], excess = before, excess + step.saved
    return chosen


def _stored(matrix: Tensor, kind: Type) -> Tensor:
    """The values that a file gives back."""
    given = fitting(kind, matrix.shape[-1])
    values = quantised(matrix.detach().float().cpu().contiguous().numpy(), given)
    return torch.from_numpy(gguf.quants.dequantize(values, given).copy()).to(matrix)


@contextmanager
def _holding(values: Sequence[tuple[Projection, Tensor]]) -> Iterator[None]:
    """Projections with other `outputs x inputs` weights, until the context ends."""
    own = [(projection, matrix_of(projection).clone()) for projection, _ in values]
    try:
        for projection, matrix in values:
            matrix_of(projection).data.copy_(matrix)
        yield
    finally:
        for projection, matrix in own:
            matrix_of(projection).data.copy_(matrix)


def _inputs(block: Block, layer: nn.Module, kind: Type) -> list[tuple[Projection, Tensor]]:
    return [(projection, _stored(matrix_of(projection), kind)) for projection, _ in block.inputs_of(layer)]


def _costs(
    pruned: Pruned, kinds: Sequence[Type], windows: Tensor, on_layer: Callable[[int], None] = lambda done: None
) -> dict[Group, list[float]]:
    """Of every block alone in each type, nats per token."""
    model, costs = pruned.model, dict[Group, list[float]]()
    batches, layers = windows.split(2), pruned.anatomy.layers_of(model)
    head, drawn = Head.of(model), torch.Generator(windows.device).manual_seed(SEED)
    walk = Walk(model, batches, keep=len(batches))
    for index, layer in enumerate(layers):
        walk.forward(index, layer)
    gradients = [
        walk.last_gradient(place, partial(loss_gradient, head=head, windows=batch, generator=drawn))
        for place, batch in enumerate(batches)
    ]
    for index, blocks in reversed(list(enumerate(_present(pruned)))):
        into = {block.kind: torch.zeros(len(kinds)) for block in blocks}
        with _trying(layers[index], blocks, kinds, into, windows.shape[1] - 1):
            walk.backward(index, layers[index], gradients)
        for kind, sums in into.items():
            costs[index, kind] = (sums / (2 * windows.numel())).tolist()
        on_layer(len(layers) - index)
    return costs


@contextmanager
def _trying(
    layer: nn.Module, blocks: Sequence[Block], kinds: Sequence[Type], into: Mapping[BlockKind, Tensor], predicted: int
) -> Iterator[None]:
    """Add up squares of (h du) of every block in each type, while the layer is differentiated."""
    values = {
        (block.kind, kind): (_inputs(block, layer, kind), _stored(matrix_of(block.output_of(layer)), kind))
        for block in blocks
        for kind in kinds
    }
    made: dict[BlockKind, list[Tensor]] = {}
    busy = False

    @torch.no_grad()
    def try_all(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy:
            return
        busy = True
        for block in blocks:
            made[block.kind] = []
            for kind in kinds:
                inputs, output = values[block.kind, kind]
                with _holding(inputs), ExitStack() as reaching:
                    reaching.callback(block.output_of(layer).register_forward_pre_hook(_reach).remove)
                    try:
                        layer(*args, **kwargs)
                    except Reached as reached:
                        made[block.kind].append(F.linear(reached.z, output, block.output_of(layer).bias))
        busy = False

    def follow(kind: BlockKind, module: nn.Module, args: object, y: Tensor) -> None:
        if busy:
            return
        changes = [other - y.detach() for other in made.pop(kind)]

        def on_gradient(gradient: Tensor) -> None:
            for place, change in enumerate(changes):
                into[kind][place] += (predicted * gradient * change).float().sum(-1).square().sum().cpu()

        y.register_hook(on_gradient)

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(try_all, with_kwargs=True).remove)
        for block in blocks:
            stack.callback(block.output_of(layer).register_forward_hook(partial(follow, block.kind)).remove)
        yield


def _reach(module: nn.Module, args: tuple[Tensor]) -> None:
    raise Reached(args[0])


def _outside_costs(
    model: PreTrainedModel, names: Sequence[str], kinds: Sequence[Type], windows: Tensor
) -> dict[Group, list[float]]:
    """KL of the model with its embeddings or its head in each type, nats per token."""
    places = {"token_embd.weight": model.get_input_embeddings(), "output.weight": model.get_output_embeddings()}
    dense, found = dense_distribution(model, windows), dict[Group, list[float]]()
    for name in names:
        weight, found[name] = places[name].weight, []
        own = weight.data
        try:
            for kind in kinds:
                weight.data = _stored(own, kind)
                found[name].append(quality(model, windows, dense).kl or 0.0)
        finally:
            weight.data = own
    return found


@torch.no_grad()
def _refit(pruned: Pruned, chosen: Mapping[Group, Type], windows: Tensor, on_layer: Callable[[int], None]) -> None:
    """Give every block the output projection that does best behind the coarse ones before it. Others keep their values."""
    model, scale = pruned.model, pruned.anatomy.residual_scale
    batches = windows.split(8)
    own, coarse = Walk(model, batches), Walk(model, batches)
    layers = pruned.anatomy.layers_of(model)
    for index, (layer, blocks) in enumerate(zip(layers, _present(pruned), strict=True)):
        goals = goals_behind(own, index, layer, blocks, scale)
        fitted = []
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(_holding(_inputs(block, layer, chosen[index, block.kind])))
            for block in blocks:
                output = block.output_of(layer)
                before = blocks[0] if block is not blocks[0] else None
                weight, bias, _ = refit_block(
                    coarse, index, layer, block, before, goals.pop(block.kind), matrix_of(output), output.bias, RIDGE, scale
                )  # fmt: skip
                fitted.append((output, weight, bias))
                stack.enter_context(_holding([(output, _stored(weight, chosen[index, block.kind]))]))
                if bias is not None:
                    output.bias.copy_(bias)
            coarse.forward(index, layer)
        for output, weight, _ in fitted:
            matrix_of(output).copy_(weight)
        on_layer(len(layers) + index + 1)
