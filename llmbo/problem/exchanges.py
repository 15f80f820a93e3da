"""Width exchanges: members of the allocation path are measured, block by block, and the path corrected by what that says."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from llmbo.problem.expansion import ONE_LEVEL, STEPS, best_exchanges, expansions, informed
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.kept import digest
from llmbo.problem.method import DEFAULT, Method
from llmbo.problem.prices import Prices
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.exchanges import ORDERS, exchange_costs
from pruning.statistics import steps
from pruning.supernet import Supernet

# Exchanges are made to lower KL. They are dropped where it is more than so many times what it was, measured on the same tokens,
# and by more than so many nats.
LOSS_OF_EXCHANGES = 1.2
UNSEEN = 0.01

Tensors = Mapping[Any, torch.Tensor]
Measure = Callable[[torch.Generator], Tensors]
Keep = Callable[[str, Tensors, Measure], Tensors]  # a part's name, what has its shapes, and how to measure it


def with_exchanges(
    family: ThresholdFamily,
    prices: Prices,
    supernet: Supernet,
    windows: torch.Tensor,
    sensitivity: Mapping[BlockKind, torch.Tensor],
    keep: Keep,
    on_layer: Callable[[int], None],
    method: Method = DEFAULT,
    tell: Callable[[str], None] = lambda line: None,
) -> ThresholdFamily:
    """The family of the method's recipe, which weighs what a level more or less of each block changes in some members; it keeps that.

    What an anchor's exchanges bring is measured on half of the windows: where they lose, the expansion that promised a gain was wrong,
    and is dropped with them.

    Args:
        family: Of the method's recipe, `bare`; some of its members are measured.
        prices: What its path was made from.
        windows: `num_windows x length` token ids, to measure these changes on.
        sensitivity: Of the dense model's blocks, `num_layers x levels` by kind.
        keep: Takes each measurement from where it is kept, or makes it.
        tell: Is told in one line of exchanges that are dropped.
    """
    space = family.space
    low = float(family.shares[0])
    anchors = list(dict.fromkeys(family.at(low + (1 - low) * part) for part in method.anchors))
    anchors = [x for x in anchors if x != space.max_levels]
    exchanges, sound, measured = dict[tuple[int, ...], torch.Tensor](), [], []
    half = (len(windows) + 1) // 2
    dense = cache(partial(supernet.distribution, windows))

    def kl_of(windows: int) -> dict[str, torch.Tensor]:
        return {"kl": torch.empty(windows, dtype=torch.float64)}

    def kl_at(architecture: Architecture, drawn: torch.Generator) -> Tensors:
        found = supernet.qualities([architecture], windows[:half], dense().rows(0, half))[0].kl
        assert found is not None
        return {"kl": found}

    def costs_at(
        x: tuple[int, ...], tried: Mapping[BlockKind, torch.Tensor], before: int, drawn: torch.Generator
    ) -> Tensors:
        def advance(done: int) -> None:
            on_layer(before + done)

        costs, kl = exchange_costs(supernet, space.decode(x), tried, windows, dense(), drawn, on_layer=advance)
        return {**costs, "kl": kl}

    for index, x in enumerate(anchors):
        tried = space.neighbouring_widths(x, STEPS)
        measure = partial(costs_at, x, tried, index * steps(space.num_layers))
        like = empty({kind: (*units.shape, ORDERS) for kind, units in tried.items()}) | kl_of(len(windows))
        costs = keep(f"exchange_{digest(space.decode(x).to_dict(), STEPS)}", like, measure)
        first, second = torch.cat([costs[block.kind].cpu() for block in space.anatomy.blocks]).unbind(-1)
        exchange = best_exchanges(space, x, (first + method.second_order * second)[:, ONE_LEVEL])
        plain = torch.tensor(x, dtype=torch.float64)
        if exchange.any() and bool(space.legal((plain + exchange)[None])):
            changed = space.decode(tuple((plain + exchange).int().tolist()))
            exchanged = keep(f"kl_{digest(changed.to_dict())}", kl_of(half), partial(kl_at, changed))
            before, after = float(costs["kl"][:half].mean()), float(exchanged["kl"].mean())
            if after > LOSS_OF_EXCHANGES * before + UNSEEN:
                tell(
                    f"Width exchanges at share {float(space.share(plain[None])):.2f} would have raised KL from {before:.3g} to "
                    f"{after:.3g} and are dropped: the search goes on along the path without them."
                )
                exchanges[x] = torch.zeros_like(exchange)
                continue
        exchanges[x] = exchange
        sound.append(x)
        measured.append(first + second)
    around = expansions(space, sound, measured, sensitivity)
    found = informed(prices, method.allocation.bare, exchanges, sound, around)
    moved = family.moved_to(found.path(method.allocation))
    return replace(moved, expansions=around, prices=found, recipe=method.allocation)


def empty(shapes: Mapping[BlockKind, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes on the meta device."""
    return {kind: torch.empty(shape, device="meta") for kind, shape in shapes.items()}
