"""What widening or narrowing single blocks of a *pruned* model changes: which width exchanges between blocks pay at equal size.

Scores taken at the dense model (`importance`, `sensitivity`) do not know that all other blocks are pruned as well. Here the KL
divergence from the dense model is expanded at the pruned model itself. With u_k = norm(V_k z_k) what a block of width k adds to
the residual stream (`norm`: the one behind the block, if there is one; u_0 = 0), du = u_w - u_k its exact change at width w, D the
dense model's next-token distribution and P the pruned one's,

    first(w)  = E_t [ g_t . du_t ]          g_t: gradient of token t's KL(D || P) by u, zero at the dense model
    second(w) = E_t [ (h_t . du_t)^2 ] / 2  h_t: gradient of -log P(a token drawn from P): the Fisher metric of P

both from one forward pass and two backward passes, for all blocks. Gradients by what goes into a norm would not do: at a dropped
block it has slope 1 / sqrt(eps), elsewhere it is blind to scaling.

Terms between different blocks are left out, so an exchange among many blocks changes more than the sum; weighing `second` more
allows for that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.anatomy import Block, BlockKind
from pruning.architecture import Architecture
from pruning.likelihood import DenseDistribution, Head, divergence_gradients, frozen, last_hidden
from pruning.supernet import Supernet

ORDERS = 2  # first and second


def exchange_costs(
    supernet: Supernet,
    architecture: Architecture,
    widths: Mapping[BlockKind, Tensor],
    windows: Tensor,
    dense: DenseDistribution,
    generator: torch.Generator,
    batch_size: int = 2,
    on_window: Callable[[int], None] | None = None,
) -> dict[BlockKind, Tensor]:
    """Change of KL when one block alone gets another width, all others as in `architecture`, nats per token.

    Memory: activations of `batch_size` windows of the architecture with every block at the widest of its widths.

    Args:
        supernet: Open.
        widths: `num_layers x num_widths` units by kind, to try in turn.
        windows: `num_windows x length` token ids.
        dense: The dense model's distribution on them.
        generator: Draws tokens, on the model's device.
        on_window: Called with the number of windows done.

    Returns:
        `num_layers x num_widths x 2` by kind, float32: the two orders.
    """
    model = supernet.model
    costs = {kind: torch.zeros(*units.shape, ORDERS, device=model.device) for kind, units in widths.items()}
    widest = Architecture(
        _widest(architecture.kv_groups, widths["attention"]), _widest(architecture.neurons, widths["mlp"])
    )
    head = Head.of(model)
    done = 0
    with (
        supernet.active(widest),
        frozen(model),
        torch.enable_grad(),
        _listening(supernet, architecture, widest, widths, costs, windows.shape[1] - 1) as pass_back,
    ):
        for batch in windows.split(batch_size):
            hidden = last_hidden(model, batch.to(model.device), leaf=True)
            first, second = divergence_gradients(hidden, head, dense.rows(done, done + len(batch)), generator)
            pass_back(0, hidden, first, retain_graph=True)
            pass_back(1, hidden, second)
            done += len(batch)
            if on_window:
                on_window(done)
    return {kind: cost / (windows.shape[0] * (windows.shape[1] - 1)) for kind, cost in costs.items()}


def _widest(kept: Sequence[int], tried: Tensor) -> tuple[int, ...]:
    return tuple(torch.cat([torch.tensor(kept)[:, None], tried], -1).amax(-1).tolist())


@contextmanager
def _listening(
    supernet: Supernet,
    architecture: Architecture,
    widest: Architecture,
    widths: Mapping[BlockKind, Tensor],
    costs: Mapping[BlockKind, Tensor],
    predicted: int,
) -> Iterator[Callable[..., None]]:
    """Make the widest model compute `architecture`, and collect `costs` whenever the yielded function runs backward."""
    order = 0

    def pass_back(of: int, hidden: Tensor, gradient: Tensor, **options: bool) -> None:
        nonlocal order
        order = of
        hidden.backward(gradient * predicted, **options)  # of every token's own loss, not of the window's mean

    def narrowed(index: int, layer: nn.Module, block: Block) -> Iterator[RemovableHandle]:
        own = architecture.units(block.kind)[index]
        tried = widths[block.kind][index].tolist()
        into, update = costs[block.kind][index], partial(supernet.update, index, block)
        passing: list[Tensor] = []  # z on its way to the residual stream

        def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            passing.append(args[0])

        def narrow(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            live = passing.pop()
            u = update(live, own)
            z, before = live.detach(), u.detach()

            def on_gradient(gradient: Tensor) -> None:
                for column, units in enumerate(tried):
                    if units != own:
                        change = (gradient * (update(z, units) - before)).float().sum(-1)
                        into[column, order] += change.square().sum() / 2 if order else change.sum()

            u.requires_grad_()  # what a dropped block adds depends on nothing
            u.register_hook(on_gradient)
            return u

        yield block.output_of(layer).register_forward_hook(keep)
        yield block.update_of(layer).register_forward_hook(narrow)

    handles = [
        handle
        for index, layer in _layers(supernet, widest)
        for block in supernet.anatomy.blocks
        if widest.units(block.kind)[index]
        for handle in narrowed(index, layer, block)
    ]
    try:
        yield pass_back
    finally:
        for handle in handles:
            handle.remove()


def _layers(supernet: Supernet, active: Architecture) -> Iterator[tuple[int, nn.Module]]:
    """Layers of the active model, with their index in the dense one."""
    kept = [index for index in range(supernet.anatomy.num_hidden_layers) if active.keeps_layer(index)]
    return zip(kept, supernet.anatomy.layers_of(supernet.model), strict=True)
