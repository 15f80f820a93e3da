"""The threshold family: the *allocation path*, a path of nested models from the dense one down, each of another size.

It is the strongest baseline there is without search, and where the search begins. Every block climbs its grid levels one by one.
A step up has a *marginal cost*: what it would cost to take it back, in nats of KL per parameter. A member of the path takes all
steps whose marginal cost is above one global threshold; lowering the threshold takes one more step, so the path is a list of
points, not a formula. Two estimates of marginal costs:

    unit scores         a level is reached by the units whose score per parameter passes the threshold (`unit_marginal_costs`).
                        LLM-Pruner (arXiv:2305.11627) thresholds Taylor scores; Fisher scores allocate better.
    block sensitivity   slopes of the convex hull of what the whole block costs at each width after its refit
                        (`block_marginal_costs`).

The geometric mean of both is better than either: see `experiments/allocation`. *Which* units stay at a
level follows from another ranking (see `pruning.importance`).

Both are taken at the dense model. `llmbo.problem.expansion` corrects the path by what a level more or less of every block
changes at pruned members: after these exchanges of width its members need not be nested.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llmbo.errors import ConfigError
from llmbo.problem.interpolation import interpolated
from llmbo.problem.prices import MarginalCosts, Prices, unit_marginal_costs
from llmbo.problem.recipe import DENSE_PRICES, AllocationRecipe
from llmbo.problem.space import SearchSpace
from pruning.importance import Importance


@dataclass(frozen=True)
class ThresholdFamily:
    """The legal members, smallest first; without limits the dense model is the last.

    Args:
        path: `num_members x d` levels. Until widths are exchanged every row adds a level to the row before; steps that break a
            limit are left out.
        shares: `num_members` parameter shares, increasing.
        importance: `d` importances, each block's summed over its units.
        expansions: What single blocks change around some members, where that was measured.
        prices: Where paths of other recipes come from; None if none is to be tried.
        recipe: What the path was made by.
    """

    space: SearchSpace
    path: Tensor
    shares: Tensor
    importance: Tensor
    expansions: "Expansions | None" = None
    prices: Prices | None = None
    recipe: AllocationRecipe = DENSE_PRICES

    @classmethod
    def from_importance(cls, space: SearchSpace, importance: Importance) -> "ThresholdFamily":
        """The family of unit scores that are comparable across layers (`taylor` or `fisher`)."""
        return cls.from_marginal_costs(space, unit_marginal_costs(space, importance), importance)

    @classmethod
    def from_marginal_costs(cls, space: SearchSpace, costs: MarginalCosts, importance: Importance) -> "ThresholdFamily":
        """The family of given marginal costs.

        Args:
            costs: `d` rows.
            importance: Says what each block matters as a whole.

        Raises:
            ConfigError: The limits leave no member.
        """
        order = sorted((-cost, dimension) for dimension, row in enumerate(costs) for cost in row)
        point = torch.zeros(space.d, dtype=torch.float64)
        rows = [point.clone()]
        for _, dimension in order:
            point[dimension] += 1
            if space.limits and not space.within_limits(point):
                point[dimension] -= 1  # a limit on one cost leaves steps that others pay for
            else:
                rows.append(point.clone())
        return cls.along(space, torch.stack(rows), importance)

    @classmethod
    def along(cls, space: SearchSpace, path: Tensor, importance: Importance) -> "ThresholdFamily":
        """The legal ones of given members, `num_members x d` levels by increasing share.

        Raises:
            ConfigError: There are none.
        """
        totals = torch.cat([importance.of(block.kind).cpu().double().sum(-1) for block in space.anatomy.blocks])
        return cls(space, path, space.share(path), totals.clamp_min(1e-6 * totals.mean())).moved_to(path)

    def moved_to(self, path: Tensor) -> "ThresholdFamily":
        """The same along other members, as `along`."""
        space = self.space
        path = path[space.legal(path)]
        if not len(path):
            limits = ", ".join(f"{name} <= {limit:g}" for name, limit in space.limits.items())
            raise ConfigError(
                f"No model with a parameter share of at least {space.min_share} has {limits}: raise --max or lower --min-share."
            )
        return replace(self, path=path, shares=space.share(path))

    def at(self, share: float) -> tuple[int, ...]:
        """The member whose parameter share is nearest."""
        return tuple(self.path[int((self.shares - share).abs().argmin())].int().tolist())

    def part_way(self, part: float) -> tuple[int, ...]:
        """The member a part of the way in share from the smallest, 0, to the whole model, 1."""
        smallest = float(self.shares[0])
        return self.at(smallest + (1 - smallest) * part)

    def profile(self, share: Tensor) -> Tensor:
        """Levels of the family at any share, interpolated between members: `n` -> `n x d`, not rounded."""
        return interpolated(self.shares, self.path, share)

    def expected_change(self, X: Tensor, share: Tensor) -> Tensor:
        """KL expected on top of the family's at equal share, nats: `n x d` levels, `n` -> `n`; 0 for members, and if nothing is known."""
        if self.expansions is None:
            return torch.zeros_like(share)
        own = interpolated(self.shares, self._changes, share)
        return ((self.expansions.changes_at(X) - own) * self.expansions.weights(share)).sum(-1)

    @cached_property
    def _changes(self) -> Tensor:
        """What the expansions say of the members themselves, `num_members x anchors`."""
        assert self.expansions is not None
        return self.expansions.changes_at(self.path)


@dataclass(frozen=True)
class Expansions:
    """KL around some members, block by block (`pruning.exchanges`): what to expect of models in between and nearby.

    Args:
        shares: `k` parameter shares of the members, increasing.
        changes: `k x d x levels`, nats: what each member changes by when one block alone goes to that level.
    """

    shares: Tensor
    changes: Tensor

    def changes_at(self, X: Tensor) -> Tensor:
        """Every member's changes summed over blocks, `n x d` levels -> `n x k`."""
        levels = X.round().long().T  # d x n
        return torch.stack([change.gather(1, levels).sum(0) for change in self.changes], dim=-1)

    def weights(self, share: Tensor) -> Tensor:
        """How much each member has to say about models of a share, `n` -> `n x k`: linear between neighbours."""
        return interpolated(self.shares, torch.eye(len(self.shares), dtype=torch.float64), share)
