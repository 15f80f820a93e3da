"""Bytes that pruning a model takes, by arithmetic: what a plan, and the choice between a resident model and one layer at a time, go by.

N: tokens of a batch.   C: columns of the widest output projection.   h: `hidden_size`.   i: bytes of a value in the model's dtype.

On the device lie, all the time, embeddings, head and norms, and either all decoder layers or one; of a resident model the hidden
states of all windows too. On top comes the phase that needs most:

    ranking       the Gram matrices of one layer, one batch's inputs of it in float32, 4 N C, and that batch's activations
    refits        the Gram matrix and, of what the order of units is found by, the inverse before and after some have gone and two pieces
                  of `AT_ONCE`, (12 + 8 / 32) C^2; or the Gram matrix sorted and its Cholesky factor, which is less; the right-hand side
                  and a width's solution in float32 and in the model's dtype, (8 + i) C h
    anchors       of refits at pruned models too: the hidden states of all windows twice more and once for each of them, and z of an MLP,
                  where they are kept; one Gram matrix and its factor, 8 C^2; W, what is to come out, right-hand sides and solution,
                  (20 + i) C h; a batch's inputs in float32, 4 N C
    sensitivity   a batch's activations with their graph, and refits
    reordering    what is sorted anew: the layer once more where one is brought, else the largest projection
    candidates    a batch's activations, a chunk of logits with what is computed of it, and refits

Refits are a layer's two and the next one's, and as many more as `CACHE_BYTES` hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pruning.anatomy import Anatomy
from pruning.compensation import CACHE_BYTES
from pruning.likelihood import CHUNK
from pruning.surgeon import AT_ONCE
from pruning.walk import FEW

SINGLE = 4  # bytes of a float32


@dataclass(frozen=True)
class Workload:
    """What goes through the model.

    Args:
        tokens: Of the largest set of windows, which is the calibration's.
        scored_tokens: Of those that are walked back.
        window: Tokens of a window.
        batch: Windows that pass a layer at once.
        rows: Of logits that are judged at once.
        anchors: At so many pruned models refits are fitted, too.
    """

    tokens: int
    scored_tokens: int
    window: int
    anchors: int = 0
    batch: int = FEW
    rows: int = CHUNK

    @property
    def batch_tokens(self) -> int:
        return min(self.tokens, self.batch * self.window)


@dataclass(frozen=True)
class Footprint:
    """Bytes, see this module's docstring.

    Args:
        weights: On the device from beginning to end.
        hidden: Hidden states that stay on the device.
        phases: What each phase needs beyond these.
        host: Hidden states that wait in the host's memory.
    """

    weights: int
    hidden: int
    phases: Mapping[str, int]
    host: int

    @property
    def peak(self) -> int:
        """On the device."""
        return self.weights + self.hidden + max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: self.phases[name])


def footprint(anatomy: Anatomy, itemsize: int, workload: Workload, resident: bool, refits: int | None) -> Footprint:
    """What preparation and search need at their peaks.

    Args:
        itemsize: Bytes of a value in the model's dtype.
        resident: All layers stay on the device; otherwise one is there at a time, and hidden states wait on the host.
        refits: Bytes of them that the device may keep, beside a layer's own; None where there are none, and no Gram matrices for them.
    """
    layer, hidden = anatomy.layer_parameters * itemsize, anatomy.hidden_size
    columns = [block.columns for block in anatomy.blocks]
    widest, batch = max(columns), workload.batch_tokens
    forward, backward = activations(anatomy, itemsize, batch)
    fitted = refits is not None
    cached = max(2 * itemsize * hidden * sum(columns), min(refits, CACHE_BYTES)) if refits is not None else 0
    grams = SINGLE * sum(width**2 for width in columns) * fitted
    logits = anatomy.vocab_size * max(
        min(CHUNK, batch) * (itemsize + 3 * SINGLE),  # softmax, and a gradient by it
        min(workload.rows, batch) * (itemsize + SINGLE),
    )
    largest = max(block.units * rows.per_unit for block in anatomy.blocks for rows in block.inputs.values()) * hidden
    phases = {
        "ranking": max(grams + SINGLE * batch * widest + forward, backward, logits),
        "refits": (
            3 * SINGLE * widest**2 + 2 * SINGLE * widest**2 // AT_ONCE + (2 * SINGLE + itemsize) * widest * hidden
        )
        * fitted,
        "sensitivity": backward + cached,
        "reordering": itemsize * largest if resident else layer,
        "candidates": forward + logits + cached,
    }
    states = workload.tokens * hidden * itemsize
    streams = (2 + workload.anchors) * states + workload.tokens * max(anatomy.mlp.columns, hidden) * itemsize
    if fitted and workload.anchors:
        phases["anchors"] = (
            forward
            + SINGLE * batch * widest
            + streams * resident
            + 2 * SINGLE * widest**2
            + (5 * SINGLE + itemsize) * widest * hidden
        )
    kept = (
        anatomy.num_hidden_layers * workload.scored_tokens * hidden * itemsize
    )  # every layer's input, to walk back from
    return Footprint(
        weights=anatomy.other_parameters * itemsize + layer * (anatomy.num_hidden_layers if resident else 1),
        hidden=states if resident else 0,
        phases=phases,
        host=max(kept, 0 if resident or not workload.anchors else streams) + (0 if resident else states),
    )


def activations(anatomy: Anatomy, itemsize: int, tokens: int) -> tuple[int, int]:
    """Bytes of one layer's activations: without a graph at the peak, and with one for a backward pass; attention without its scores."""
    hidden, inner = anatomy.hidden_size, anatomy.intermediate_size
    heads = anatomy.head_dim * (anatomy.num_attention_heads + 2 * anatomy.num_key_value_heads)
    norm = (itemsize + 3 * SINGLE) * hidden  # worked out in float32
    forward = 2 * itemsize * hidden + max(norm, itemsize * (hidden + 3 * heads), itemsize * (3 * hidden + 4 * inner))
    graph = itemsize * (4 * hidden + 4 * heads + 5 * inner) + 2 * norm
    return tokens * forward, tokens * (graph + SINGLE * max(inner, heads))
