"""Least-squares repair of output projections after units are removed.

With z the dense inputs of an output projection W (`hidden_size x C`), keep columns K and refit them to do the work of
all: V = argmin E|W z - V z_K|^2 + |(V - W_K) D^1/2|^2. With G = E[z zT], D a diagonal ridge and M = G + D the solution is

    V^T = M_KK^-1 (M W^T)_K          (equal to W_K plus a correction for what was removed)

(optimal brain surgeon's update for a whole set, arXiv:2208.11580). Where the projection has a bias it is fitted too, as the column of
an input that is 1 everywhere, which is always kept and has no ridge; elsewhere there is none, so that stock configs still fit.
Sort columns by the ranking, and the kept set of *every* width is a prefix. Then one Cholesky factor M = L L^T serves all
widths: L_KK is a leading block of L, and L_KK^-1 applied to a prefix is a prefix of L^-1 applied to all. A width costs
one triangular solve, a few milliseconds at SmolLM2's size.

D is a share of G's own diagonal: columns differ in scale by orders of magnitude, and a ridge that is equal for all of them
(Tikhonov's) lets the weak ones go and hardly holds the strong ones.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, Sizes
from pruning.architecture import Architecture
from pruning.block import Block, BlockKind
from pruning.masks import Ranking
from pruning.projection import Projection, matrix_of
from pruning.statistics import Statistics
from pruning.widths import lacking_of, units_of

CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Ridge:
    """How strongly refits are drawn to the dense columns.

    Args:
        share: Of each column's E[z^2]; None for `times` C / tokens, which is how much a least-squares fit of C columns errs on other text
            beyond what it shows on its own. On SmolLM2 the best share falls as 1 / tokens; one that is chosen on held-out rows is three
            to five times too large, since what a block shrinks adds up over blocks and what it errs by chance does not.
        per_column: Of the mean over columns if not: what runs of the first version had.
        biases: Fit biases too, where the projection has one: runs of the first version left them.
        times: See `share`.
    """

    share: float | None = None
    per_column: bool = True
    biases: bool = True
    times: float = 1.0

    def of(self, gram: Tensor, tokens: int) -> Tensor:
        """The diagonal of D for `C x C` second moments over so many tokens, `C`."""
        diagonal = gram.diagonal()
        share = self.times * len(gram) / tokens if self.share is None else self.share
        ridge = share * (diagonal if self.per_column else diagonal.mean().expand_as(diagonal))
        return ridge.clamp_min(torch.finfo(torch.float32).tiny)


RIDGE = Ridge()
FIRST_RIDGE = Ridge(0.03, per_column=False, biases=False)


@dataclass(frozen=True)
class Factor:
    """The part of the solution that all widths of one projection share.

    Memory: `C x C` and `C x hidden_size` values in float32.
    """

    lower: Tensor  # C x C, L
    rhs: Tensor  # C x hidden_size, L^-1 (G W^T + D W^T) = L^T W^T
    biased: bool = False  # the first column is the bias

    @classmethod
    def of(cls, gram: Tensor, mean: Tensor, output: Projection, order: Tensor, ridge: Ridge, tokens: int) -> "Factor":
        """Factor the second moments of a projection's inputs.

        Args:
            gram: `C x C`, G. The caller's to give away: it is worked on in place.
            mean: `C`, E[z].
            order: `C` columns, best first.
            tokens: Over which the moments were taken.
        """
        # float32 will do, and is all that some devices have: with columns scaled alike, which makes no difference to a Cholesky
        # factor, the ridge bounds the condition number by C / share; bfloat16 weights round at 1.7e-3.
        matrix = gram.copy_(gram[order]).copy_(gram[:, order])  # in place: a matrix of an 8B model takes 822 MB
        matrix.diagonal().add_(ridge.of(matrix, tokens))
        dense, biased = matrix_of(output).detach()[:, order].T.float(), False
        if output.bias is not None and ridge.biases:
            row = torch.cat([mean.new_ones(1), mean[order]])[None]
            matrix = torch.cat([row, torch.cat([row[:, 1:].T, matrix], dim=1)])
            dense, biased = torch.cat([output.bias.detach()[None].float(), dense]), True
        lower = torch.linalg.cholesky(matrix)
        return cls(lower, lower.T @ dense, biased)

    @classmethod
    def at(
        cls, gram: Tensor, cross: Tensor, dense: Tensor, order: Tensor, ridge: Ridge, tokens: int, biased: bool
    ) -> "Factor":
        """Factor moments of a projection's inputs with what is to come out, where that is not what W makes of these inputs.

        Args:
            gram: `C x C`, E[z zT]. The caller's to give away: it is worked on in place.
            cross: `C x hidden_size`, E[z tT] with t what is to come out.
            dense: `hidden_size x C`, W, to which the solution is drawn.
            order: Columns, best first.
            biased: The first of the C is the bias, which the order does not count.
        """
        if biased:
            order = torch.cat([order.new_zeros(1), 1 + order])
        matrix = gram.copy_(gram[order]).copy_(gram[:, order])
        damping = ridge.of(matrix, tokens)
        if biased:
            damping[0] = 0
        matrix.diagonal().add_(damping)
        lower = torch.linalg.cholesky(matrix)
        wanted = cross[order].addcmul_(damping[:, None], dense.T[order].to(cross))
        return cls(lower, torch.linalg.solve_triangular(lower, wanted, upper=False), biased)

    def solve(self, columns: int) -> tuple[Tensor, Tensor | None]:
        """The refitted `hidden_size x columns` weight, float32, and the `hidden_size` bias where that was fitted too."""
        rows = columns + self.biased
        solution = torch.linalg.solve_triangular(self.lower[:rows, :rows].T, self.rhs[:rows], upper=True).T
        return (solution[:, 1:], solution[:, 0]) if self.biased else (solution, None)


class Refits(Protocol):
    """Refitted output weights, wherever they come from."""

    @property
    def ranking(self) -> Ranking:
        """The order of units that the weights' columns follow."""
        ...

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        """The `hidden_size x block.columns_at(units)` weight of a block that keeps its best at this width, on the model's device."""
        ...

    def bias(self, layer: int, block: Block, units: int) -> Tensor | None:
        """The `hidden_size` bias that goes with it; None where the dense one, if any, stays."""
        ...

    def expect(self, layer: int, block: Block, units: int) -> None:
        """Told that `weight` and `bias` will be asked for soon: what has to be brought may set out."""
        return

    def serving(self, architecture: Architecture) -> "Refits":
        """Those that a sub-network takes; all take the same unless told otherwise."""
        return self


class CompensationTable(Refits):
    """Refitted output weights for every width of every block, solved when first asked for and then kept: for models that are small
    beside the memory, and widths that nobody knows beforehand. `pruning.refits` keeps those of a grid, on disk.

    Memory: the factors take as much as the Gram matrices they replace (each is freed once it is factored), and solved
    weights are kept in the model's dtype up to `cache_bytes`, the least recently used leaving first. Both live where
    the statistics were collected.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        statistics: Statistics,
        ranking: Ranking,
        ridge: Ridge = RIDGE,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Factor all Gram matrices; `statistics` loses them on the way.

        Args:
            model: The dense model the statistics were collected on, its units in their original order.
        """
        self.anatomy: Anatomy = statistics.anatomy
        self._ranking = ranking
        self._dtype = model.dtype
        self._cache: OrderedDict[tuple[BlockKind, int, int], tuple[Tensor, Tensor | None]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._factors: dict[BlockKind, list[list[Factor]]] = {}  # layer -> by query heads that each group lacks
        layers = self.anatomy.layers_of(model)
        for block in self.anatomy.blocks:
            sums, tokens = statistics.blocks[block.kind], statistics.num_tokens
            factors = []
            for index, layer in enumerate(layers):
                gram, mean = sums.gram.pop(index) / tokens, sums.total[index] / tokens
                orders = [
                    ranking.columns(index, block, lacking).to(gram.device)
                    for lacking in range(block.queries if ranking.heads is not None else 1)
                ]
                factors.append(
                    [Factor.of(gram.clone(), mean, block.output_of(layer), o, ridge, tokens) for o in orders[1:]]
                )
                factors[-1].insert(0, Factor.of(gram, mean, block.output_of(layer), orders[0], ridge, tokens))
            self._factors[block.kind] = factors

    @property
    def ranking(self) -> Ranking:
        return self._ranking

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        """The `hidden_size x block.columns_at(units)` weight whose columns follow the ranking."""
        return self._solved(layer, block, units)[0]

    def bias(self, layer: int, block: Block, units: int) -> Tensor | None:
        """The `hidden_size` bias that goes with it; None where the dense one, if any, stays."""
        return self._solved(layer, block, units)[1]

    def _solved(self, layer: int, block: Block, units: int) -> tuple[Tensor, Tensor | None]:
        key = (block.kind, layer, units)
        if key not in self._cache:
            weight, bias = self._factors[block.kind][layer][lacking_of(units)].solve(block.columns_at(units))
            self._cache[key] = (
                weight.to(self._dtype).contiguous(),
                None if bias is None else bias.to(self._dtype).contiguous(),
            )
            while sum(weight.nbytes for weight, _ in self._cache.values()) > self._cache_bytes and len(self._cache) > 1:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    @property
    def num_values(self) -> tuple[int, int]:
        """Values in the refitted weights that are kept, and in the factors."""
        every = [factor for layers in self._factors.values() for each in layers for factor in each]
        factors = [part for factor in every for part in (factor.lower, factor.rhs)]
        return sum(weight.numel() for weight, _ in self._cache.values()), sum(part.numel() for part in factors)

    def fill(self, widths: dict[BlockKind, list[int]]) -> None:
        """Solve every listed width of every layer now, so that no candidate waits for it."""
        for block in self.anatomy.blocks:
            for layer in range(self.anatomy.num_hidden_layers):
                for units in widths[block.kind]:
                    self.weight(layer, block, units)


def solved_values(sizes: Sizes, widths: Mapping[BlockKind, Sequence[int]]) -> int:
    """Values in the refitted weights of these widths in all layers; a dense width needs none."""
    heads = {"attention": sizes.queries_per_group, "mlp": 1}
    columns = {"attention": sizes.head_dim, "mlp": 1}
    dense = {"attention": sizes.num_key_value_heads, "mlp": sizes.intermediate_size}
    each = sum(
        units_of(width) * (heads[kind] - lacking_of(width)) * columns[kind]
        for kind, some in widths.items()
        for width in some
        if width != dense[kind]
    )
    return sizes.num_hidden_layers * sizes.hidden_size * each


def factor_values(sizes: Sizes) -> int:
    """Values in the factors that all widths are solved from, in all layers."""
    return sizes.num_hidden_layers * sum(
        inputs * (inputs + sizes.hidden_size)
        for inputs in (sizes.num_attention_heads * sizes.head_dim, sizes.intermediate_size)
    )
