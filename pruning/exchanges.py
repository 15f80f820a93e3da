"""What widening or narrowing single blocks of a *pruned* model changes: which width exchanges between blocks pay at equal size.

Scores taken at the dense model (`importance`, `sensitivity`) do not know that all other blocks are pruned as well. Here the KL
divergence from the dense model is expanded at the pruned model itself. With u_k = norm(V_k z_k) what a block of width k adds to
the residual stream (`norm`: the one behind the block, if there is one; u_0 = 0), du = u_w - u_k its exact change at width w, D the
dense model's next-token distribution and P the pruned one's,

    first(w)  = E_t [ g_t . du_t ]          g_t: gradient of token t's KL(D || P) by u, zero at the dense model
    second(w) = E_t [ (h_t . du_t)^2 ] / 2  h_t: gradient of -log P(a token drawn from P): the Fisher metric of P

both from one walk there and one back, for all blocks. Gradients by what goes into a norm would not do: at a dropped
block it has slope 1 / sqrt(eps), elsewhere it is blind to scaling.

Terms between different blocks are left out, so an exchange among many blocks changes more than the sum; weighing `second` more
allows for that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pruning.architecture import Architecture
from pruning.block import Block, BlockKind
from pruning.gradients import divergence_gradients
from pruning.likelihood import DenseDistribution, Head, frozen
from pruning.supernet import Supernet
from pruning.walk import Walk, device_of, windows_at_once
from pruning.widths import LACK, attention_width, lacking_of, units_of

ORDERS = 2  # first and second


def exchange_costs(
    supernet: Supernet,
    architecture: Architecture,
    widths: Mapping[BlockKind, Tensor],
    windows: Tensor,
    dense: DenseDistribution,
    generator: torch.Generator,
    batch_size: int | None = None,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[dict[BlockKind, Tensor], Tensor]:
    """Change of KL when one block alone gets another width, all others as in `architecture`, nats per token; and KL as it is.

    Memory: what `pruning.walk.Walk` says, every block at the widest of its widths, what each width changes for a batch's tokens, and
    one refitted weight at a time.

    Args:
        supernet: Open.
        widths: `num_layers x num_widths` units by kind, to try in turn.
        windows: `num_windows x length` token ids.
        dense: The dense model's distribution on them.
        generator: Draws tokens, on the model's device.
        on_layer: Called with the number of layers passed, there and back.

    Returns:
        `num_layers x num_widths x 2` by kind, float32: the two orders. `num_windows` float64 on the CPU.
    """
    model, device = supernet.model, device_of(supernet.model)
    costs = {kind: torch.zeros(*units.shape, ORDERS, device=device) for kind, units in widths.items()}
    widest = Architecture.of(
        *(_widest(architecture.units(block.kind), widths[block.kind]) for block in supernet.anatomy.blocks)
    )
    batch_size = batch_size or windows_at_once(device, windows.shape[1], few=2)
    head, batches, done, predicted = Head.of(model), windows.split(batch_size), count(1), windows.shape[1] - 1
    layers = range(supernet.anatomy.num_hidden_layers)

    with frozen(model):
        walk = Walk(model, batches, keep=len(batches))
        for index in layers:
            if widest.keeps_layer(index):  # also where this one does not: its inputs are wanted
                with supernet.layer(index) as layer, supernet.narrowed(index, architecture):
                    walk.forward(index, layer)
            if on_layer:
                on_layer(next(done))
        first: list[Tensor] = []
        second: list[Tensor] = []
        kls: list[Tensor] = []
        for place, batch in enumerate(batches):
            rows = dense.rows(place * batch_size, place * batch_size + len(batch))
            hidden, read = walk.last_hidden(place, leaf=True)
            # Of every token's own loss, not of the window's mean.
            *both, kl = divergence_gradients(read.detach(), head, rows, generator)
            kls.append(kl)
            for into, part, retain in zip((first, second), both, (True, False), strict=True):
                into.append(*torch.autograd.grad(read, hidden, predicted * part, retain_graph=retain))
        for index in reversed(layers):
            if widest.keeps_layer(index):
                listener = _Listener(supernet, architecture, index, widths, costs)
                with supernet.layer(index) as layer, supernet.narrowed(index, widest), listener.on(layer, widest):
                    walk.backward(index, layer, first, second, on_pass=listener.take_up)
            if on_layer:
                on_layer(next(done))
    return {kind: cost / (windows.shape[0] * predicted) for kind, cost in costs.items()}, torch.cat(kls)


def _widest(kept: Sequence[int], tried: Tensor) -> tuple[int, ...]:
    """The smallest width of each block that holds all of these."""
    each = torch.cat([torch.tensor(kept)[:, None], tried], -1)
    lacking = lacking_of(each).masked_fill(each == 0, LACK).amin(-1) % LACK  # what is dropped lacks nothing
    return tuple(attention_width(units_of(each).amax(-1), lacking).tolist())


class _Listener:
    """Makes a layer of the widest model compute `architecture`, and collects `costs` when it is walked back."""

    def __init__(
        self,
        supernet: Supernet,
        architecture: Architecture,
        index: int,
        widths: Mapping[BlockKind, Tensor],
        costs: Mapping[BlockKind, Tensor],
    ) -> None:
        self._supernet, self._architecture, self._index = supernet, architecture, index
        self._widths, self._costs = widths, costs
        self._order = 0

    def take_up(self, order: int) -> None:
        """Which of the two orders the gradients that come now belong to."""
        self._order = order

    @contextmanager
    def on(self, layer: nn.Module, widest: Architecture) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self._supernet.anatomy.blocks:
                if widest.units(block.kind)[self._index]:
                    for handle in self._narrowed(layer, block, widest.units(block.kind)[self._index]):
                        stack.callback(handle.remove)
            yield

    def _narrowed(self, layer: nn.Module, block: Block, held: int) -> Iterator[RemovableHandle]:
        own = self._architecture.units(block.kind)[self._index]
        tried = self._widths[block.kind][self._index]
        others = [units for units in dict.fromkeys(tried.tolist()) if units != own]
        into = self._costs[block.kind][self._index]
        update = partial(self._supernet.update, self._index, block, held=held)
        passing: list[Tensor] = []  # z on its way to the residual stream

        def keep(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            passing.append(args[0])

        def narrow(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            live = passing.pop()
            u = update(live, own)
            z, before, changes = live.detach(), u.detach(), dict[int, Tensor]()

            def on_gradient(gradient: Tensor) -> None:
                for units in others:
                    if units not in changes:
                        changes[units] = update(z, units) - before
                    change = (gradient * changes[units]).float().sum(-1)
                    into[tried == units, self._order] += change.square().sum() / 2 if self._order else change.sum()

            u.requires_grad_()  # what a dropped block adds depends on nothing
            u.register_hook(on_gradient)
            return u

        yield block.output_of(layer).register_forward_hook(keep)
        yield block.update_of(layer).register_forward_hook(narrow)
