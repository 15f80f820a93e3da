"""Sums over calibration windows, from a walk through the dense model: all that scores and refits need of the text
and the weights.

L: decoder layers.   U: units of a block (KV groups or neurons).   C: columns of its output projection.
z: input of the output projection, `tokens x C`; zeroing a unit's columns of z is what removing the unit means.
g: gradient of a window's mean next-token loss (nats) with respect to z.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain, count

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.block import Block, BlockKind
from pruning.gradients import loss_gradient
from pruning.likelihood import Head, frozen
from pruning.projection import Projection, matrix_of
from pruning.walk import Walk, brought, device_of

GRAM_BLOCK = 192  # columns of a Gram matrix that are added to at a time


@dataclass
class BlockStatistics:
    """Sums over calibration tokens for all blocks of one kind, float32 on the model's device.

    Args:
        total: `L x C` sum of z.
        square: `L x C` sum of z^2.
        gram: Layer -> `C x C`, the sum of z zT (4 C^2 bytes each: 9 MB for an MLP of SmolLM2's, 822 MB for one of an 8B model's);
            none where no refit asks for them.
        fisher: `L x U` sum over tokens of (z g)^2, z g summed over the unit's columns first and g scaled to one token's loss.
        taylor: `L x U` sum over windows, and over the unit's columns, of |sum over tokens of z g|.
        cosine: `L` sum over tokens of the cosine between the residual stream before and after the block.
        column_norms: `L x C` squared norms of the output projection's columns.
        magnitude: `L x U` squared norms of all weights of a unit.
    """

    total: Tensor
    square: Tensor
    gram: dict[int, Tensor]
    taylor: Tensor
    fisher: Tensor
    cosine: Tensor
    column_norms: Tensor
    magnitude: Tensor

    @classmethod
    def empty(cls, layers: int, block: Block, device: torch.device) -> "BlockStatistics":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return cls(
            total=zeros(layers, block.columns),
            square=zeros(layers, block.columns),
            gram={},
            taylor=zeros(layers, block.units),
            fisher=zeros(layers, block.units),
            cosine=zeros(layers),
            column_norms=zeros(layers, block.columns),
            magnitude=zeros(layers, block.units),
        )


@dataclass
class Statistics:
    """What one pass over the calibration windows leaves behind; every score is a function of this and the weights.

    Args:
        num_scored_windows: Windows that had a backward pass: `taylor` and `fisher` are sums over these alone.
    """

    anatomy: Anatomy
    blocks: dict[BlockKind, BlockStatistics]
    layer_cosine: Tensor
    num_windows: int
    num_tokens: int
    num_scored_windows: int
    num_scored_tokens: int

    @classmethod
    def empty(cls, model: PreTrainedModel, windows: Tensor, scored: int) -> "Statistics":
        """Nothing summed yet, over `num_windows x length` token ids of which the first `scored` windows tell scores."""
        anatomy, device = anatomy_of(model), device_of(model)
        return cls(
            anatomy=anatomy,
            blocks={
                block.kind: BlockStatistics.empty(anatomy.num_hidden_layers, block, device) for block in anatomy.blocks
            },
            layer_cosine=torch.zeros(anatomy.num_hidden_layers, device=device),
            num_windows=len(windows),
            num_tokens=windows.numel(),
            num_scored_windows=scored,
            num_scored_tokens=windows[:scored].numel(),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """All but the Gram matrices, for `pruning.tensor_files`."""
        counts = (self.num_windows, self.num_tokens, self.num_scored_windows, self.num_scored_tokens)
        found = {"counts": torch.tensor(counts), "layer_cosine": self.layer_cosine}
        return found | {
            f"{kind}.{item.name}": getattr(sums, item.name)
            for kind, sums in self.blocks.items()
            for item in fields(sums)
            if item.name != "gram"
        }

    @classmethod
    def from_tensors(cls, anatomy: Anatomy, tensors: Mapping[str, Tensor], device: torch.device) -> "Statistics":
        """What `to_tensors` gave."""
        blocks: dict[BlockKind, BlockStatistics] = {
            block.kind: BlockStatistics(
                gram={},
                **{
                    item.name: tensors[f"{block.kind}.{item.name}"].to(device)
                    for item in fields(BlockStatistics)
                    if item.name != "gram"
                },
            )
            for block in anatomy.blocks
        }
        return cls(anatomy, blocks, tensors["layer_cosine"].to(device), *tensors["counts"].tolist())


def collect_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 2,
    on_layer: Callable[[int], None] | None = None,
    scored: int | None = None,
    grams: Callable[[int], bool] = lambda layer: True,
    on_sums: Callable[[Statistics, int, nn.Module], None] | None = None,
) -> Statistics:
    """One walk over `windows` and one back over some of them; no weight gradients.

    Memory: what `Walk` says, and the Gram matrices of all layers, or of a single one where `on_sums` takes them.

    Args:
        windows: `num_windows x length` token ids.
        batch_size: Windows per pass. Results do not depend on it: the loss is averaged within each window only.
        scored: Only the first so many windows are walked back; by default all. Scores of units settle on fewer tokens
            than the Gram matrices do, which have `C^2` entries.
        on_layer: Called with the number of layers done, out of `steps(...)`.
        grams: Of which layers the Gram matrices are summed, which refits need and nothing else does.
        on_sums: Called with each layer (on the device) once its sums are complete; what it pops of the Gram matrices is freed.
    """
    scored = len(windows) if scored is None else scored
    statistics = Statistics.empty(model, windows, scored)
    layers = list(enumerate(statistics.anatomy.layers_of(model)))
    device, done = device_of(model), count(1)
    batches = [part.split(batch_size) for part in (windows[:scored], windows[scored:]) if len(part)]
    with frozen(model):
        walk = Walk(model, list(chain.from_iterable(batches)), keep=-(-scored // batch_size))
        for index, layer in layers:
            with brought(layer, device):
                with _summing(layer, statistics, index, windows.shape[1], grams(index)):
                    walk.forward(index, layer)
                _add_norms(statistics, index, layer)
                for block in statistics.blocks.values():
                    if index in block.gram:
                        mirror_lower(block.gram[index])
                if on_sums:
                    on_sums(statistics, index, layer)
            if on_layer:
                on_layer(next(done))
        if scored:
            head = Head.of(model)
            gradients = [
                walk.last_gradient(place, partial(loss_gradient, head=head, windows=batch.to(device)))
                for place, batch in enumerate(batches[0])
            ]
            for index, layer in reversed(layers):
                with brought(layer, device), _scoring(layer, statistics, index, windows.shape[1]):
                    walk.backward(index, layer, gradients)
                if on_layer:
                    on_layer(next(done))
    return statistics


def steps(num_hidden_layers: int, scored: bool = True) -> int:
    """Layers that `collect_statistics` passes."""
    return num_hidden_layers * (1 + scored)


@contextmanager
def _summing(layer: nn.Module, statistics: Statistics, index: int, length: int, grams: bool) -> Iterator[None]:
    """Fill sums from hooks while a layer runs on windows of `length` tokens; nothing waits for the device."""
    with ExitStack() as stack:
        listen = _layer_listener(statistics.layer_cosine, index)
        stack.callback(layer.register_forward_hook(listen, with_kwargs=True).remove)
        for block in statistics.anatomy.blocks:
            sums, output, update = statistics.blocks[block.kind], block.output_of(layer), block.update_of(layer)
            if grams:
                sums.gram[index] = torch.zeros(block.columns, block.columns, device=sums.square.device)
            stack.callback(output.register_forward_pre_hook(_sum_listener(sums, block, index)).remove)
            keep, compare = _residual_listeners(sums, index, statistics.anatomy.residual_scale)
            stack.callback(block.entrance_of(layer).register_forward_pre_hook(keep).remove)
            stack.callback(update.register_forward_hook(compare).remove)
        yield


def _sum_listener(sums: BlockStatistics, block: Block, index: int) -> Callable[..., None]:
    def listen(module: nn.Module, args: tuple[Tensor]) -> None:
        z = args[0].reshape(-1, block.columns)  # OPT flattens its tokens
        sums.total[index] += z.sum(0, dtype=torch.float32)
        sums.square[index] += (
            z.float().square().sum(0)
        )  # not the matrix's diagonal: equal with and without one, bit for bit
        if index in sums.gram:
            add_lower(sums.gram[index], z)

    return listen


@contextmanager
def _scoring(layer: nn.Module, statistics: Statistics, index: int, length: int) -> Iterator[None]:
    """Fill scores from hooks while a layer is differentiated on windows of `length` tokens."""
    with ExitStack() as stack:
        for block in statistics.anatomy.blocks:
            sums, output, update = statistics.blocks[block.kind], block.output_of(layer), block.update_of(layer)
            listen, follow = _score_listeners(sums, block, index, length, output)
            stack.callback(output.register_forward_pre_hook(listen).remove)
            if update is not output:
                stack.callback(update.register_forward_hook(follow).remove)
        yield


def _score_listeners(
    sums: BlockStatistics, block: Block, index: int, length: int, output: Projection
) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook before the output projection, and one on the norm behind it where there is one.

    A norm undoes any scaling of its input x, so the derivative by a gate on all of a block is zero and that on one of two
    KV groups half of what it should be, though removing them is not nothing. So gates act on its output y with the norm's
    own scale y/x held at the dense model's; then they add up to the gate on the block's update. Gradients that go on to
    earlier layers stay exact.
    """
    passing: list[Tensor] = []  # z on its way to the norm

    def add(z: Tensor, grad: Tensor) -> None:
        # B x T x C: the share of every column's dL/dgate that arises at this token
        gate = (z * grad.reshape(z.shape)).float()
        sums.taylor[index] += block.per_unit(gate.sum(1).abs().sum(0))
        sums.fisher[index] += (block.per_unit(gate) * (length - 1)).pow(2).sum((0, 1))

    def listen(module: nn.Module, args: tuple[Tensor]) -> None:
        # Detached: a hook that held the live tensor would keep the whole graph in a cycle.
        z = args[0].detach().reshape(-1, length, block.columns)  # B x T x C
        if block.places.post_norm:
            passing.append(z)
        else:
            args[0].register_hook(lambda grad: add(z, grad))

    def follow(norm: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        z, scale = passing.pop(), (y / args[0]).detach().nan_to_num(0.0, 0.0, 0.0)
        weight = matrix_of(output)
        y.register_hook(lambda grad: add(z, (grad * scale) @ weight))

    return listen, follow


@torch.no_grad()
def add_lower(gram: Tensor, tokens: Tensor) -> None:
    """Add zT z to the lower half of `gram`, and to some more: nearly half the work is saved, as it is symmetric."""
    tokens = tokens.to(gram.dtype)
    for first in range(0, len(gram), GRAM_BLOCK):
        block = slice(first, first + GRAM_BLOCK)
        gram[first:, block].addmm_(tokens[:, first:].T, tokens[:, block])


@torch.no_grad()
def _add_norms(statistics: Statistics, index: int, layer: nn.Module) -> None:
    for block in statistics.anatomy.blocks:
        sums = statistics.blocks[block.kind]
        sums.column_norms[index] = matrix_of(block.output_of(layer)).float().pow(2).sum(0)
        sums.magnitude[index] = block.per_unit(sums.column_norms[index])
        for projection, rows in block.inputs_of(layer):
            norms = matrix_of(projection).float().pow(2).sum(-1)
            for part in rows.prefix(block.units):
                sums.magnitude[index] += norms[part].view(block.units, -1).sum(-1)


def mirror_lower(gram: Tensor) -> None:
    """Complete what `add_lower` has summed."""
    gram.tril_().add_(gram.tril(-1).T)


def _layer_listener(cosine: Tensor, index: int) -> Callable[..., None]:
    def listen(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        cosine[index] += _cosines(before, after)

    return listen


def _residual_listeners(
    sums: BlockStatistics, index: int, scale: float
) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook before the block that keeps the residual stream, and one on what is added to it that compares."""
    residual: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        residual.append(args[0].detach())

    def compare(module: nn.Module, args: tuple[Tensor, ...], update: Tensor) -> None:
        before = residual.pop()
        sums.cosine[index] += _cosines(before, before + scale * update.detach())

    return keep, compare


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    return F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).sum()
