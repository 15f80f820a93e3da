"""At which pruned models a run's refits are fitted beside the dense one's, and what its trials take of them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from llmbo.problem.family import ThresholdFamily
from llmbo.types import Phases
from pruning.anatomy import Anatomy
from pruning.anchored import Anchor, AnchoredRefits, anchor_files, fit_at
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.compensation import Refits
from pruning.refits import GridRefits
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles

PHASE = "refits at pruned members"
SERVED = 5 / 6  # of the way from the smallest member to the dense model


def anchors_of(family: ThresholdFamily, number: int) -> tuple[Architecture, ...]:
    """So many members of the path, none of them near the dense model, whose refits serve there as well."""
    space, low = family.space, float(family.shares[0])
    parts = [SERVED * (place + 0.5) / number for place in range(number)]
    members = dict.fromkeys(family.at(low + (1 - low) * part) for part in parts)
    return tuple(space.decode(x) for x in members if x != space.max_levels)


def kept_at(
    anatomy: Anatomy, dense: Refits | None, anchors: Sequence[Architecture], windows: Tensor
) -> AnchoredRefits | None:
    """What `anchored` has kept where the dense model's refits are, which the caller has seen to be there."""
    if not isinstance(dense, GridRefits):
        return None
    found = [Anchor(one, dense.named(anchor_files(one, windows))) for one in anchors]
    return AnchoredRefits(anatomy, dense, found)


def names_at(anchors: Sequence[Architecture], windows: Tensor) -> list[str]:
    """All that is kept of refits at these members, `num_windows x length` token ids."""
    found = ((anchor_files(anchor, windows), len(anchor.neurons)) for anchor in anchors)
    return [name_of(index) for name_of, layers in found for index in range(layers)]


def anchored(
    supernet: Supernet,
    anchors: Sequence[Architecture],
    windows: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
    files: TensorFiles,
    phases: Phases,
) -> Supernet:
    """An open supernet whose sub-networks take the refits of the anchor that is nearest: from its files, or fitted now and kept.

    Args:
        supernet: With the dense model's refits on a grid.
        windows: `num_windows x length` token ids.
        widths: Of the grid.
    """
    dense = supernet.compensation
    if not anchors or not isinstance(dense, GridRefits):
        return supernet
    with phases.phase(PHASE, supernet.anatomy.num_hidden_layers) as advance:
        fitted = fit_at(supernet, anchors, windows, widths, files, on_layer=advance, cache=dense.cache)
    found = [Anchor(anchor, refits) for anchor, refits in zip(anchors, fitted, strict=True)]
    return supernet.using(AnchoredRefits(supernet.anatomy, dense, found))
