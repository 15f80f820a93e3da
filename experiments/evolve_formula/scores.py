"""What is tried, and how it is scored: KL of its members over that of the run's own path at equal share, by real evaluations.

Both are taken before blocks exchange widths. Exchanges are measured along the path, and lost on members of any other: with them the path
is ahead of whatever is tried.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from experiments.quiet import Quiet
from experiments.recipe_quality import Members
from llmbo.advisor.formula import FormulaError, block_features, evaluated
from llmbo.advisor.replies import Illegal
from llmbo.comparison.config import ProblemConfig
from llmbo.comparison.problems import windows_of
from llmbo.models.loading import LoadedModel
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.preparation import Problem, prepared
from llmbo.problem.recipe import AllocationRecipe

SHARES = torch.tensor([0.5, 0.65, 0.8], dtype=torch.float64)


@dataclass(frozen=True)
class Bench:
    """An open problem whose own path is measured at `SHARES`: all others are compared with it.

    Args:
        model: Its fingerprint.
        family: The path before exchanges.
    """

    model: str
    problem: Problem
    family: ThresholdFamily
    reference: Members

    @classmethod
    @contextmanager
    def opened(cls, config: ProblemConfig, loaded: LoadedModel) -> Iterator["Bench"]:
        """On the proxy windows of a comparison's problem."""
        run = replace(config.run, recipe_search=True)  # whose family knows prices
        with prepared(run, loaded, windows_of(config, run, [], loaded), Quiet()) as problem:
            family = before_exchanges(problem)
            rows = problem.prices.members_of(family.recipe, SHARES)
            yield cls(loaded.fingerprint, problem, family, Members.of(problem.proxy, rows))

    @property
    def settings(self) -> dict[str, Any]:
        """What scores hold for."""
        windows = self.problem.windows
        counts = {name: list(getattr(windows, name).shape) for name in ("calibration", "proxy")}
        own = self.family.recipe.to_dict()
        text = {"text_sha256": windows.sha256, "windows": counts}
        return {"model": self.model, **text, "shares": SHARES.tolist(), "recipe": own}

    def score(self, recipe: AllocationRecipe) -> dict[str, Any]:
        """Measure a recipe's members: `kl` and `log_ratios` at each share, the mean of these, `score`, which is negative where KL is lower
        than along the path, and its standard `error` over the windows.

        Raises:
            Illegal: One of its members is no legal model.
        """
        space, rows = self.problem.space, self.problem.prices.members_of(recipe, SHARES)
        for row, legal in zip(rows.int().tolist(), space.legal(rows).tolist(), strict=True):
            if not legal:
                raise Illegal(space.what_forbids(tuple(row)))
        found = Members.of(self.problem.proxy, rows)
        ratios, pseudo = found.log_ratios(self.reference), found.pseudo_values(self.reference)
        return {
            "kl": found.kl.mean(-1).tolist(),
            "log_ratios": ratios.tolist(),
            "score": float(ratios.mean()),
            "error": float(pseudo.std() / math.sqrt(len(pseudo))),
        }


def before_exchanges(problem: Problem) -> ThresholdFamily:
    """The path of a problem that knows prices, without width exchanges."""
    own = replace(problem.family.recipe, width_exchanges=0.0)
    return replace(problem.family.moved_to(problem.prices.path(own)), recipe=own)


def with_formula(family: ThresholdFamily, formula: str, coefficient: float) -> AllocationRecipe:
    """The family's own recipe with what a formula says of its blocks on top.

    Raises:
        Illegal: The formula cannot be used.
    """
    try:
        vector = evaluated(formula, block_features(family))
    except FormulaError as error:
        raise Illegal(str(error)) from None
    own = family.recipe
    return AllocationRecipe.clamped(own.theta, own.bonus(family.space.num_layers) + coefficient * vector)
