"""What a pruned residual stream hands the blocks of a layer, and what the dense one has behind them: what refits are fitted to."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from pruning.block import Block, BlockKind
from pruning.statistics import add_lower, mirror_lower
from pruning.walk import Walk


def goals_behind(
    walk: Walk, index: int, layer: nn.Module, blocks: Sequence[Block], scale: float
) -> dict[BlockKind, list[Tensor]]:
    """Let a stream pass a layer: what it is behind each of the blocks, batch by batch, or what goes into the norm behind the block.

    Args:
        blocks: All that the layer has.
        scale: As in `refit_block`.
    """
    streams, written = list(walk.hidden), {block.kind: list[Tensor]() for block in blocks}
    with ExitStack() as stack:
        for block in blocks:
            keep = partial(_keep, written[block.kind], streams[0].device)
            stack.callback(block.output_of(layer).register_forward_hook(keep).remove)
        walk.forward(index, layer)
    for block in blocks:
        if not block.places.post_norm:
            outputs = written[block.kind]
            for batch, y in enumerate(outputs):
                written_now = scale * y.view_as(streams[batch])  # OPT flattens its tokens
                outputs[batch] = streams[batch] = streams[batch] + written_now
    return written


def _keep(kept: list[Tensor], home: torch.device, module: nn.Module, args: object, y: Tensor) -> None:
    kept.append(y.to(home))


class Reached(Exception):
    """The output projection of the block that is fitted: what follows in the layer is not needed."""

    def __init__(self, z: Tensor) -> None:
        self.z = z


def reached(
    walk: Walk, index: int, layer: nn.Module, block: Block, attention: Block | None, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch by batch, the stream before a block, where the walk keeps it, and z, what goes into the block's output projection.

    Args:
        walk: Of the pruned stream, before the layer.
        attention: The layer's, where it adds to the stream before this block does.
        scale: What blocks give is multiplied by it before it is added to the stream.
    """

    def reach(module: nn.Module, args: tuple[Tensor]) -> None:
        raise Reached(args[0])

    added: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(block.output_of(layer).register_forward_pre_hook(reach).remove)
        if attention is not None:
            keep = partial(_keep, added, walk.hidden[0].device)
            stack.callback(attention.update_of(layer).register_forward_hook(keep).remove)
        for hidden in list(walk.hidden):
            try:
                walk.through(index, layer, hidden)
            except Reached as found:
                z = found.z.flatten(0, -2)
            yield hidden + scale * added.pop().view_as(hidden) if added else hidden, z


def moments(
    inputs: Iterable[tuple[Tensor, Tensor]],
    goals: Sequence[Tensor],
    block: Block,
    affine: Tensor,
    biased: bool,
    scale: float,
) -> tuple[Tensor, Tensor, int]:
    """Second moments of what goes into a block's output projection, `C x C`, and with what is to come out, `C x hidden_size`; over how
    many tokens.

    Args:
        inputs: As `reached` gives them.
        goals: As `goals_behind` has them.
        affine: `hidden_size x C`, for its shape, dtype and device.
        biased: An input that is 1 everywhere comes first among the C.
        scale: As for `reached`.
    """
    gram, cross, tokens = affine.new_zeros(2 * affine.shape[1:]), torch.zeros_like(affine.T), 0
    for (stream, z), goal in zip(inputs, goals, strict=True):
        z, target = z.to(affine.device), goal.to(affine).flatten(0, -2)
        if not block.places.post_norm:
            target = (target - stream.to(affine).view_as(target)) / scale
        if biased:
            z = torch.cat([z.new_ones(len(z), 1), z], dim=1)
        add_lower(gram, z)
        cross.addmm_(z.T.to(affine), target)
        tokens += len(z)
    mirror_lower(gram)
    return gram.div_(tokens), cross.div_(tokens), tokens
