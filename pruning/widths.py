"""How wide a block is, in one number.

An MLP's width is its number of neurons. Attention's is a number of KV groups, each with all of its query heads or each without as many
of them as the others: `groups + LACK * lacking`, so that one that lacks nothing is told by its groups. Nothing else packs or unpacks it,
and widths may be equal or not, no more: what is wider says `Block.parameters_at`.
"""

from typing import TypeVar

from torch import Tensor

LACK = 1 << 20  # more units than any block has
Width = TypeVar("Width", int, Tensor)


def attention_width(groups: Width, lacking: Width) -> Width:
    """KV groups kept, and query heads that each of them lacks; elementwise."""
    return groups + LACK * lacking


def units_of(width: Width) -> Width:
    """KV groups or neurons."""
    return width % LACK


def lacking_of(width: Width) -> Width:
    """Query heads that each KV group lacks; of an MLP 0."""
    return width // LACK


def width_text(width: int, units: str = "units") -> str:
    """For messages."""
    return f"{units_of(width)} {units}" + (
        f" without {lacking_of(width)} query heads each" if lacking_of(width) else ""
    )
