"""What an advisor reads: model, path, trials with what was expected of them, the optimiser's next picks, noise, gaps, refusals."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from llmbo.config.advisor import CONTEXT_LEVELS
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.marginals import Marginals
from llmbo.problem.objectives import Objective, outcomes
from llmbo.problem.recipe import BOUNDS, AllocationRecipe
from llmbo.problem.space import SearchSpace
from llmbo.problem.statistics import LayerStatistics
from llmbo.search.gain import trial_gains
from llmbo.search.noise import gain_errors
from llmbo.search.pareto import pareto_front
from llmbo.types import Outlook, Proposal, Trial, TrialState
from pruning.block import BlockKind

MAX_TRIALS = 20  # beside the advisor's own
MAX_GAPS = 4
LAYERS_PER_RANGE = 4  # a range takes as many tokens as so many layers
SEED = 0  # of the order in which shuffled layers are told


@dataclass(frozen=True)
class Setting:
    """What does not change during a run."""

    family: ThresholdFamily
    objectives: Sequence[Objective]
    dense: Mapping[str, float]
    statistics: LayerStatistics | None
    level: str
    limits: Mapping[str, float] = field(default_factory=dict)  # on what is measured; `space` knows the others

    @property
    def space(self) -> SearchSpace:
        return self.family.space

    @property
    def tells(self) -> frozenset[str]:
        """What its level leaves in a prompt."""
        return CONTEXT_LEVELS[self.level]

    @cached_property
    def order(self) -> list[int]:
        """The layer whose numbers stand in each row of a table: itself, or another for an ablation."""
        layers = list(range(self.space.num_layers))
        if "shuffled" in self.tells:
            random.Random(SEED).shuffle(layers)
        return layers

    @property
    def quality(self) -> Objective:
        return next(objective for objective in self.objectives if not objective.known)


@dataclass(frozen=True)
class Context:
    """The state of a run as an advisor sees it.

    Args:
        proposed: What the advisor has named so far.
        look: Asks the optimiser what it thinks; None where it does not think yet, or where that is not told.
    """

    setting: Setting
    trials: Sequence[Trial]
    marginals: Marginals | None = None
    refusals: tuple[str, ...] = ()
    proposed: tuple[Proposal, ...] = ()
    look: Callable[[], Outlook | None] | None = None

    @cached_property
    def outlook(self) -> Outlook | None:
        return self.look() if self.look else None

    @cached_property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.complete]

    @cached_property
    def gains(self) -> dict[int, float]:
        """Gain over the family at equal share of every trial that is no member of it."""
        gains = trial_gains(self.trials, self.setting.quality, self.setting.dense)
        return {trial.number: gains[trial.number] for trial in self.off_path if trial.number in gains}

    @cached_property
    def errors(self) -> dict[int, float]:
        """Standard errors of gains, as far as they are known."""
        return gain_errors(self.trials, self.setting.quality.name)

    @property
    def own(self) -> list[Trial]:
        """What has been evaluated by advice, and failed ones."""
        return [trial for trial in self.trials if trial.source.advised and trial.state is not TrialState.RUNNING]

    @cached_property
    def waiting(self) -> list[Proposal]:
        """What the advisor has named and nobody evaluated."""
        taken = {trial.x for trial in self.trials}
        return list({proposal.x: proposal for proposal in self.proposed if proposal.x not in taken}.values())

    @property
    def off_path(self) -> list[Trial]:
        return [trial for trial in self.complete if not trial.on_path]

    @cached_property
    def front(self) -> list[Trial]:
        """Non-dominated trials, smallest first."""
        rows = pareto_front(outcomes(self.complete, self.setting.objectives))
        return sorted((self.complete[row] for row in rows), key=lambda trial: trial.values["params_share"])

    @property
    def informative(self) -> list[Trial]:
        """The most informative trials of others, best gain first: the best, the worst, and the rest of the front between them."""
        known = (trial for trial in self.off_path if trial.number in self.gains and not trial.source.advised)
        ranked = sorted(known, key=lambda t: -self.gains[t.number])
        if len(ranked) <= MAX_TRIALS:
            return ranked
        ends = {trial.number for trial in (*ranked[: MAX_TRIALS // 2], *ranked[-MAX_TRIALS // 4 :])}
        middle = [trial.number for trial in self.front if trial.number not in ends and trial in ranked]
        kept = ends | set(middle[: MAX_TRIALS - len(ends)])
        return [trial for trial in ranked if trial.number in kept]

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """Widest gaps of the front in parameter share, widest first."""
        shares = [trial.values["params_share"] for trial in self.front]
        low = float(self.setting.family.shares[0])
        pairs = [pair for pair in pairwise([low, *shares, 1.0]) if pair[1] - pair[0] > 1e-9]
        return sorted(pairs, key=lambda pair: pair[0] - pair[1])[:MAX_GAPS]

    @property
    def smallest_useful(self) -> float:
        """Smallest share at which a measured member of the family still counts towards hypervolume."""
        quality = self.setting.quality
        shares = [
            trial.values["params_share"]
            for trial in self.complete
            if trial.on_path and quality.sign * (trial.values[quality.name] - quality.reference) > 0
        ]
        return min(shares, default=float(self.setting.family.shares[0]))


def share_of(space: SearchSpace, x: Sequence[int]) -> float:
    return float(space.share(torch.tensor([x], dtype=torch.float64))[0])


def parameters_per_level(space: SearchSpace) -> dict[BlockKind, int]:
    """Parameters that one grid level of a block holds; levels that lack query heads are of different sizes, and this is their mean."""
    attention, mlp = space.anatomy.blocks
    levels = space.widths["attention"]
    held = (
        attention.parameters_at(levels[-1]) // (len(levels) - 1)
        if space.query_heads
        else attention.parameters_at(levels[1])
    )
    return {"attention": held, "mlp": mlp.parameters_per_unit * space.neuron_step}


def offset_from_path(family: ThresholdFamily, x: Sequence[int]) -> Tensor:
    """x minus the family's profile at the same share, `d` levels."""
    point = torch.tensor([x], dtype=torch.float64)
    return (point - family.profile(family.space.share(point)))[0]


def offset_text(family: ThresholdFamily, x: Sequence[int]) -> str:
    """How x differs from the family's member of its size, in levels."""
    return levels_text(offset_from_path(family, x))


def levels_text(offset: Tensor) -> str:
    """All of `d` changes in levels: by ranges of layers, or layer by layer where that is shorter."""
    attention, mlp = offset.round().int().view(2, -1).tolist()
    parts = []
    for kind, levels in (("mlp", mlp), ("kv", attention)):
        runs = _runs(levels)
        if LAYERS_PER_RANGE * len(runs) > len(levels):
            parts.append(f"{kind} all: {' '.join(map(str, levels))}")
        elif runs:
            parts.append(f"{kind} {' '.join(f'{_range(first, last)}:{delta:+d}' for first, last, delta in runs)}")
    return "; ".join(parts) or "none"


def change_text(family: ThresholdFamily, x: Sequence[int], recipe: Mapping[str, Any]) -> str:
    """How x differs from the family's member of its size: by its recipe's numbers, and in levels from the member of that recipe."""
    if not recipe or family.prices is None:
        return offset_text(family, x)
    made, point = AllocationRecipe.of(recipe), torch.tensor([x], dtype=torch.float64)
    offset = levels_text((point - family.prices.members_of(made, family.space.share(point)))[0])
    numbers = zip(BOUNDS, made.theta.tolist(), family.recipe.theta.tolist(), strict=True)
    changed = [f"{name} {value:.2f}" for name, value, own in numbers if abs(value - own) >= 0.005]
    if made.profile != family.recipe.profile:
        changed.append("profile " + " ".join(f"{value:.1f}" for value in made.profile))
    return f"recipe {', '.join(changed) or 'of the path'}{'' if offset == 'none' else f'; then {offset}'}"


def recipe_text(recipe: AllocationRecipe) -> str:
    """All of its numbers by name."""
    profile = f", profile {' '.join(f'{value:g}' for value in recipe.profile)}" if recipe.profile else ""
    return ", ".join(f"{name} {getattr(recipe, name):g}" for name in BOUNDS) + profile


def z_scores(values: Sequence[float | None]) -> list[float | None]:
    """Standard scores of the logarithms, since importance spans orders of magnitude; None stays None."""
    known = [math.log(max(value, 1e-12)) for value in values if value is not None]
    mean = sum(known) / max(1, len(known))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in known) / max(1, len(known))) or 1.0
    return [None if value is None else (math.log(max(value, 1e-12)) - mean) / deviation for value in values]


def _runs(levels: Sequence[int]) -> list[tuple[int, int, int]]:
    """(first layer, last layer, delta) of every run of equal nonzero deltas."""
    runs = []
    for delta, members in groupby(enumerate(levels), key=lambda pair: pair[1]):
        indices = [index for index, _ in members]
        if delta:
            runs.append((indices[0], indices[-1], delta))
    return runs


def _range(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first}-{last}"
