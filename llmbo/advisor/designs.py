"""Recipes of advisors without a model, all around the run's own: by rules, and by chance."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from llmbo.advisor.roles import Question
from llmbo.problem.recipe import BOUNDS, DENSE_PRICES, AllocationRecipe

CHANGED = 6  # numbers of a recipe that chance changes
DEVIATION = 0.15  # how far, as a standard deviation in shares of a number's range
# What tuning recipes by hand and by Gaussian processes on SmolLM2 found alike, as changes of dense prices, the best founded first.
RULES: Sequence[tuple[str, Mapping[str, float]]] = (
    ("late MLPs dearer, but for the first layers; attention flatter",
     {"mlp_slope": 0.35, "mlp_first": 0.5, "attention_exponent": -0.2, "pruned_members": 0.45}),
    ("the same, and the last levels dearer",
     {"mlp_slope": 0.3, "mlp_first": 0.4, "attention_exponent": -0.15, "mlp_level_tilt": 0.3, "pruned_members": 0.3}),
    ("the same, and the first levels dearer",
     {"mlp_slope": 0.4, "mlp_first": 0.5, "attention_exponent": -0.2, "mlp_level_tilt": -0.3, "pruned_members": 0.6}),
    ("late attention dearer in small models",
     {"mlp_slope": 0.2, "attention_exponent": -0.2, "attention_slope_by_size": 0.4, "pruned_members": 0.45}),
    ("late MLPs dearer", {"mlp_slope": 0.5, "mlp_first": 0.6}),
    ("attention flatter, its last groups dearer", {"attention_exponent": -0.3, "attention_level_tilt": 0.3}),
)  # fmt: skip


def ruled_recipes(question: Question, shares: Sequence[float]) -> list[dict[str, Any]]:
    """The next rules of the design around the run's own recipe: those of earlier rounds stand in trials, by their numbers.

    A rule names how far to go from dense prices: what the recipe already has of it is not added again.

    Args:
        shares: Where the family would be measured next: rules take them in turn, so that they complement one another.
    """
    own = question.context.setting.family.recipe
    items: list[dict[str, Any]] = []
    for why, changes in RULES:
        numbers = {name: round(_as_far(getattr(own, name), name, change), 4) for name, change in changes.items()}
        if any(abs(value - getattr(own, name)) >= 1e-3 for name, value in numbers.items()):
            items.append({"numbers": numbers, "why": why})
    tried = [trial.recipe for trial in question.context.trials if trial.recipe]
    fresh = [i for i in items if not any(all(abs(t[n] - v) < 1e-3 for n, v in i["numbers"].items()) for t in tried)]
    many = len(shares)
    return [
        item | {"at": [shares[(place + turn) % many] for turn in range(min(many, question.shares))]}
        for place, item in enumerate(fresh[: question.count] if many else [])
    ]


def _as_far(own: float, name: str, change: float) -> float:
    """A number of a recipe after a change from dense prices, unless it has gone as far or farther already."""
    wanted = getattr(DENSE_PRICES, name) + change
    return max(own, wanted) if change > 0 else min(own, wanted)


def random_recipe(rng: random.Random, own: AllocationRecipe, shares: Sequence[float]) -> dict[str, Any]:
    """Some of the run's own numbers, each moved by a normal deviate: a design around the own recipe."""
    numbers = {}
    for name in rng.sample(list(BOUNDS), CHANGED):
        low, high = BOUNDS[name]
        moved = getattr(own, name) + DEVIATION * (high - low) * rng.gauss(0, 1)
        numbers[name] = round(min(max(moved, low), high), 3)
    return {"numbers": numbers, "at": list(shares), "why": "chance"}
