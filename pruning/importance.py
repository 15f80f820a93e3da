"""Importance of layers, KV groups and neurons: every score is a function of `pruning.statistics`.

L: decoder layers.   U: units of a block (KV groups or neurons).   C: columns of its output projection.
z: input of the output projection.   g: gradient of a window's mean next-token loss (nats) with respect to z.
Scores are `L x U`; larger means "hurts more if removed". Only `taylor` and `fisher` are comparable across layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pruning.block import Block, BlockKind
from pruning.masks import Ranking
from pruning.statistics import BlockStatistics, Statistics


@dataclass(frozen=True)
class Importance:
    """Scores of one method: `groups` `L x num_key_value_heads`, `neurons` `L x intermediate_size`, `layers` `L`."""

    groups: Tensor
    neurons: Tensor
    layers: Tensor

    def of(self, kind: BlockKind) -> Tensor:
        return self.groups if kind == "attention" else self.neurons

    def ranking(self) -> Ranking:
        """Most important first; equal scores keep their index order, so the ranking does not depend on the machine."""
        return Ranking(
            *(scores.argsort(dim=-1, descending=True, stable=True).cpu() for scores in (self.groups, self.neurons))
        )


def taylor(statistics: Statistics) -> Importance:
    """First-order loss change, |dL/dgate| of every column summed over the unit, mean over windows (nats).

    Absolute before summing over columns: the signs inside a KV group cancel, which would make a group look hundreds of
    times less important per parameter than a neuron. Molchanov et al. 2019, arXiv:1906.10771; LLM-Pruner, arXiv:2305.11627.
    """
    scores = {kind: block.taylor / statistics.num_scored_windows for kind, block in statistics.blocks.items()}
    return _importance(scores)


def fisher(statistics: Statistics) -> Importance:
    """Second-order KL divergence of removing a unit from the dense model, E[(dL/dgate)^2] / 2 over tokens (nats).

    The first-order term of that divergence vanishes at the dense model, and the Hessian is the Fisher information.
    Theis et al. 2018, arXiv:1801.05787. Token by token, an empirical Fisher that ignores the tokens' correlations.
    Thresholded per parameter it allocates widths better than `taylor`: see `experiments/allocation`.
    """
    scores = {kind: block.fisher / (2 * statistics.num_scored_tokens) for kind, block in statistics.blocks.items()}
    return _importance(scores)


def activation(statistics: Statistics) -> Importance:
    """Mean energy a unit sends into the residual stream, E[z^2] |W column|^2: the order of units where nothing is refitted.

    Wanda's |W| |x| (arXiv:2306.11695) summed over structures. What it does not see is what a refit makes up for: see `pruning.surgeon`.
    """
    return _column_scores(statistics, lambda block: block.square / statistics.num_tokens)


def order_of(statistics: Statistics, block: Block, index: int) -> Tensor:
    """A layer's row of `activation(statistics).ranking()`, which follows from that layer's sums alone: `units` indices."""
    sums = statistics.blocks[block.kind]
    energy = block.per_unit(sums.square[index] / statistics.num_tokens * sums.column_norms[index])
    return energy.argsort(descending=True, stable=True)


def activation_ranking(statistics: Statistics, queries: bool) -> Ranking:
    """That of `activation`, of query heads too if `queries`."""
    ranking, block = activation(statistics).ranking(), statistics.anatomy.attention
    if not queries:
        return ranking
    orders = [
        within_groups(order_of(statistics, block.by_query, index).cpu(), groups, block.queries)
        for index, groups in enumerate(ranking.groups)
    ]
    return replace(ranking, heads=torch.stack(orders))


def within_groups(heads: Tensor, groups: Tensor, queries: int) -> Tensor:
    """Query heads, best first, as `Ranking.heads` has them: those of the best of `groups` first, `queries` of each."""
    places = groups.argsort()
    return heads[places[heads // queries].argsort(stable=True)]


def fluctuation(statistics: Statistics) -> Importance:
    """Energy around the mean, Var[z] |W column|^2: what a bias could not restore. FLAP, arXiv:2312.11983."""

    def variance(block: BlockStatistics) -> Tensor:
        mean = block.total / statistics.num_tokens
        return (block.square / statistics.num_tokens - mean**2).clamp_min(0)

    return _column_scores(statistics, variance)


def magnitude(statistics: Statistics) -> Importance:
    """Squared norm of all weights of a unit; needs no data. Li et al. 2017, arXiv:1608.08710."""
    return _importance({kind: block.magnitude for kind, block in statistics.blocks.items()})


def block_influence(statistics: Statistics) -> dict[str, Tensor]:
    """How much each layer, and each of its blocks, turns the residual stream: 1 - mean cosine, `L` each.

    ShortGPT, arXiv:2403.03853.
    """
    scores: dict[str, Tensor] = {"layer": 1 - statistics.layer_cosine / statistics.num_tokens}
    for kind, block in statistics.blocks.items():
        scores[kind] = 1 - block.cosine / statistics.num_tokens
    return scores


METHODS: dict[str, Callable[[Statistics], Importance]] = {
    "taylor": taylor,
    "fisher": fisher,
    "activation": activation,
    "fluctuation": fluctuation,
    "magnitude": magnitude,
}


def layer_scores(statistics: Statistics) -> dict[str, dict[str, Tensor]]:
    """Every method's view of the layers: method -> "attention", "mlp" or "layer" -> `L` scores.

    Scores of units are summed over their block; `block_influence` scores blocks as they are.
    """
    summed: dict[str, dict[str, Tensor]] = {
        name: {kind: importance.of(kind).sum(-1) for kind in statistics.blocks}
        for name, importance in ((name, method(statistics)) for name, method in METHODS.items())
    }
    return {**summed, "block_influence": block_influence(statistics)}


def _importance(scores: dict[BlockKind, Tensor]) -> Importance:
    return Importance(scores["attention"], scores["mlp"], scores["attention"].sum(-1) + scores["mlp"].sum(-1))


def _column_scores(statistics: Statistics, energy: Callable[[BlockStatistics], Tensor]) -> Importance:
    return _importance(
        {
            block.kind: block.per_unit(energy(sums) * sums.column_norms)
            for block in statistics.anatomy.blocks
            for sums in [statistics.blocks[block.kind]]
        }
    )
