"""At which pruned models a run's refits are fitted beside the dense one's, and what its trials take of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.method import Method
from llmbo.problem.sequence import least_tokens
from llmbo.types import Phases
from pruning.anatomy import Sizes
from pruning.anchored import Anchor, AnchoredRefits, anchor_files, fit_at
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.refits import GridRefits
from pruning.sequential import SEQUENTIAL_RIDGE
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles

PHASE = "refits at pruned members"


def enough_for_anchors(sizes: Sizes, tokens: int) -> bool:
    """Fewer calibration tokens would be learnt by heart, as by refits in sequence: a run on them has the dense model's refits alone."""
    return tokens >= least_tokens(sizes)


def anchors_of(family: ThresholdFamily, method: Method, tokens: int) -> tuple[Architecture, ...]:
    """The members of the path at the method's parts of the way, or those that a stored run has had.

    Args:
        tokens: For calibration.
    """
    if method.refit_members is not None:
        return method.refit_members
    space, low = family.space, float(family.shares[0])
    if not enough_for_anchors(space.anatomy, tokens):
        return ()
    members = dict.fromkeys(family.at(low + (1 - low) * part) for part in method.refit_at)
    return tuple(space.decode(x) for x in members if x != space.max_levels)


def names_at(anchors: Sequence[Architecture], windows: Tensor) -> list[str]:
    """All that is kept of refits at these members, `num_windows x length` token ids."""
    return [
        anchor_files(anchor, windows, SEQUENTIAL_RIDGE, index)
        for anchor in anchors
        for index in range(len(anchor.neurons))
    ]


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
    dense, layers = supernet.compensation, supernet.anatomy.num_hidden_layers
    if not anchors or not isinstance(dense, GridRefits):
        return supernet
    with phases.phase(PHASE, len(anchors) * layers) as advance:
        found = [
            Anchor(
                anchor,
                fit_at(
                    supernet,
                    anchor,
                    windows,
                    widths,
                    files,
                    on_layer=partial(_beyond, advance, place * layers),
                    cache=dense.cache,
                ),
            )
            for place, anchor in enumerate(anchors)
        ]
    return supernet.using(AnchoredRefits(supernet.anatomy, dense, found))


def _beyond(advance: Callable[[int], None], before: int, done: int) -> None:
    advance(before + done)
