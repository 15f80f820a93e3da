"""The path corrected at pruned members by width exchanges, and what to expect of all models around it.

The path's marginal costs are taken at the dense model. At some of its members, the anchors, KL is expanded anew (`pruning.exchanges`).
That says which blocks should give a level to which at equal size (`best_exchanges`) and whose prices are wrong; other sizes and recipes
follow by interpolation (`informed`), and the search expects the same of whatever it has not measured (`expansions`,
`ThresholdFamily.expected_change`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llmbo.problem.depth import gaussian_smoothed
from llmbo.problem.family import Expansions
from llmbo.problem.interpolation import bracketed
from llmbo.problem.knapsack import cheapest
from llmbo.problem.prices import TINY, Prices
from llmbo.problem.recipe import AllocationRecipe
from llmbo.problem.space import SearchSpace
from pruning.block import BlockKind

LARGEST_CORRECTION = 0.75  # of a log price
STEPS = (-2, -1, 1, 2)  # levels that every block is tried away from an anchor
ONE_LEVEL = [STEPS.index(-1), STEPS.index(1)]  # columns of those that may be exchanged at once


def best_exchanges(space: SearchSpace, x: tuple[int, ...], costs: Tensor) -> Tensor:
    """Which blocks should give a level to which at no larger `SearchSpace.weight`: `d` of -1, 0 and 1.

    Args:
        costs: `d x 2`, what a level less and a level more of each block changes, all others staying (`pruning.exchanges`).
    """
    here, steps = torch.tensor(x, dtype=torch.float64), torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64)
    changes = torch.cat([costs.cpu().double(), torch.zeros(space.d, 1, dtype=torch.float64)], dim=1)
    levels = here[:, None] + steps
    possible = (levels >= 0) & (levels <= space.bounds[1][:, None])
    rows = [here.repeat(space.d, 1).diagonal_scatter(column.clamp(*space.bounds)) for column in levels.T]
    sizes = torch.stack([space.weight(row) for row in rows], dim=1) - space.weight(here[None])
    chosen = cheapest(list(changes.where(possible, np.inf).numpy()), list(sizes.numpy()), -np.inf, 0.0)
    return torch.zeros(space.d, dtype=torch.float64) if chosen is None else steps[chosen]


def expansions(
    space: SearchSpace,
    anchors: Sequence[tuple[int, ...]],
    costs: Sequence[Tensor],
    sensitivity: Mapping[BlockKind, Tensor],
) -> Expansions:
    """What the measurements at the anchors and at the dense model say of every level.

    Args:
        anchors: Members, by increasing share.
        costs: For each, `d x len(STEPS)`; levels farther away go on as the last two steps do.
        sensitivity: Of the dense model's blocks, `num_layers x levels` by kind.
    """
    levels = torch.arange(int(space.bounds[1].max()) + 1, dtype=torch.float64)
    tables = [_at_levels(torch.tensor(x), cost.cpu().double(), levels) for x, cost in zip(anchors, costs, strict=True)]
    rows = [sensitivity[block.kind].cpu().double() for block in space.anatomy.blocks]
    dense = torch.cat([F.pad(row, (0, len(levels) - row.shape[1])) for row in rows])
    points = torch.tensor([*anchors, space.max_levels], dtype=torch.float64)
    return Expansions(space.share(points), torch.stack([*tables, dense]))


def informed(
    prices: Prices,
    recipe: AllocationRecipe,
    exchanges: Mapping[tuple[int, ...], Tensor],
    sound: Sequence[tuple[int, ...]],
    expanded: Expansions,
) -> Prices:
    """Prices that know what was measured at pruned members: which exchanges are best there, and how much dearer than the recipe
    says every block was, by what a level less and one more change.

    Only the part of the latter that neighbouring layers share is kept, and no factor above `LARGEST_CORRECTION`: single measurements are
    noisy, and what they say of the next level need not hold for the one after it.

    Args:
        recipe: Knows nothing of pruned members.
        exchanges: Members of its path, by increasing share -> `d` levels to add to each of them (`best_exchanges`).
        sound: Those of them whose expansions are to be believed.
        expanded: Around these, and around the dense model.
    """
    space, L = prices.space, prices.space.num_layers
    nothing = torch.zeros(space.d, dtype=torch.float64)
    ratios = dict.fromkeys(exchanges, nothing)
    for share, anchor, change in zip(
        expanded.shares, sound, expanded.changes, strict=False
    ):  # the dense model needs none
        x = torch.tensor(anchor, dtype=torch.float64)
        low, high = (x - 1).clamp_min(0).long(), (x + 1).minimum(space.bounds[1]).long()
        steps = torch.arange(prices.shares.shape[1])
        between = (steps >= low[:, None]) & (steps < high[:, None])
        size = prices.shares.where(between, 0.0).sum(-1)
        fall = (change.gather(1, low[:, None]) - change.gather(1, high[:, None]))[:, 0]
        priced = prices.log_prices_of(recipe, share[None])[0] - prices.per_weight
        said = priced.where(between, 0.0).sum(-1) / between.sum(-1)
        ratio = (fall / size).clamp_min(TINY).log() - said
        ratios[anchor] = (ratio - ratio.median()).clamp(-LARGEST_CORRECTION, LARGEST_CORRECTION)
    return replace(
        prices,
        anchors=space.share(torch.tensor([*exchanges, space.max_levels], dtype=torch.float64)),
        corrections=gaussian_smoothed(torch.stack([*ratios.values(), nothing]).unflatten(-1, (2, L)), 1.0).flatten(-2),
        exchanges=torch.stack([*exchanges.values(), nothing]),
    )


def _at_levels(x: Tensor, cost: Tensor, levels: Tensor) -> Tensor:
    """Costs of `STEPS` (`d x steps`) as costs of levels (`d x levels`), linear in between and beyond."""
    steps = torch.tensor(sorted({*STEPS, 0}), dtype=torch.float64)
    known = torch.cat(
        [cost[:, : len(STEPS) // 2], torch.zeros(len(x), 1, dtype=torch.float64), cost[:, len(STEPS) // 2 :]], dim=1
    )
    right, weight = bracketed(steps, levels[None] - x[:, None])  # d x levels
    low, high = known.gather(1, right - 1), known.gather(1, right)
    return low + weight * (high - low)
