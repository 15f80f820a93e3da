"""Run any sub-network of the resident model without copying it.

Sorting the units of every block by the ranking, best first, changes nothing the model computes, and makes every
candidate a *prefix*: its input projections are views of the resident weights, of fused projections one view per part.
With compensation the output projection comes from the table's cache, without it it is a view too. So a candidate costs
no memory and no copying of weights, on any device.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import asdict
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.block import Block, expand_units
from pruning.calibration import digest_of
from pruning.compensation import Refits
from pruning.errors import InvalidMask
from pruning.likelihood import (
    DenseDistribution,
    Head,
    Quality,
    WindowQualities,
    distribution_of,
    judged,
    last_hidden,
)
from pruning.masks import Ranking
from pruning.modeling_pruned import stand_ins
from pruning.projection import Narrow, Projection, matrix_of, rows_of
from pruning.walk import Walk, brought, device_of, windows_at_once


def absent(block: Block) -> dict[str, nn.Module]:
    """What stands in, by attribute of the decoder layer, for a block without any unit; its norms leave with it."""
    return stand_ins(block.kind, asdict(block.places))


class Supernet:
    """The resident model, its units sorted by `ranking` while the context is open.

        with Supernet(model, ranking, compensation) as supernet:
            supernet.quality(architecture, windows)

    Memory: nothing beyond the model and the refits. On exit, and when the body raises, the units are back
    in their original order, bit for bit.

    Args:
        compensation: Refitted output weights; without them the dense ones' prefixes are used.
        resident: Whether the model's layers stay on its device. Otherwise they are brought there one at a time, sorted on the way,
            and nothing is written where they wait: memory-mapped weights stay clean. Then only what is done layer by layer works,
            which is everything but `active`.
        known: What the model predicted on some windows before it was adapted, by `pruning.calibration.digest_of`: there that is what
            "the dense model" predicts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ranking: Ranking,
        compensation: Refits | None = None,
        resident: bool = True,
        known: Mapping[str, DenseDistribution] | None = None,
    ) -> None:
        self.model = model
        self.resident = resident
        self.by_layer = not resident or device_of(model).type == "cuda"
        self.known = known or {}
        self.anatomy = anatomy_of(model)
        ranking.check(self.anatomy)
        self.ranking = ranking
        self.compensation = _checked(compensation, ranking)
        places = [
            (block, index, layer)
            for index, layer in enumerate(self.anatomy.layers_of(model))
            for block in self.anatomy.blocks
        ]
        self._layers = list(self.anatomy.layers_of(model))
        self._outputs = {(block.kind, index): block.output_of(layer) for block, index, layer in places}
        self._updates = {(block.kind, index): block.update_of(layer) for block, index, layer in places}

    def __enter__(self) -> Self:
        self._reorder_all(inverse=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._reorder_all(inverse=True)

    def using(self, compensation: Refits | None) -> "Supernet":
        """The same supernet with other refits, for as long as this one is open."""
        other = copy(self)
        other.compensation = _checked(compensation, self.ranking)
        return other

    def serving(self, architecture: Architecture) -> "Supernet":
        """The same supernet with the refits that a sub-network takes."""
        own = self.compensation and self.compensation.serving(architecture)
        return self if own is self.compensation else self.using(own)

    def qualities(
        self,
        architectures: Sequence[Architecture],
        windows: Tensor,
        dense: DenseDistribution | None = None,
        batch_size: int | None = None,
    ) -> list[WindowQualities]:
        """Loss (and KL from the dense model) of each sub-network on each of `num_windows x length` token ids.

        Memory: a batch's activations; where layers are brought, all sub-networks' hidden states of all windows on the host; on a GPU that
        holds the model, on the GPU.

        Args:
            batch_size: Windows, by default `pruning.walk.windows_at_once`.
        """
        batches = self._split(windows, batch_size)
        head = Head.of(self.model)
        return [judged(head, batches, states, dense) for states in self.states(architectures, batches)]

    def quality(
        self,
        architecture: Architecture,
        windows: Tensor,
        dense: DenseDistribution | None = None,
        batch_size: int | None = None,
    ) -> Quality:
        """As `qualities`, of one sub-network over all windows."""
        return self.qualities([architecture], windows, dense, batch_size)[0].mean()

    def distribution(self, windows: Tensor, batch_size: int | None = None) -> DenseDistribution:
        """What the dense model predicts on `num_windows x length` token ids."""
        if self.known and (found := self.known.get(digest_of(windows))):
            return found
        batches = self._split(windows, batch_size)
        states = next(self.states([Architecture.full(self.anatomy)], batches))
        return distribution_of(Head.of(self.model), batches, states)

    def states(self, architectures: Sequence[Architecture], batches: Sequence[Tensor]) -> Iterator[Iterator[Tensor]]:
        """What the head reads, for each sub-network in turn, for each batch of `B x T` token ids: `B x T x hidden_size`.

        Every layer is brought once for all sub-networks together, so that a model larger than the device costs one transfer of its
        weights, and what a sub-network needs of the refits sets out while the one before it is computed. To be used in order: an
        iterator is spent once the next one begins.
        """
        device = device_of(self.model)
        if not self.by_layer:
            for architecture in architectures:
                with self.active(architecture) as model:
                    yield (last_hidden(model, batch.to(device)) for batch in batches)
            return
        walks = [Walk(self.model, batches) for _ in architectures]
        own = [self.serving(architecture) for architecture in architectures]
        turns = [
            [number for number, architecture in enumerate(architectures) if architecture.keeps_layer(index)]
            for index in range(len(self._layers))
        ]
        coming = ((index, number) for index, numbers in enumerate(turns) for number in numbers)
        next(coming, None)
        for index, numbers in enumerate(turns):
            with self.layer(index) as layer:
                for number in numbers:
                    with own[number]._narrowed(index, architectures[number]):
                        if following := next(coming, None):
                            own[following[1]]._expect(following[0], architectures[following[1]])
                        walks[number].forward(index, layer)
        for walk in walks:
            yield (walk.last_hidden(batch)[1] for batch in range(len(batches)))

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A layer on the device, its units sorted, for as long as the context lasts."""
        layer = self._layers[index]
        if self.resident:
            yield layer
            return
        with brought(layer, device_of(self.model), copy=True):
            self._reorder(index, inverse=False)
            yield layer

    @contextmanager
    def narrowed(self, index: int, architecture: Architecture) -> Iterator[None]:
        """A layer on the device as the sub-network has it, which must keep some of it; dense again afterwards."""
        with self.serving(architecture)._narrowed(index, architecture):
            yield

    @contextmanager
    def _narrowed(self, index: int, architecture: Architecture) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self.anatomy.blocks:
                self._narrow(self._layers[index], index, block, architecture.units(block.kind)[index], stack)
            yield

    def _expect(self, index: int, architecture: Architecture) -> None:
        for block in self.anatomy.blocks:
            units = architecture.units(block.kind)[index]
            if self.compensation is not None and units not in (0, block.units):
                self.compensation.expect(index, block, units)

    def _split(self, windows: Tensor, batch_size: int | None) -> Sequence[Tensor]:
        return windows.split(batch_size or windows_at_once(device_of(self.model), windows.shape[1]))

    def loss(self, architecture: Architecture, windows: Tensor) -> float:
        """Mean next-token loss of the sub-network, nats per token."""
        return self.quality(architecture, windows).loss

    def order(self, index: int, block: Block) -> tuple[Tensor, Tensor]:
        """How a layer's block is sorted while this is open: its units, and their query heads, best first, on the model's device."""
        units, heads = self.ranking.kept(index, block, block.units)
        return units.to(device_of(self.model)), heads.to(device_of(self.model))

    def output_of(self, index: int, block: Block) -> Projection:
        """The dense output projection of a block of layer `index`, whichever sub-network is active."""
        return self._outputs[block.kind, index]

    def output_weight(self, index: int, block: Block, units: int) -> Tensor:
        """The `hidden_size x block.columns_at(units)` weight that a block of layer `index` writes with at this width."""
        if self.compensation is not None and units != block.units:
            return self.compensation.weight(index, block, units)
        return block.first_columns(matrix_of(self.output_of(index, block)), units)

    def output_bias(self, index: int, block: Block, units: int) -> Tensor | None:
        """The `hidden_size` bias that goes with it, None where the projection has none."""
        refitted = None
        if self.compensation is not None and units != block.units:
            refitted = self.compensation.bias(index, block, units)
        return self.output_of(index, block).bias if refitted is None else refitted

    def update(self, index: int, block: Block, z: Tensor, units: int, held: int | None = None) -> Tensor:
        """What a block of layer `index` would add to the residual stream at this width: its closing norm included, nothing at 0.

        Runs no hook of the model's.

        Args:
            z: `... x columns`, what goes into its output projection at the width `held`, which holds this one.
            held: None for the dense width, or where z's query heads are those of this width.

        Returns:
            `... x hidden_size`.
        """
        if not units:  # bias and norm leave with the block
            return z.new_zeros(*z.shape[:-1], self.anatomy.hidden_size)
        output, norm = self.output_of(index, block), self._updates[block.kind, index]
        weight, bias = self.output_weight(index, block, units), self.output_bias(index, block, units)
        y = F.linear(block.first_columns(z, units, held), weight, bias)
        return y if norm is output else norm.forward(y)

    @contextmanager
    def active(self, architecture: Architecture) -> Iterator[PreTrainedModel]:
        """The model, computing the sub-network inside the context and the dense network again afterwards.

        Raises:
            ValueError: The model does not stay on its device: nothing can run it as a whole.
        """
        if not self.resident:
            raise ValueError("A model that is brought layer by layer cannot run as a whole.")
        architecture.check(self.anatomy)
        layers = self.anatomy.layers_of(self.model)
        kept = [index for index in range(len(layers)) if architecture.keeps_layer(index)]
        own = self.serving(architecture)
        with ExitStack() as stack:
            for index in kept:
                for block in self.anatomy.blocks:
                    own._narrow(layers[index], index, block, architecture.units(block.kind)[index], stack)
            stack.callback(self.anatomy.set_layers, self.model, layers)
            self.anatomy.set_layers(self.model, nn.ModuleList(layers[index] for index in kept))
            types = getattr(self.model.config, "layer_types", None)
            if types is not None:  # sliding or full attention is looked up by position
                stack.callback(setattr, self.model.config, "layer_types", types)
                self.model.config.layer_types = [types[index] for index in kept]
            attention = self.anatomy.attention
            for place, index in enumerate(index for index in kept if architecture.kv_groups[index]):
                _swap(attention.module_of(layers[index]), "layer_idx", place, stack)  # a key-value cache has no gaps
            yield self.model

    def _narrow(self, layer: nn.Module, index: int, block: Block, units: int, stack: ExitStack) -> None:
        if units == block.units:
            return
        if units == 0:
            for name, module in absent(block).items():
                _swap(layer, name, module, stack)
            return
        module = block.module_of(layer)
        for name, value in block.attributes_at(layer, units).items():
            _swap(module, name, value, stack)
        for name, rows in block.inputs.items():
            _swap(module, name, rows_of(getattr(module, name), rows.prefix(units)), stack)
        narrow = Narrow([self.output_weight(index, block, units)], [self.output_bias(index, block, units)])
        _swap(module, block.places.output, narrow, stack)

    def _reorder_all(self, inverse: bool) -> None:
        """Of a model that stays, every layer."""
        if self.resident:
            for index in range(len(self._layers)):
                self._reorder(index, inverse)

    @torch.no_grad()
    def _reorder(self, index: int, inverse: bool) -> None:
        """Permute the units of a layer's blocks in place; one projection is copied at a time."""
        for block in self.anatomy.blocks:
            orders = self.order(index, block)
            order, heads = (each.argsort() for each in orders) if inverse else orders
            for projection, rows in block.inputs_of(self._layers[index]):
                row_order = rows.of(order, heads)
                matrix_of(projection).copy_(matrix_of(projection)[row_order])
                if projection.bias is not None:
                    projection.bias.copy_(projection.bias[row_order])
            output = matrix_of(self.output_of(index, block))
            output.copy_(output[:, expand_units(heads, block.columns_per_unit // block.queries)])


def _checked(compensation: Refits | None, ranking: Ranking) -> Refits | None:
    if compensation is not None and not compensation.ranking.same(ranking):
        raise InvalidMask("The compensation table was made for another ranking of units.")
    return compensation


def _swap(owner: nn.Module, name: str, value: object, stack: ExitStack) -> None:
    """Set an attribute until `stack` closes. Modules keep their place among their siblings."""
    modules = vars(owner).get("_modules", {})
    if (
        name in modules
    ):  # a search swaps hundreds for each candidate, and torch's checks take as long as a layer's kernels on a GPU
        stack.callback(modules.__setitem__, name, modules[name])
        modules[name] = value
        return
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)
