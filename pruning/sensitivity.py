"""Block sensitivity: what each width of a block costs *after* its refit, all others dense. Allocation scores for a compensated model.

Scores of single units (`importance.fisher`) overstate the cost of removing what the refit can rebuild from its neighbours. Here
the refitted block itself is judged. With z the inputs of an output projection W, z_K those of the best-ranked units, V the
refitted weight of that width and g_t the gradient of a token's loss with respect to y = W z,

    sensitivity(width) = E_t [ (g_t . (V z_K - W z))^2 ] / 2        nats per token

the second-order KL divergence from the dense model, token by token (as in `importance.fisher`, Theis et al. 2018,
arXiv:1801.05787; its first-order term vanishes at the dense model). A block that
is dropped loses all that it adds to the residual stream, bias and closing norm included. Tokens drawn from the
model's own predictions give the true Fisher metric, which allocates better than the text's own tokens (Kunstner et al. 2019,
arXiv:1905.12558, on why they differ).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from pruning.block import Block, BlockKind
from pruning.gradients import loss_gradient
from pruning.likelihood import Head, frozen
from pruning.supernet import Supernet
from pruning.walk import Walk, device_of, windows_at_once

Widths = Mapping[BlockKind, Sequence[int]]


def block_sensitivity(
    supernet: Supernet,
    windows: Tensor,
    widths: Widths,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> dict[BlockKind, Tensor]:
    """What every block alone costs at each of `widths`, all others dense: `num_layers x len(widths)` by kind, float32.

    One walk there and one back without weight gradients, and one product with the refitted weight for each width and batch.

    Memory: what `pruning.walk.Walk` says, and one refitted weight at a time.

    Args:
        supernet: Open.
        windows: `num_windows x length` token ids. Costs do not depend on `batch_size`.
        generator: Draws the tokens whose loss is taken, on the model's device; without it the text's own are taken.
        on_layer: Called with the number of layers passed, there and back.
    """
    model, anatomy, device = supernet.model, supernet.anatomy, device_of(supernet.model)
    costs: dict[BlockKind, Tensor] = {
        block.kind: torch.zeros(anatomy.num_hidden_layers, len(widths[block.kind]), device=device)
        for block in anatomy.blocks
    }
    batch_size = batch_size or windows_at_once(device, windows.shape[1], few=2)
    head, batches, done = Head.of(model), windows.split(batch_size), count(1)
    layers = range(anatomy.num_hidden_layers)
    with frozen(model):
        walk = Walk(model, batches, keep=len(batches))
        for index in layers:
            with supernet.layer(index) as layer:
                walk.forward(index, layer)
            if on_layer:
                on_layer(next(done))
        gradients = [
            walk.last_gradient(place, partial(loss_gradient, head=head, windows=batch.to(device), generator=generator))
            for place, batch in enumerate(batches)
        ]
        for index in reversed(layers):
            with supernet.layer(index) as layer, _listening(supernet, index, layer, widths, costs, windows.shape[1]):
                walk.backward(index, layer, gradients)
            if on_layer:
                on_layer(next(done))
    return {kind: cost / (2 * windows.numel()) for kind, cost in costs.items()}


@contextmanager
def _listening(
    supernet: Supernet,
    index: int,
    layer: nn.Module,
    widths: Widths,
    costs: Mapping[BlockKind, Tensor],
    length: int,
) -> Iterator[None]:
    """Add to `costs` from hooks while a layer is differentiated on windows of `length` tokens; nothing waits for the device."""
    with ExitStack() as stack:
        for block in supernet.anatomy.blocks:
            columns = dict(zip(widths[block.kind], costs[block.kind][index], strict=True))
            keep, follow = _listeners(supernet, index, block, columns, length - 1)
            stack.callback(block.output_of(layer).register_forward_hook(keep).remove)
            stack.callback(block.update_of(layer).register_forward_hook(follow).remove)
        yield


def _listeners(
    supernet: Supernet, index: int, block: Block, costs: Mapping[int, Tensor], predicted: int
) -> tuple[Callable[[nn.Module, tuple[Tensor], Tensor], None], Callable[[nn.Module, tuple[Tensor], Tensor], None]]:
    """A hook on the output projection, and one on what the block adds to the residual stream, which fills `costs` by width."""
    passing: list[Tensor] = []  # z on its way to the residual stream

    def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        passing.append(args[0].detach())

    def follow(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        z, dense = passing.pop(), output.detach()

        def on_gradient(gradient: Tensor) -> None:
            gradient = gradient * predicted  # of the token's own loss, not of the window's mean
            for units, cost in costs.items():
                if units == block.units:
                    continue  # dense
                change = gradient * (supernet.update(index, block, z, units) - dense)
                cost += change.float().sum(-1).square().sum()

        output.register_hook(on_gradient)

    return keep, follow
