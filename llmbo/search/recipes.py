"""Which of the recipes that a search tried is best, as far as its trials tell."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmbo.problem.objectives import Objective
from llmbo.problem.recipe import AllocationRecipe
from llmbo.search.gain import EPSILON, trial_gains
from llmbo.types import Trial

SIZES = 2  # at which a recipe must have been tried: at one a single lucky member would stand for a whole path


@dataclass(frozen=True)
class BestRecipe:
    """`trials`: their numbers. `gain`: the part of the path's excess over the dense model that they save on average at equal size."""

    recipe: AllocationRecipe
    trials: tuple[int, ...]
    gain: float


def best_recipe(trials: Sequence[Trial], quality: Objective, dense: Mapping[str, float]) -> BestRecipe | None:
    """The recipe whose complete trials gain most over the run's own path; None where none does at `SIZES` sizes or more.

    A trial's gain is the logarithm of what the path has over the dense model at its size over what the trial has, so that small models
    do not outvote large ones. To a recipe's gains one of 0 is added, the path's own: of many recipes with few trials each some look
    good by chance.

    Args:
        dense: The dense model's values by objective name.
    """
    gains, found = trial_gains(trials, quality, dense), defaultdict[AllocationRecipe, list[Trial]](list)
    for trial in trials:
        if trial.recipe and trial.number in gains and trial.counts:
            found[AllocationRecipe.of(trial.recipe)].append(trial)

    def ratio(trial: Trial) -> float:
        excess = max(0.0, quality.sign * (dense[quality.name] - trial.values[quality.name]))
        return math.log(max(excess + gains[trial.number], 0.0) + EPSILON) - math.log(excess + EPSILON)

    tried = {
        recipe: own for recipe, own in found.items() if len({trial.values["params_share"] for trial in own}) >= SIZES
    }
    scores = {recipe: sum(map(ratio, own)) / (len(own) + 1) for recipe, own in tried.items()}
    best = max(scores, key=scores.__getitem__, default=None)
    if best is None or scores[best] <= 0:
        return None
    own = tried[best]
    gain = 1 - math.exp(-sum(map(ratio, own)) / len(own))
    return BestRecipe(best, tuple(trial.number for trial in own), gain)
