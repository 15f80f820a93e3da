"""Refits of a grid of widths at the inputs of a pruned model, the anchor, for all sub-networks that are much like it.

`pruning.refits` fits every block at the dense model's inputs. In a sub-network earlier blocks have lost something: inputs are others,
and errors pile up. `pruning.sequential` makes up for that, for one sub-network alone. Here the anchor's stream passes the layers one
after the other, and each block is fitted as there, with what the stream has lost so far as part of its target, but at *every* width:
the block is run whole, and with its columns sorted by the ranking the moments of a width are leading blocks of G and of
E[z_p (h_d + y - h_p)T]. So one Cholesky factor serves all widths (as in `pruning.compensation`), and any sub-network finds its refits
there. Then the anchor's own widths hand the stream on.

Its refits serve a sub-network as far as the streams are alike, which the share of parameters tells well enough: on SmolLM2 held-out KL
is 8 to 12 % lower for members of the allocation path up to 0.05 of the blocks below the anchor and 4 to 8 % at 0.15 below; above it by
more than 0.05 what others have not lost is put in twice, and it is higher (`experiments/anchor_tables.py`).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256

import torch
from torch import Tensor, nn

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.block import Block, BlockKind
from pruning.compensation import Factor, Refits, Ridge
from pruning.cost import cost_of
from pruning.likelihood import frozen
from pruning.masks import Ranking
from pruning.projection import matrix_of
from pruning.refits import GridRefits, RefitCache, expected_widths, key_of, solve_widths
from pruning.sequential import SequentialRefits
from pruning.streams import goals_behind, moments, reached
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.walk import Walk, device_of

# A ridge by the columns of the dense projection, whatever a width keeps: one factor serves all. On SmolLM2 between 4 and 8 alike near the
# anchor, 4 is better below it.
ANCHOR_RIDGE = Ridge(times=4)
ABOVE = 0.07  # of what an anchor has lost: a sub-network that has lost so much less is still served


@dataclass(frozen=True)
class Anchor:
    """A sub-network and what was fitted at its inputs."""

    architecture: Architecture
    refits: Refits


class AnchoredRefits(Refits):
    """Of the dense model and of some anchors: a sub-network takes those of the smallest anchor that it is not larger than by more than
    `ABOVE`, and the dense model's where it is larger than all.
    """

    def __init__(self, anatomy: Anatomy, dense: Refits, anchors: Sequence[Anchor]) -> None:
        self._dense = dense
        self._anatomy = anatomy
        shares = [cost_of(anatomy, anchor.architecture).share for anchor in anchors]
        reach = [share + ABOVE * (1 - share) for share in shares]
        self._anchors = sorted(zip(reach, anchors, strict=True), key=lambda one: one[0])

    @property
    def ranking(self) -> Ranking:
        return self._dense.ranking

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        """As the dense model's refits, which a block alone takes."""
        return self._dense.weight(layer, block, units)

    def bias(self, layer: int, block: Block, units: int) -> Tensor | None:
        """As the dense model's refits, which a block alone takes."""
        return self._dense.bias(layer, block, units)

    def serving(self, architecture: Architecture) -> Refits:
        """The refits of the anchor that serves a sub-network."""
        share = cost_of(self._anatomy, architecture).share
        return next((anchor.refits for reach, anchor in self._anchors if share <= reach), self._dense)


def anchor_files(anchor: Architecture, windows: Tensor, ridge: Ridge = ANCHOR_RIDGE) -> Callable[[int], str]:
    """A layer's index -> what its refits at an anchor's inputs are called among the files, which belong to a model and a text."""
    made_from = f"{anchor.digest} {tuple(windows.shape)} {sorted(asdict(ridge).items())}"
    name = f"at_{sha256(made_from.encode()).hexdigest()[:12]}"
    return lambda index: f"{name}_{index:03d}"


@torch.no_grad()
def fit_at(
    supernet: Supernet,
    anchors: Sequence[Architecture],
    windows: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
    files: TensorFiles,
    ridge: Ridge = ANCHOR_RIDGE,
    batch_size: int = 8,
    on_layer: Callable[[int], None] | None = None,
    cache: RefitCache | None = None,
) -> list[GridRefits]:
    """Walk the anchors through an open supernet, beside one dense stream, or take what an earlier walk has left in `files`; a stopped one
    goes on.

    Memory: a layer and a batch's activations, as in `pruning.walk.Walk`; where a walk keeps them, the hidden states of all windows three
    times and once more for each anchor, and z of one block; of one block at a time G, its factor and a width's V, in float32; an anchor's
    own V of one layer. Time: a forward pass, and for each anchor another, the moments, and the solutions.

    Args:
        anchors: Each is fitted as it would be alone.
        windows: `num_windows x length` token ids.
        widths: Units by kind to refit to, those of the anchors among them.
        files: Of the preparation that the supernet's ranking is from.
        on_layer: Called with the number of layers done.
    """
    anatomy, device = supernet.anatomy, device_of(supernet.model)
    for anchor in anchors:
        anchor.check(anatomy)
    names = [anchor_files(anchor, windows, ridge) for anchor in anchors]
    layers = range(anatomy.num_hidden_layers)

    def kept(name_of: Callable[[int], str], index: int) -> Mapping[str, Tensor] | None:
        expected = expected_widths(anatomy, anatomy.layers_of(supernet.model)[index], widths, ridge)
        return files.get(name_of(index), expected)

    missing = [place for place, name_of in enumerate(names) if any(kept(name_of, index) is None for index in layers)]
    batches = windows.split(batch_size)
    if missing:
        with frozen(supernet.model):
            dense, pruned = Walk(supernet.model, batches), {place: Walk(supernet.model, batches) for place in missing}
            for index in layers:
                with supernet.layer(index) as layer:
                    goals = goals_behind(dense, index, layer, anatomy.blocks, anatomy.residual_scale)
                    for place, walk in pruned.items():
                        found = kept(names[place], index)
                        keep = None if found else partial(files.put, names[place](index))
                        _pass(supernet, index, layer, anchors[place], walk, goals, widths, ridge, found, keep)
                if on_layer:
                    on_layer(index + 1)
    elif on_layer:
        on_layer(len(layers))
    return [GridRefits(files, supernet.ranking, device, cache, name_of) for name_of in names]


def _pass(
    supernet: Supernet,
    index: int,
    layer: nn.Module,
    anchor: Architecture,
    walk: Walk,
    goals: Mapping[BlockKind, Sequence[Tensor]],
    widths: Mapping[BlockKind, Sequence[int]],
    ridge: Ridge,
    found: Mapping[str, Tensor] | None,
    keep: Callable[[Mapping[str, Tensor]], object] | None,
) -> None:
    """Fit a layer at an anchor's stream and let the stream pass it.

    Args:
        found: What an earlier walk has left of the layer: it is not fitted again.
        keep: Takes what was fitted.
    """
    anatomy, device, scale = supernet.anatomy, device_of(supernet.model), supernet.anatomy.residual_scale
    before = anatomy.attention if anchor.kv_groups[index] else None
    mine, solved = SequentialRefits(supernet.ranking), dict(found or {})
    own = supernet.using(mine)
    if found is None:
        streams = reached(walk, index, layer, anatomy.attention, None, scale)
        solved |= _solved(supernet, index, anatomy.attention, streams, goals, widths, ridge)
    _put(mine, index, anatomy.attention, anchor, solved, device)
    whole_mlps = replace(anchor, neurons=(anatomy.intermediate_size,) * anatomy.num_hidden_layers)
    with own.narrowed(index, whole_mlps):
        streams = reached(walk, index, layer, anatomy.mlp, before, scale)
        inputs = [(stream, z.to(stream.device)) for stream, z in streams]
    if found is None:
        solved |= _solved(supernet, index, anatomy.mlp, inputs, goals, widths, ridge)
    if keep:
        keep(solved)
    _put(mine, index, anatomy.mlp, anchor, solved, device)
    for batch, (stream, z) in enumerate(inputs):
        update = own.update(index, anatomy.mlp, z.to(device), anchor.neurons[index])
        walk.hidden[batch] = stream + scale * update.view_as(stream).to(stream.device)


def _solved(
    supernet: Supernet,
    index: int,
    block: Block,
    inputs: Iterable[tuple[Tensor, Tensor]],
    goals: Mapping[BlockKind, Sequence[Tensor]],
    widths: Mapping[BlockKind, Sequence[int]],
    ridge: Ridge,
) -> dict[str, Tensor]:
    """The refits of one block to all widths."""
    output = supernet.output_of(index, block)
    weight, biased = matrix_of(output), output.bias is not None and ridge.biases
    affine = torch.cat([output.bias[:, None], weight], dim=1) if biased else weight
    affine = affine.to(torch.promote_types(weight.dtype, torch.float32))
    gram, cross, tokens = moments(inputs, goals[block.kind], block, affine, biased, supernet.anatomy.residual_scale)
    heads = torch.arange(block.units * block.queries, device=gram.device)

    def factor_of(columns: Tensor, last: bool) -> Factor:
        return Factor.at(gram if last else gram.clone(), cross, affine, columns, ridge, tokens, biased)

    return solve_widths(block, widths[block.kind], heads, factor_of, weight)


def _put(
    refits: SequentialRefits,
    index: int,
    block: Block,
    anchor: Architecture,
    solved: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Give the anchor's stream what was solved for the width that its block has."""
    units = anchor.units(block.kind)[index]
    if units not in (0, block.units):
        key = key_of(block.kind, units)
        bias = solved.get(f"bias.{key}")
        refits.put(index, block, solved[key].to(device), None if bias is None else bias.to(device))
