"""What every width and type of every block costs around one member of the path, added up; and the cheapest models of a file size.

With u what a block adds to the residual stream in the member (unquantised, with its refits), and du the change of that when the block
alone goes to another width and type, its cost is E[g du] + E[(h du)^2] / 2, g and h as in `pruning.exchanges`: the change of KL from the
dense model to second order. All of it comes from one pass there and back, and a run of every block for every type. The embeddings,
which are the head as well, are measured whole.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.bits.refits import FINE, Call, QuantisedRefits, inputs_of_output, kept_calls, stored
from llmbo.problem.knapsack import cheapest
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import Block, BlockKind
from pruning.compensation import Refits
from pruning.export import Pruned
from pruning.export.quantise import TYPES, Mixture, Stored
from pruning.export.rebuild import cast
from pruning.gradients import divergence_gradients
from pruning.likelihood import DenseDistribution, Head, frozen, last_hidden, quality
from pruning.masks import PruningMask, Ranking
from pruning.projection import matrix_of
from pruning.shrinking import shrink

Place = tuple[BlockKind, int]
HEAD = "token_embd"


@dataclass(frozen=True)
class Choice:
    """One width and type of one block, or one type of the embeddings (`units` is 0 there).

    Args:
        size: Bytes of its matrices in a file.
        cost: Change of KL, nats.
    """

    units: int
    kind: str
    size: int
    cost: float


def costs_around(
    model: PreTrainedModel,
    architecture: Architecture,
    widths: Mapping[BlockKind, Tensor],
    kinds: Sequence[str],
    refits: QuantisedRefits,
    windows: Tensor,
    dense: DenseDistribution,
    batch_size: int = 2,
) -> dict[str, Tensor]:
    """Change of KL when one block alone goes to another width and type, nats per token.

    Args:
        model: The dense one in float32.
        widths: `num_layers x n` units by kind of block.
        dense: The dense model's distribution on the windows.

    Returns:
        `num_layers x n x len(kinds)` by kind of block. Around the dense model there is no first order.
    """
    anatomy, generator = anatomy_of(model), torch.Generator().manual_seed(0)
    blocks = [(block, i, layer) for i, layer in enumerate(anatomy.layers_of(model)) for block in anatomy.blocks]
    calls: dict[Place, list[Call]] = {(block.kind, i): [] for block, i, _ in blocks}
    kept: dict[Place, list[tuple[Tensor, Tensor, Tensor]]] = {place: [] for place in calls}
    predicted = windows.shape[1] - 1
    with frozen(model), ExitStack() as stack:
        written: dict[Place, Tensor] = {}
        for block, i, layer in blocks:
            stack.enter_context(kept_calls(block, layer, calls[block.kind, i]))
            units = architecture.units(block.kind)[i]
            weight = refits.weight(i, block, units, FINE) if units < block.units else None
            columns = refits.order(i, block)[: units * block.columns_per_unit]
            writing = partial(_writing, written, (block.kind, i), columns, weight)
            stack.callback(block.output_of(layer).register_forward_hook(writing).remove)
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            written.clear()
            read = last_hidden(model, batch, leaf=True)
            rows = dense.rows(first, first + len(batch))
            *pulled, _ = divergence_gradients(read.detach(), Head.of(model), rows, generator)
            one, two = (
                torch.autograd.grad(read, list(written.values()), predicted * part, retain_graph=retain)
                for part, retain in zip(pulled, (True, False), strict=True)
            )
            for place, u, g, h in zip(written, written.values(), one, two, strict=True):
                kept[place].append((u.detach(), g, h))
    found = {kind: torch.zeros(*units.shape, len(kinds)) for kind, units in widths.items()}
    tokens = len(windows) * predicted
    with torch.no_grad():
        for block, i, layer in blocks:
            u, g, h = (torch.cat(parts).flatten(0, -2) for parts in zip(*kept.pop((block.kind, i)), strict=True))
            for k, kind in enumerate(kinds):
                z = torch.cat(inputs_of_output(block, layer, calls[block.kind, i], kind)).flatten(0, -2)
                for w, units in enumerate(widths[block.kind][i].tolist()):
                    change = -u
                    if units:
                        columns, weight = refits.in_file(i, block, units, kind)
                        change = change.addmm_(z[:, columns], weight.T)
                    cost = (g * change).sum() + (h * change).sum(-1).square().sum() / 2
                    found[block.kind][i, w, k] = cost / tokens
    return found


def _writing(
    written: dict[Place, Tensor], place: Place, columns: Tensor, weight: Tensor | None, module: nn.Module, args: Any, y: Tensor
) -> Tensor:  # fmt: skip
    """What a block of the member adds, a node of the graph in any case."""
    if weight is not None:
        y = args[0][..., columns] @ weight.T if len(columns) else torch.zeros_like(y).requires_grad_()
    written[place] = y
    return y


def head_costs(model: PreTrainedModel, kinds: Sequence[str], windows: Tensor, dense: DenseDistribution) -> list[float]:
    """KL of the dense model with its embeddings, which are its head, stored as each type, nats per token."""
    weight, found = model.get_input_embeddings().weight, []
    own = weight.data
    try:
        for kind in kinds:
            weight.data = stored(own, kind)
            found.append(float(quality(model, windows, dense).kl or 0.0))
    finally:
        weight.data = own
    return found


def choices_of(
    anatomy: Anatomy, widths: Mapping[BlockKind, Tensor], kinds: Sequence[str], costs: Mapping[str, Tensor], heads: Sequence[float]
) -> list[list[Choice]]:  # fmt: skip
    """Of the blocks, layers of attention first, and of the embeddings. Nothing of a block costs the same in all types."""
    hidden, found = anatomy.hidden_size, []
    for block in anatomy.blocks:
        for i in range(anatomy.num_hidden_layers):
            own: dict[tuple[int, str], Choice] = {}
            for w, units in enumerate(widths[block.kind][i].tolist()):
                rows = [part * units for parts in block.inputs.values() for part in parts.parts]
                shapes = [*((count, hidden) for count in rows), (hidden, units * block.columns_per_unit)]
                for k, kind in enumerate(kinds if units else kinds[:1]):
                    size = sum(Stored.of(TYPES[kind], shape).padded for shape in shapes)
                    own[units, kind] = Choice(units, kind, size, float(costs[block.kind][i, w, k]))
            found.append(list(own.values()))
    shape = anatomy.vocab_size, hidden
    pairs = zip(kinds, heads, strict=True)
    return [*found, [Choice(0, kind, Stored.of(TYPES[kind], shape).padded, cost) for kind, cost in pairs]]


def cheapest_of(choices: Sequence[Sequence[Choice]], size: int) -> list[Choice] | None:
    """The choice of every block whose costs sum to the least within so many bytes; None where there is none."""
    if not all(choices):
        return None
    costs = [np.array([choice.cost for choice in own]) for own in choices]
    sizes = [np.array([choice.size / 1e6 for choice in own]) for own in choices]
    picked = cheapest(costs, sizes, 0, size / 1e6)
    return picked and [own[index] for own, index in zip(choices, picked, strict=True)]


class _Chosen(Refits):
    """Refits with one type for each block."""

    def __init__(self, refits: QuantisedRefits, kinds: Mapping[Place, str]) -> None:
        self._refits, self._kinds = refits, kinds

    @property
    def ranking(self) -> Ranking:
        return self._refits.ranking

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        return self._refits.weight(layer, block, units, self._kinds[block.kind, layer])

    def bias(self, layer: int, block: Block, units: int) -> None: ...


def built(
    model: PreTrainedModel, tokenizer: Any, chosen: Sequence[Choice], refits: QuantisedRefits, name: str
) -> tuple[Pruned, Mixture]:
    """The model of these choices, its weights before they are stored, and what they are to be stored as.

    Args:
        model: The dense one in float32.
    """
    anatomy = anatomy_of(model)
    layers = anatomy.num_hidden_layers
    architecture = Architecture(*(tuple(choice.units for choice in chosen[at : at + layers]) for at in (0, layers)))
    kinds: dict[Place, str] = {
        (block.kind, i): chosen[at + i].kind for at, block in ((0, anatomy.attention), (layers, anatomy.mlp)) for i in range(layers)
    }  # fmt: skip
    mask = PruningMask.from_architecture(architecture, refits.ranking)
    small = shrink(model, mask, _Chosen(refits, kinds))
    patterns = [(HEAD, TYPES[chosen[-1].kind])]
    kept = [i for i in range(layers) if architecture.keeps_layer(i)]
    for position, (i, layer) in enumerate(zip(kept, anatomy.layers_of(small), strict=True)):
        for block, part in ((anatomy.attention, "attn"), (anatomy.mlp, "ffn")):
            units = architecture.units(block.kind)[i]
            if units == block.units:  # `shrink` has left it as it was
                weight = refits.weight(i, block, units, kinds[block.kind, i])
                matrix_of(block.output_of(layer)).data.copy_(weight[:, refits.order(i, block).argsort()])
            if units:
                patterns.append((rf"blk\.{position}\.{part}_", TYPES[kinds[block.kind, i]]))
    return Pruned(small, anatomy, architecture, tokenizer), Mixture(name, TYPES[FINE], None, tuple(patterns))


def of_widths(choices: Sequence[Sequence[Choice]], architecture: Architecture) -> list[list[Choice]]:
    """Only the types of one architecture; nothing where it has widths that were not priced."""
    units = [*architecture.kv_groups, *architecture.neurons, 0]
    return [[choice for choice in own if choice.units == kept] for own, kept in zip(choices, units, strict=True)]


def float32(model: PreTrainedModel) -> PreTrainedModel:
    """A copy."""
    found = copy.deepcopy(model)
    cast(found, torch.float32)
    return found
