"""The vectors of numbers that NSGA-II and Optuna's samplers vary, and the points that they stand for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.recipe import BOUNDS, AllocationRecipe, bounds
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import novel, topped_up
from llmbo.search.pool import levels_of, recipe_members
from llmbo.types import Proposal, Trial


class Genes(Protocol):
    """One vector of `n` numbers, each between bounds of its own, for every point."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def bounds(self) -> Tensor:
        """Lowest and highest numbers, `2 x n`."""
        ...

    @property
    def whole(self) -> bool:
        """Whether they are whole numbers."""
        ...

    def of(self, trials: Sequence[Trial]) -> Tensor:
        """The vectors behind trials, `len(trials) x n`."""
        ...

    def points(self, rows: Iterable[Sequence[float]], origin: str) -> Iterator[Proposal]:
        """What vectors stand for, neither deduplicated nor checked."""
        ...

    def topped_up(self, proposals: list[Proposal], trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        """`proposals`, filled up to `q` at random."""
        ...


@dataclass(frozen=True)
class Levels:
    """A point's own levels."""

    space: SearchSpace
    whole: ClassVar[bool] = True

    @property
    def names(self) -> Sequence[str]:
        return tuple(self.space.names)

    @property
    def bounds(self) -> Tensor:
        return self.space.bounds

    def of(self, trials: Sequence[Trial]) -> Tensor:
        return levels_of(trials, self.space.d)

    def points(self, rows: Iterable[Sequence[float]], origin: str) -> Iterator[Proposal]:
        return (Proposal(tuple(map(int, row)), origin) for row in rows)

    def topped_up(self, proposals: list[Proposal], trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        return topped_up(proposals, trials, q, self.space, seed)


@dataclass(frozen=True)
class RecipeNumbers:
    """The numbers of a recipe and the share at which its path is taken. The profile is the family's own.

    A trial has its own share, which falls short of the share that was asked for by less than a step; without a recipe it stems from the
    family's, as members of the path do.

    Args:
        family: Knows prices.
    """

    family: ThresholdFamily
    whole: ClassVar[bool] = False

    @property
    def names(self) -> Sequence[str]:
        return (*BOUNDS, "share")

    @cached_property
    def bounds(self) -> Tensor:
        shares = torch.tensor([[self.family.space.min_share], [1.0]], dtype=torch.float64)
        return torch.cat([torch.stack(bounds()), shares], dim=1)

    def of(self, trials: Sequence[Trial]) -> Tensor:
        space, own = self.family.space, self.family.recipe
        recipes = [AllocationRecipe.of(trial.recipe) if trial.recipe else own for trial in trials]
        thetas = torch.stack([recipe.theta for recipe in recipes]) if recipes else self.bounds[:0, :-1]
        return torch.cat([thetas, space.share(levels_of(trials, space.d))[:, None]], dim=1).clamp(*self.bounds)

    def points(self, rows: Iterable[Sequence[float]], origin: str) -> Iterator[Proposal]:
        assert self.family.prices is not None
        profile = self.family.recipe.bonus(self.family.space.num_layers)
        for row in rows:
            theta, share = torch.tensor(row, dtype=torch.float64).split([len(BOUNDS), 1])
            recipe = AllocationRecipe.clamped(theta, profile)
            [x] = self.family.prices.members_of(recipe, share).int().tolist()
            yield Proposal(tuple(x), origin, recipe=recipe.to_dict())

    def topped_up(self, proposals: list[Proposal], trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        strays = recipe_members(self.family, [], torch.Generator().manual_seed(seed)) if len(proposals) < q else []
        return novel([*proposals, *strays], trials, q, self.family.space)
