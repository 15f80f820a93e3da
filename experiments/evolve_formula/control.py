"""As many recipes by a Gaussian process: the next one from what earlier ones measured, without a model's words."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.evolve_formula.scores import SHARES, Bench
from llmbo.advisor.designs import random_recipe
from llmbo.problem.objectives import build_objectives
from llmbo.problem.recipe import AllocationRecipe
from llmbo.search.pool import recipe_members
from llmbo.search.posterior import ObjectivesPosterior
from llmbo.search.surrogate import SHARE, Features
from llmbo.types import Source, Trial, TrialState

RANDOM = 8  # recipes before the first Gaussian process
KEPT = 4  # best recipes that are changed and crossed
POOLS = 5  # of changes and crossovers, from which the next recipe is chosen


@dataclass(frozen=True)
class Tried:
    """A recipe and the KL of its members at `SHARES`; `score` as of `Bench.score`."""

    recipe: AllocationRecipe
    kl: Sequence[float]
    score: float

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> "Tried":
        return cls(AllocationRecipe.of(entry["recipe"]), entry["kl"], entry["score"])


def next_recipe(bench: Bench, tried: Sequence[Tried]) -> AllocationRecipe:
    """The first ones are changes of the path's own by chance, as advice without a model draws them; then each is, of `POOLS` pools of
    changes and crossovers of the best, the one whose score is expected to improve most on the least.

    The process is the search's own (`llmbo.search.posterior`), over models. Scores, means of its values at `SHARES`, are normal.
    """
    own = bench.family.recipe
    if len(tried) < RANDOM:
        drawn = random_recipe(random.Random(len(tried)), own, SHARES.tolist())
        return AllocationRecipe.of(own.to_dict() | drawn["numbers"] | {"width_exchanges": own.width_exchanges})
    generator = torch.Generator().manual_seed(len(tried))
    best = sorted(tried, key=lambda one: one.score)[:KEPT]
    some = [trial for one in best for trial in _trials(bench, one.recipe, one.kl)]
    pool = {
        AllocationRecipe.of({**row.recipe, "width_exchanges": own.width_exchanges}): None
        for _ in range(POOLS)
        for row in recipe_members(bench.family, some, generator)
    }
    known = {one.recipe for one in tried}
    recipes = [recipe for recipe in pool if recipe not in known]
    mean, deviation = predicted(bench, tried, recipes)
    z = (min(0.0, best[0].score) - mean) / deviation
    improvement = deviation * (z * torch.special.ndtr(z) + torch.exp(-(z**2) / 2) / (2 * torch.pi) ** 0.5)
    return recipes[int(improvement.argmax())]


def predicted(bench: Bench, tried: Sequence[Tried], recipes: Sequence[AllocationRecipe]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the score of each of `n` recipes, `n` each."""
    problem, family = bench.problem, bench.family
    path = _trials(bench, family.recipe, bench.reference.kl.mean(-1).tolist(), Source.PATH)
    trials = [*path, *(trial for one in tried for trial in _trials(bench, one.recipe, one.kl))]
    features = Features(family)
    objectives = build_objectives(["kl"], problem.dense, problem.smallest)
    quality = ObjectivesPosterior.fit(features, objectives, problem.dense, {}, trials).quality
    theta = torch.stack([recipe.theta for recipe in recipes])
    bonus = torch.stack([recipe.bonus(problem.space.num_layers) for recipe in recipes])
    rows = problem.prices.members(theta, SHARES, bonus)
    Z = features(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    with torch.no_grad():
        gain = quality.gp.posterior(Z)
        expected = quality.expected(Z) - quality.expected.curve(Z[..., SHARE].flatten()).view(len(recipes), -1)
        mean = (expected - gain.mean.squeeze(-1)).mean(-1)
        variance = gain.distribution.covariance_matrix.mean((-1, -2))
    return mean, variance.clamp_min(1e-12).sqrt()


def _trials(bench: Bench, recipe: AllocationRecipe, kl: Sequence[float], source: Source = Source.SEARCH) -> list[Trial]:
    """A recipe's members as a search's trials."""
    space = bench.problem.space
    rows = bench.problem.prices.members_of(recipe, SHARES)
    return [
        Trial(
            index, 0, tuple(x), "recipe", TrialState.COMPLETE, {"kl": value, "params_share": share},
            source=source, recipe=recipe.to_dict(),
        )
        for index, (x, value, share) in enumerate(zip(rows.int().tolist(), kl, space.share(rows).tolist(), strict=True))
    ]  # fmt: skip
