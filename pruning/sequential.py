"""Refits of one sub-network in sequence: each block is fitted to what the refitted blocks before it really hand on.

With h the residual stream before a block, d in the dense model and p in the pruned one, y what the dense block adds to it
and z_p the inputs of the block's output projection W in the pruned model, of its kept units K alone:

    V = argmin E|(h_d + y) - (h_p + V z_p)|^2 + |(V - W_K) D^1/2|^2    with G = E[z_p z_pT] and D a diagonal ridge:
    V^T = (G + D)^-1 (E[z_p (h_d + y - h_p)T] + D W_KT)

So a block makes up for what was removed of itself and for what those before it have lost, as far as its own inputs tell, and errors
do not pile up as they do when all blocks are fitted at the dense model's inputs (`pruning.compensation`; where nothing was removed
before, both are the same). What others have lost is noise to most of a block's inputs, so it wants more ridge; and V holds for one
sub-network alone. What a norm behind the projection would make of it is not linear: there a block is fitted to W z_d. A bias is the
column of an input that is 1 everywhere, without ridge. Fitting at the pruned model's own inputs: arXiv:2208.11580, arXiv:2210.17323.
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS, Block, BlockKind
from pruning.compensation import Refits, Ridge
from pruning.errors import InvalidArchitecture
from pruning.likelihood import frozen
from pruning.masks import Ranking
from pruning.projection import matrix_of
from pruning.streams import goals_behind, moments, reached
from pruning.supernet import Supernet
from pruning.tensor_files import Tensors
from pruning.walk import Walk, brought, device_of
from pruning.widths import width_text

# On SmolLM2 at 0.65 of the blocks best between 0.3 and 0.6 on 16,384 tokens; 0.1 does on four times as many.
SEQUENTIAL_RIDGE = Ridge(times=8)
TOKENS_PER_COLUMN = 5  # fewer are learnt by heart


class SequentialRefits(Refits):
    """Refitted output weights of one sub-network.

    Memory: these weights, on the model's device.
    """

    def __init__(self, ranking: Ranking) -> None:
        self._ranking = ranking
        self._fitted: dict[tuple[BlockKind, int], tuple[Tensor, Tensor | None]] = {}

    @property
    def ranking(self) -> Ranking:
        return self._ranking

    def to_tensors(self) -> dict[str, Tensor]:
        """All of it by name, the order of units included."""
        tensors = {f"order.{kind}": self.ranking.of(kind) for kind in BLOCK_KINDS}
        if self.ranking.heads is not None:
            tensors["order.heads"] = self.ranking.heads
        for (kind, layer), (weight, bias) in self._fitted.items():
            tensors[f"{kind}.{layer}"] = weight
            if bias is not None:
                tensors[f"bias.{kind}.{layer}"] = bias
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Tensors, device: torch.device | str) -> Self:
        """What `to_tensors` gave, its weights brought to `device`."""
        heads = tensors.get("order.heads")
        ranking = Ranking(
            tensors["order.attention"].cpu(), tensors["order.mlp"].cpu(), None if heads is None else heads.cpu()
        )
        refits = cls(ranking)
        for kind in BLOCK_KINDS:
            for name in (name for name in tensors if name.startswith(f"{kind}.")):
                bias = tensors.get(f"bias.{name}")
                fitted = tensors[name].to(device), None if bias is None else bias.to(device)
                refits._fitted[kind, int(name.removeprefix(f"{kind}."))] = fitted
        return refits

    def put(self, layer: int, block: Block, weight: Tensor, bias: Tensor | None) -> None:
        """Set a block's `hidden_size x columns` weight and `hidden_size` bias."""
        self._fitted[block.kind, layer] = weight, bias

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        """The `hidden_size x block.columns_at(units)` weight whose columns follow the ranking.

        Raises:
            InvalidArchitecture: The sub-network has another width there.
        """
        return self._of(layer, block, units)[0]

    def bias(self, layer: int, block: Block, units: int) -> Tensor | None:
        """The `hidden_size` bias that goes with it; None where the projection has none.

        Raises:
            InvalidArchitecture: As `weight`.
        """
        return self._of(layer, block, units)[1]

    def _of(self, layer: int, block: Block, units: int) -> tuple[Tensor, Tensor | None]:
        found = self._fitted.get((block.kind, layer))
        if found is None or found[0].shape[1] != block.columns_at(units):
            fitted = found[0].shape[1] // block.columns_per_unit if found else "none"
            raise InvalidArchitecture(
                f"Layer {layer} has no refit for {width_text(units)} of {block.kind}: these refits are of another sub-network, "
                f"expected {fitted}."
            )
        return found


@torch.no_grad()
def sequential_refit(
    supernet: Supernet,
    architecture: Architecture,
    windows: Tensor,
    ridge: Ridge = SEQUENTIAL_RIDGE,
    batch_size: int = 8,
    on_layer: Callable[[int], None] | None = None,
) -> SequentialRefits:
    """Fit one sub-network of an open supernet, whatever refits that one has.

    Memory: a layer and a batch's activations, as in `pruning.walk.Walk`; the hidden states of all windows six times and z of one block,
    where a walk keeps them; of one block at a time G, its factor and V, in float32. Time: two to three forward passes and the moments.

    Args:
        windows: `num_windows x length` token ids.
        on_layer: Called with the number of layers done.
    """
    anatomy = supernet.anatomy
    architecture.check(anatomy)
    refits = SequentialRefits(supernet.ranking)
    own = supernet.using(refits)
    batches = windows.split(batch_size)
    with frozen(supernet.model):
        dense, pruned = Walk(supernet.model, batches), Walk(supernet.model, batches)
        for index in range(anatomy.num_hidden_layers):
            narrow = [
                block for block in anatomy.blocks if architecture.units(block.kind)[index] not in (0, block.units)
            ]
            with supernet.layer(index) as layer:
                goals = goals_behind(dense, index, layer, anatomy.blocks, anatomy.residual_scale)
                for block in narrow:  # until it is fitted, a block has its own columns
                    output, units = supernet.output_of(index, block), architecture.units(block.kind)[index]
                    refits.put(index, block, block.first_columns(matrix_of(output), units), output.bias)
                inputs: list[tuple[Tensor, Tensor]] = []
                for block in narrow:
                    units = architecture.units(block.kind)[index]
                    own_columns = refits.weight(index, block, units), refits.bias(index, block, units)
                    attention = anatomy.attention if block.kind == "mlp" and architecture.kv_groups[index] else None
                    with own.narrowed(index, architecture):
                        weight, bias, inputs = refit_block(
                            pruned,
                            index,
                            layer,
                            block,
                            attention,
                            goals.pop(block.kind),
                            *own_columns,
                            ridge,
                            anatomy.residual_scale,
                        )
                    refits.put(index, block, weight, bias)
                if anatomy.mlp in narrow:  # the last to add to the stream, whose inputs are known
                    for batch, (stream, z) in enumerate(inputs):
                        update = own.update(index, anatomy.mlp, z.to(weight.device), architecture.neurons[index])
                        pruned.hidden[batch] = stream + anatomy.residual_scale * update.view_as(stream).to(
                            stream.device
                        )
                elif architecture.keeps_layer(index):
                    with own.narrowed(index, architecture):
                        pruned.forward(index, layer)
            if on_layer:
                on_layer(index + 1)
    return refits


def refit_block(
    walk: Walk,
    index: int,
    layer: nn.Module,
    block: Block,
    attention: Block | None,
    goals: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    ridge: Ridge,
    scale: float,
) -> tuple[Tensor, Tensor | None, list[tuple[Tensor, Tensor]]]:
    """The solution for one block of a narrowed layer; and, batch by batch, the stream before the block and its z.

    Args:
        walk, attention, goals, scale: As for `pruning.streams.reached` and `moments`.
        weight, bias: What the block has now, and is drawn to.
    """
    affine = weight if bias is None else torch.cat([bias[:, None], weight], dim=1)
    affine = affine.to(torch.promote_types(weight.dtype, torch.float32))
    found = reached(walk, index, layer, block, attention, scale)
    inputs = [(stream, z.to(stream.device)) for stream, z in found]
    gram, cross, tokens = moments(inputs, goals, block, affine, bias is not None, scale)
    damping = ridge.of(gram, tokens)
    if bias is not None:
        damping[0] = 0
    gram.diagonal().add_(damping)
    solution = torch.cholesky_solve(cross.addcmul_(damping[:, None], affine.T), torch.linalg.cholesky(gram))
    solution = solution.T.to(weight.dtype)
    if bias is None:
        return solution.contiguous(), None, inputs
    return solution[:, 1:].contiguous(), solution[:, 0].contiguous(), inputs


@torch.no_grad()
def refit_to_dense(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    architecture: Architecture,
    windows: Tensor,
    ridge: Ridge = SEQUENTIAL_RIDGE,
    batch_size: int = 8,
) -> None:
    """Fit the output projections of a model that was cut from `dense`, and may have been changed since, in place and in sequence.

    Each is drawn to what it is now, and all of them are fitted, those of whole blocks too: by now the stream before them differs.

    Memory: as for `sequential_refit`, of both models.

    Args:
        architecture: What was kept of `dense`.
        windows: `num_windows x length` token ids.
    """
    anatomy, batches = anatomy_of(dense), windows.split(batch_size)
    layers, position = anatomy.layers_of(small), 0
    with frozen(dense), frozen(small):
        theirs, own = Walk(dense, batches), Walk(small, batches)
        for index, dense_layer in enumerate(anatomy.layers_of(dense)):
            with brought(dense_layer, device_of(dense)):
                goals = goals_behind(theirs, index, dense_layer, anatomy.blocks, anatomy.residual_scale)
            if not architecture.keeps_layer(index):
                continue
            layer = layers[position]
            for block in (block for block in anatomy.blocks if architecture.units(block.kind)[index]):
                output = block.output_of(layer)
                attention = anatomy.attention if block.kind == "mlp" and architecture.kv_groups[index] else None
                weight, bias, _ = refit_block(
                    *(own, position, layer, block, attention, goals[block.kind]),
                    *(matrix_of(output), output.bias, ridge, anatomy.residual_scale),
                )
                matrix_of(output).copy_(weight)
                if bias is not None:
                    output.bias.copy_(bias)
            own.forward(position, layer)
            position += 1
