"""Sums over calibration windows, from one pass of the dense model: all that scores and refits need of the text.

L: decoder layers.   U: units of a block (KV groups or neurons).   C: columns of its output projection.
z: input of the output projection, `tokens x C`; zeroing a unit's columns of z is what removing the unit means.
g: gradient of a window's mean next-token loss (nats) with respect to z.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, Block, BlockKind, anatomy_of
from pruning.likelihood import Head, frozen, last_hidden, loss_gradient
from pruning.projection import Projection, matrix_of

GRAM_BLOCK = 192  # columns of a Gram matrix that are added to at a time


@dataclass
class BlockStatistics:
    """Sums over calibration tokens for all blocks of one kind, float32 on the model's device.

    Args:
        total: `L x C` sum of z.
        square: `L x C` sum of z^2.
        gram: L matrices `C x C`, the sum of z zT (4 L C^2 bytes: 283 MB for SmolLM2's MLPs, 26 GB for an 8B model's); none where
            no refit asks for them.
        fisher: `L x U` sum over tokens of (z g)^2, z g summed over the unit's columns first and g scaled to one token's loss.
        taylor: `L x U` sum over windows, and over the unit's columns, of |sum over tokens of z g|.
        cosine: `L` sum over tokens of the cosine between the residual stream before and after the block.
    """

    total: Tensor
    square: Tensor
    gram: list[Tensor]
    taylor: Tensor
    fisher: Tensor
    cosine: Tensor

    @classmethod
    def empty(cls, layers: int, block: Block, device: torch.device, grams: bool) -> "BlockStatistics":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return cls(
            total=zeros(layers, block.columns),
            square=zeros(layers, block.columns),
            gram=[zeros(block.columns, block.columns) for _ in range(layers * grams)],
            taylor=zeros(layers, block.units),
            fisher=zeros(layers, block.units),
            cosine=zeros(layers),
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
    num_windows: int = 0
    num_tokens: int = 0
    num_scored_windows: int = 0
    num_scored_tokens: int = 0


def collect_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 2,
    on_window: Callable[[int], None] | None = None,
    scored: int | None = None,
    grams: bool = True,
) -> Statistics:
    """One forward and backward pass over `windows`; no weight gradients, so it costs about two forward passes.

    Args:
        windows: `num_windows x length` token ids.
        batch_size: Windows per pass. Results do not depend on it: the loss is averaged within each window only.
        scored: Only the first so many windows have a backward pass; by default all. Scores of units settle on fewer tokens
            than the Gram matrices do, which have `C^2` entries.
        on_window: Called with the number of windows done.
        grams: Sum the Gram matrices, which refits need and nothing else does.
    """
    anatomy = anatomy_of(model)
    device = model.device
    statistics = Statistics(
        anatomy=anatomy,
        blocks={
            block.kind: BlockStatistics.empty(anatomy.num_hidden_layers, block, device, grams)
            for block in anatomy.blocks
        },
        layer_cosine=torch.zeros(anatomy.num_hidden_layers, device=device),
    )
    head = Head.of(model)
    scored = len(windows) if scored is None else scored
    with frozen(model), _listening(model, statistics, windows.shape[1]):
        parts = [part.split(batch_size) for part in (windows[:scored], windows[scored:]) if len(part)]
        for batch in chain.from_iterable(parts):
            backward = statistics.num_windows < scored
            batch = batch.to(device)
            with torch.set_grad_enabled(backward):
                hidden = last_hidden(model, batch, leaf=backward)
            if backward:
                hidden.backward(loss_gradient(hidden, head, batch))
                statistics.num_scored_windows += len(batch)
                statistics.num_scored_tokens += batch.numel()
            statistics.num_windows += len(batch)
            statistics.num_tokens += batch.numel()
            if on_window:
                on_window(statistics.num_windows)
    for block in statistics.blocks.values():
        for gram in block.gram:
            _mirror_lower(gram)
    return statistics


@contextmanager
def _listening(model: PreTrainedModel, statistics: Statistics, length: int) -> Iterator[None]:
    """Fill `statistics` from hooks while the model runs on windows of `length` tokens; nothing waits for the device."""
    anatomy = statistics.anatomy
    with ExitStack() as stack:
        for index, layer in enumerate(anatomy.layers_of(model)):
            stack.callback(
                layer.register_forward_hook(_layer_listener(statistics.layer_cosine, index), with_kwargs=True).remove
            )
            for block in anatomy.blocks:
                sums, output, update = statistics.blocks[block.kind], block.output_of(layer), block.update_of(layer)
                listen, follow = _block_listeners(sums, block, index, length, output)
                stack.callback(output.register_forward_pre_hook(listen).remove)
                if update is not output:
                    stack.callback(update.register_forward_hook(follow).remove)
                keep, compare = _residual_listeners(sums, index)
                stack.callback(block.norm_of(layer).register_forward_pre_hook(keep).remove)
                stack.callback(update.register_forward_hook(compare).remove)
        yield


def _block_listeners(
    sums: BlockStatistics, block: Block, index: int, length: int, output: Projection
) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook before the output projection that fills `sums`, and one on the norm behind it where there is one.

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
        # Detached: a hook that held the live tensor would keep the whole graph in a cycle. Reshaped: OPT flattens its tokens.
        z = args[0].detach().reshape(-1, length, block.columns)  # B x T x C
        tokens = z.flatten(0, 1).float()
        sums.total[index] += tokens.sum(0)
        if sums.gram:
            _add_lower(sums.gram[index], tokens)
            sums.square[index] = sums.gram[index].diagonal()
        else:
            sums.square[index] += tokens.square().sum(0)
        if not args[0].requires_grad:  # a window without a backward pass
            return
        if block.places.post_norm:
            passing.append(z)
        else:
            args[0].register_hook(lambda grad: add(z, grad))

    def follow(norm: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if not y.requires_grad:
            return
        z, scale = passing.pop(), (y / args[0]).detach().nan_to_num(0.0, 0.0, 0.0)
        weight = matrix_of(output)
        y.register_hook(lambda grad: add(z, (grad * scale) @ weight))

    return listen, follow


def _add_lower(gram: Tensor, tokens: Tensor) -> None:
    """Add zT z to the lower half of `gram`, and to some more: nearly half the work is saved, as it is symmetric."""
    for first in range(0, len(gram), GRAM_BLOCK):
        block = slice(first, first + GRAM_BLOCK)
        gram[first:, block].addmm_(tokens[:, first:].T, tokens[:, block])


def _mirror_lower(gram: Tensor) -> None:
    gram.tril_().add_(gram.tril(-1).T)


def _layer_listener(cosine: Tensor, index: int) -> Callable[..., None]:
    def listen(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        cosine[index] += _cosines(before, after)

    return listen


def _residual_listeners(sums: BlockStatistics, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook before the block's norm that keeps the residual stream, and one on what is added to it that compares."""
    residual: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        residual.append(args[0].detach())

    def compare(module: nn.Module, args: tuple[Tensor, ...], update: Tensor) -> None:
        before = residual.pop()
        sums.cosine[index] += _cosines(before, before + update.detach())

    return keep, compare


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    return F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).sum()
