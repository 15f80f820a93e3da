"""Low-rank changes of the dense model that all of its sub-networks share: each takes the rows of its own units.

Units are sorted while a super-network is open, so a sub-network of an adapted model is a prefix of it like any other. Only what reads
the residual stream is changed, never an output projection: those follow from a refit (`pruning.refits`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning.projection import Adapted, matrix_of
from pruning.supernet import Supernet


@dataclass(frozen=True)
class _Place:
    """An input projection: its name in the model, where it hangs, and which of its rows come first while units are sorted."""

    name: str
    owner: nn.Module
    attribute: str
    order: Tensor


def _places(supernet: Supernet) -> Iterator[_Place]:
    names = {module: name for name, module in supernet.model.named_modules()}
    for index, layer in enumerate(supernet.anatomy.layers_of(supernet.model)):
        for block in supernet.anatomy.blocks:
            owner = block.module_of(layer)
            for attribute, rows in block.inputs.items():
                order = rows.of(*supernet.order(index, block))
                yield _Place(names[getattr(owner, attribute)], owner, attribute, order)


def adapt(supernet: Supernet, rank: int, scale: float, seed: int) -> list[nn.Parameter]:
    """Hang a change into every input projection of an open super-network; at first it changes nothing.

    Returns:
        What learns: two factors for each projection.
    """
    generator = torch.Generator().manual_seed(seed)
    learning = []
    for place in [*_places(supernet)]:
        projection: Any = getattr(place.owner, place.attribute)
        outputs, inputs = matrix_of(projection).shape
        drawn = (2 * torch.rand(rank, inputs, generator=generator) - 1) / inputs**0.5  # as Kaiming has it for LoRA
        down = nn.Parameter(drawn.to(projection.weight))
        up = nn.Parameter(down.new_zeros(outputs, rank))
        setattr(place.owner, place.attribute, Adapted(projection, down, up, scale))
        learning += [down, up]
    return learning


@torch.no_grad()
def merge(supernet: Supernet) -> dict[str, tuple[Tensor, Tensor]]:
    """Add the changes to the weights and take them out again.

    Returns:
        The factors, down and up, by the projection's name; rows in the model's own order.
    """
    found = {}
    for place in [*_places(supernet)]:
        adapted: Any = getattr(place.owner, place.attribute)
        matrix_of(adapted.projection).add_(adapted.scale * adapted.up @ adapted.down)
        setattr(place.owner, place.attribute, adapted.projection)
        own = torch.empty_like(adapted.up)
        own[place.order] = adapted.up
        found[place.name] = adapted.down.detach(), own
    return found


def take_out(supernet: Supernet) -> None:
    """Take changes out that are there, and forget them."""
    for place in [*_places(supernet)]:
        adapted = getattr(place.owner, place.attribute)
        setattr(place.owner, place.attribute, getattr(adapted, "projection", adapted))
