"""Recipes between an advisor and the search: what a reply's item asks for, its members, and rows along a direction of prices."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmbo.advisor.formula import FEATURES, FUNCTIONS, MAX_LENGTH
from llmbo.advisor.replies import COEFFICIENT, RecipePart
from llmbo.errors import ConfigError
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.recipe import BOUNDS, LARGEST_BONUS, WORDS, AllocationRecipe
from llmbo.types import Direction

COEFFICIENTS = (
    -0.3,
    -0.15,
    0.15,
    0.3,
    0.45,
    0.6,
)  # log prices at a standard deviation; advisors mostly get the sign right
SHARES = 4  # at which each is tried


def vocabulary(family: ThresholdFamily, shares: int) -> dict[str, Any] | None:
    """What a prompt says of recipes and formulas, with their limits; None where the family knows no prices.

    Args:
        shares: At how many a recipe may be tried.
    """
    if family.prices is None:
        return None
    own = family.recipe.to_dict()
    return {
        "numbers": [
            f"{name} {low:g}..{high:g} now {own[name]:.2g}: {WORDS[name]}" for name, (low, high) in BOUNDS.items()
        ],
        "profiled": bool(family.recipe.profile),
        "bonus": LARGEST_BONUS,
        "features": [f"{name} ({words})" for name, words in FEATURES.items()],
        "functions": FUNCTIONS,
        "length": MAX_LENGTH,
        "coefficient": COEFFICIENT,
        "shares": shares,
    }


def asked_profile(part: RecipePart, num_layers: int) -> Tensor:
    """The bonuses that an item spells out, `d`; zeros for a kind without.

    Raises:
        ConfigError: They are for another number of layers.
    """
    halves = part.profile.model_dump() if part.profile else {}
    for kind, half in halves.items():
        if half is not None and len(half) != num_layers:
            raise ConfigError(
                f"profile.{kind} has {len(half)} numbers, the model has {num_layers} layers: give one for each"
            )
    rows = [halves.get(kind) or [0.0] * num_layers for kind in ("attention", "mlp")]
    return torch.tensor(rows, dtype=torch.float64).flatten()


def asked_recipe(family: ThresholdFamily, part: RecipePart, profile: Tensor) -> AllocationRecipe:
    """The family's recipe with the numbers that an item names in place of its own, and `d` bonuses added to its profile."""
    numbers = family.recipe.to_dict() | part.model_dump(include={"numbers"}, exclude_none=True)["numbers"]
    own = AllocationRecipe.of(numbers)
    return AllocationRecipe.clamped(own.theta, own.bonus(family.space.num_layers) + profile)


def member(family: ThresholdFamily, recipe: AllocationRecipe, share: float) -> tuple[int, ...]:
    """The model of a recipe at a share; the family must know prices."""
    assert family.prices is not None
    [found] = family.prices.members_of(recipe, torch.tensor([share], dtype=torch.float64)).int().tolist()
    return tuple(found)


def along(
    family: ThresholdFamily, known: Sequence[AllocationRecipe], direction: Direction, rng: random.Random
) -> Iterator[tuple[tuple[int, ...], AllocationRecipe]]:
    """Members of known recipes whose profile goes along a direction, by every coefficient, at its shares or random ones."""
    assert family.prices is not None
    vector = torch.tensor(direction.profile, dtype=torch.float64)
    bases = [rng.choice(known) for _ in COEFFICIENTS]
    theta = torch.stack([base.theta for base in bases])
    bonus = torch.stack([base.bonus(family.space.num_layers) for base in bases])
    bonus = (bonus + torch.tensor(COEFFICIENTS, dtype=torch.float64)[:, None] * vector).clamp(
        -LARGEST_BONUS, LARGEST_BONUS
    )
    low, high = float(family.shares[0]), float(family.shares[-1])
    at = direction.at or [rng.uniform(low, high) for _ in range(SHARES)]
    shares = torch.tensor(at, dtype=torch.float64)
    members = family.prices.members(theta, shares, bonus).int().tolist()
    for base, profile, rows in zip(bases, bonus.tolist(), members, strict=True):
        recipe = replace(base, profile=tuple(profile))
        yield from ((tuple(x), recipe) for x in rows)
