"""The recipes that a report tells of: the run's own, those that have a name, and the best that the search tried."""

from collections.abc import Sequence

import torch

from llmbo.problem.objectives import Objective
from llmbo.problem.preparation import Problem
from llmbo.problem.recipe import RECIPES, AllocationRecipe
from llmbo.problem.wording import in_words
from llmbo.report.schema import ArchitecturePart, PathPart, RecipePart
from llmbo.search.recipes import best_recipe
from llmbo.types import Trial

PARTS = (0.25, 0.5, 0.75)  # of the way from the smallest share to the dense model: where paths are shown


def recipe_parts(problem: Problem, trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[RecipePart]:
    """Each with its names, the run's own first and the best last; what two names mean is told once."""
    quality = next(objective for objective in objectives if not objective.known)
    best = best_recipe(trials, quality, problem.dense)
    named = {"own": problem.method.allocation, **RECIPES} | ({"best": best.recipe} if best else {})
    names: dict[AllocationRecipe, list[str]] = {}
    for name, recipe in named.items():
        names.setdefault(recipe, []).append(name)
    found = []
    for recipe, own in names.items():
        part = RecipePart.model_validate(
            {
                "names": own,
                "numbers": recipe.to_dict(),
                "words": in_words(recipe),
                "paths": _paths(problem, recipe),
            }
        )
        if best and "best" in own:
            part = part.model_copy(update={"trials": list(best.trials), "gain": best.gain})
        found.append(part)
    return found


def _paths(problem: Problem, recipe: AllocationRecipe) -> list[PathPart]:
    """What a recipe keeps by what this run measured at pruned members of its own path; a new run with that recipe measures at its own."""
    space, low = problem.space, problem.space.min_share
    shares = torch.tensor([low + (1 - low) * part for part in PARTS], dtype=torch.float64)
    rows = problem.prices.members_of(recipe, shares)
    return [
        PathPart(share=share, architecture=ArchitecturePart(**space.decode(tuple(row)).to_dict()))
        for share, row, legal in zip(shares.tolist(), rows.int().tolist(), space.legal(rows).tolist(), strict=True)
        if legal
    ]
