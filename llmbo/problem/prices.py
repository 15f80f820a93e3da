"""What every step up is worth under a recipe, and the models that take the dearest steps: many recipes and sizes at once."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from llmbo.problem.interpolation import interpolated
from llmbo.problem.recipe import BOUNDS, AllocationRecipe
from llmbo.problem.space import SearchSpace
from pruning.block import BlockKind
from pruning.importance import Importance

MarginalCosts = Sequence[Sequence[float]]  # per dimension, of every step up from level 0; never rising
TINY = 1e-30  # a marginal cost of nothing, so that logarithms exist
WIDTH_EXCHANGES = list(BOUNDS).index("width_exchanges")
LIGHTEST = 1e-3  # of its parameters' share, what a step is taken to weigh at least: measured costs are noisy, and some blocks have none
SLACK = 1e-9  # of the share that a model may have: sums of steps round otherwise than it does


@dataclass(frozen=True)
class Prices:
    """Logarithms of two estimates of every step's marginal cost, `d x steps`, NaN where a block has no such step.

    Args:
        fisher: By unit scores, around 0.
        sensitivity: By whole blocks, around 0.
        anchors: `k` shares, increasing, at which blocks were measured in pruned members; the dense model, whose prices these are, is last.
        corrections: `k x d`, how much dearer each block was found there, as a logarithm.
        exchanges: `k x d`, levels that blocks should give to each other there.
    """

    space: SearchSpace
    fisher: Tensor
    sensitivity: Tensor
    anchors: Tensor
    corrections: Tensor
    exchanges: Tensor

    @classmethod
    def of(cls, space: SearchSpace, fisher: MarginalCosts, sensitivity: MarginalCosts) -> "Prices":
        """From marginal costs at the dense model, `d` rows each."""
        one, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, space.d, dtype=torch.float64)
        return cls(space, _around_zero(fisher), _around_zero(sensitivity), one, nothing, nothing)

    @cached_property
    def steps(self) -> Tensor:
        """Which steps there are, `d x steps`."""
        return ~self.fisher.isnan()

    @cached_property
    def shares(self) -> Tensor:
        """What every step adds to the parameter share, `d x steps`; infinite where there is no such step."""
        found = torch.full(self.steps.shape, torch.inf, dtype=torch.float64)
        L = self.space.num_layers
        for first in (0, L):  # blocks of a kind are alike
            levels = int(self.space.bounds[1, first])
            points = torch.zeros(levels + 1, self.space.d, dtype=torch.float64)
            points[:, first] = torch.arange(levels + 1)
            found[first : first + L, :levels] = self.space.share(points).diff()
        return found

    @cached_property
    def per_weight(self) -> Tensor:
        """What makes a step's cost per parameter one per `SearchSpace.weight` of the otherwise dense model, `d x steps` logarithms."""
        space, steps = self.space, self.steps.shape[1]
        if space.priced_by == ("params_share",):
            return torch.zeros(self.steps.shape, dtype=torch.float64)
        levels = torch.arange(steps + 1, dtype=torch.float64).expand(space.d, -1).minimum(space.bounds[1][:, None])
        points = space.bounds[1].repeat(space.d, steps + 1, 1)
        points[torch.arange(space.d), :, torch.arange(space.d)] = levels
        size = self.shares.where(self.steps, 1.0)
        added = space.weight(points).diff().maximum(LIGHTEST * size)
        return (size / added).log().where(self.steps, 0.0)

    def log_prices(self, theta: Tensor, share: Tensor, bonus: Tensor | None = None) -> Tensor:
        """Prices of all steps, never rising within a block: `m x len(BOUNDS)` numbers, `n` shares, `m x d` profiles (None: no bonus)
        -> `m x n x d x steps`.
        """
        number = dict(zip(BOUNDS, theta[:, :, None, None, None].unbind(1), strict=True))
        size = (-share.log2() - 0.5)[None, :, None, None]
        for name in [name for name in number if name.endswith("_by_size")]:
            named = name.removesuffix("_by_size")
            number[named] = number[named] + size * number.pop(name)
        weight = number["fisher_weight"]
        mixed = weight * self.fisher + (1 - weight) * self.sensitivity
        L, steps = self.space.num_layers, torch.arange(1, mixed.shape[-1] + 1, dtype=torch.float64)
        depth = (
            torch.linspace(-1, 1, L, dtype=torch.float64)[:, None] if L > 1 else torch.zeros(1, 1, dtype=torch.float64)
        )
        near = 0.5 ** torch.arange(L, dtype=torch.float64)[:, None]
        parts = []
        for kind, rows in (("attention", slice(0, L)), ("mlp", slice(L, None))):
            own, none = mixed[..., rows, :], torch.zeros(1, 1, 1, 1, dtype=torch.float64)
            mean = own.nanmean((-1, -2), keepdim=True)
            parts.append(
                mean
                + number[f"{kind}_exponent"] * (own - mean)
                + number[f"{kind}_level_tilt"] * (steps / self.space.bounds[1, rows, None] - 0.5)
                + number.get(kind, none)
                + number[f"{kind}_slope"] * depth
                + number[f"{kind}_curve"] * (depth**2 - 1 / 3)
                + number[f"{kind}_first"] * near
                + number.get(f"{kind}_last", none) * near.flip(0)
            )
        corrections = interpolated(self.anchors, self.corrections, share)
        found = torch.cat(parts, dim=-2) + number["pruned_members"] * corrections[..., None] + self.per_weight
        if bonus is not None:
            found = found + bonus[:, None, :, None]
        return found.masked_fill(~self.steps, -math.inf).cummin(-1).values

    def members(self, theta: Tensor, share: Tensor, bonus: Tensor | None = None) -> Tensor:
        """The models of given sizes: `m x len(BOUNDS)` numbers, `n` shares, `m x d` profiles (None: no bonus) -> `m x n x d` levels.

        Each takes the dearest steps until one does not fit, then those of the others that do: no step is left that would fit, and
        the share falls short of what was asked by less than the smallest step left. Steps that break a limit of the space are left out.
        Whatever is asked for a share below the smallest block's gets nothing, which is no legal model. Width exchanges come last, where
        the model stays legal; rounded between two anchors they may change its size by a level.

        Memory: `m n` times `d x steps` float64 prices and as many indices.
        """
        left = share.repeat(len(theta)) - self._nothing + SLACK
        rows = self._taken(self.log_prices(theta, share, bonus).flatten(0, 1), left)[0]
        weight = theta[:, WIDTH_EXCHANGES].repeat_interleave(len(share))
        return self._exchanged(rows, weight).view(len(theta), len(share), -1)

    def members_of(self, recipe: AllocationRecipe, share: Tensor) -> Tensor:
        """Those of one recipe, `n` shares -> `n x d` levels."""
        return self.members(recipe.theta[None], share, recipe.bonus(self.space.num_layers)[None])[0]

    def log_prices_of(self, recipe: AllocationRecipe, share: Tensor) -> Tensor:
        """Those of one recipe, `n` shares -> `n x d x steps`."""
        return self.log_prices(recipe.theta[None], share, recipe.bonus(self.space.num_layers)[None])[0]

    def path(self, recipe: AllocationRecipe) -> Tensor:
        """The distinct legal members of one recipe, `num_members x d`, by increasing share.

        They are taken at the sizes of the prefixes of its steps' order at a share of 0.71: unless prices depend on the size, every
        one adds a step to the one before, until widths are exchanged.
        """
        prices = self.log_prices_of(recipe, torch.tensor([0.5**0.5], dtype=torch.float64))
        sizes = self._nothing + self._taken(prices, torch.tensor([torch.inf], dtype=torch.float64))[1].cumsum(0)
        rows = self.members_of(recipe, sizes[sizes >= self.space.min_share - SLACK])
        return self.space.increasing(rows[self.space.legal(rows)])

    def _exchanged(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows after width exchanges, those that would become illegal, by a limit for instance, as they were: `n x d`, `n` -> `n x d`."""
        if not self.exchanges.any():
            return rows
        offsets = weight[:, None] * interpolated(self.anchors, self.exchanges, self.space.share(rows))
        moved = (rows + offsets).round().clamp(*self.space.bounds)
        return torch.where(self.space.legal(moved)[:, None], moved, rows)

    @property
    def _nothing(self) -> Tensor:
        """The share of the model without any block."""
        return self.space.share(torch.zeros(1, self.space.d, dtype=torch.float64))

    def _taken(self, prices: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Steps taken by price, the earlier block first where prices are equal.

        Args:
            prices: `n x d x steps`.
            left: `n` shares to be had.

        Returns:
            `n x d` levels, and the shares of all steps that the first of them took, in their order.
        """
        rows, (_, d, steps) = torch.arange(len(prices)), prices.shape
        order = prices.flatten(1).sort(dim=-1, descending=True, stable=True).indices[:, : int(self.steps.sum())]
        open_ = torch.ones(len(rows), d, dtype=torch.bool)  # a level is reached by all steps below it
        x, first = torch.zeros(len(rows), d, dtype=torch.float64), []
        for block, size in zip((order // steps).T, self.shares.flatten()[order].T, strict=True):
            fits = (size <= left) & open_[rows, block]
            x[rows, block] += fits.double()
            if self.space.limits:
                kept = self.space.within_limits(x)
                x[rows, block] -= (fits & ~kept).double()
                fits &= kept
            left = left - torch.where(fits, size, 0.0)
            open_[rows, block] &= fits
            first += [size[:1]] if fits[0] else []
        return x, torch.cat(first) if first else left.new_zeros(0)


def _around_zero(costs: Sequence[Sequence[float]]) -> Tensor:
    """Logarithms of ragged rows less their mean, padded with NaN."""
    longest = max(map(len, costs))
    rows = torch.tensor([[*row, *[math.nan] * (longest - len(row))] for row in costs], dtype=torch.float64)
    logs = rows.clamp_min(TINY).log()
    return logs - logs.nanmean()


def unit_marginal_costs(space: SearchSpace, importance: Importance) -> list[list[float]]:
    """Marginal costs by the scores of units, `d` rows: a level is reached half-way to its width, where the count rounds to it.

    Groups that lack query heads count as the part of their parameters that is left.
    """
    costs: list[list[float]] = []
    for block in space.anatomy.blocks:
        density = importance.of(block.kind).cpu().double() / block.parameters_per_unit
        units = [block.parameters_at(width) / block.parameters_per_unit for width in space.widths[block.kind]]
        midpoints = torch.tensor([math.ceil((low + high) / 2) - 1 for low, high in pairwise(units)])
        costs += density.sort(-1, descending=True).values[:, midpoints].tolist()
    return costs


def block_marginal_costs(space: SearchSpace, sensitivity: Mapping[BlockKind, Tensor]) -> list[list[float]]:
    """Marginal costs by `pruning.sensitivity`, `d` rows: slopes of its lower convex hull over parameters.

    Args:
        sensitivity: `num_layers x levels` by kind, at the widths of the grid.
    """
    costs: list[list[float]] = []
    for block in space.anatomy.blocks:
        sizes = [
            block.parameters_at(width) + (width > 0) * block.fixed_parameters for width in space.widths[block.kind]
        ]
        rows = sensitivity[block.kind].cpu().double().cummin(-1).values.tolist()
        costs += [_hull_slopes(sizes, row) for row in rows]
    return costs


def _hull_slopes(sizes: Sequence[int], costs: Sequence[float]) -> list[float]:
    """Fall of the lower convex hull of (size, cost) at every step, in cost per size; steps on one edge share its slope."""
    hull: list[int] = []
    for point in range(len(sizes)):
        while len(hull) > 1 and _slope(sizes, costs, hull[-2], hull[-1]) <= _slope(sizes, costs, hull[-1], point):
            hull.pop()
        hull.append(point)
    return [slope for a, b in pairwise(hull) for slope in [_slope(sizes, costs, a, b)] * (b - a)]


def _slope(sizes: Sequence[int], costs: Sequence[float], a: int, b: int) -> float:
    return (costs[a] - costs[b]) / (sizes[b] - sizes[a])
