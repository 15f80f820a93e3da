"""What has to be known of an arm while its problem is open: checkpoints, gains and the union front."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from llmbo.comparison.config import CompareConfig
from llmbo.comparison.problems import OpenProblem
from llmbo.comparison.runner import Judgement, Outcome, judged_numbers
from llmbo.comparison.schema import HELDOUT, SIZES, ArmPart, CheckpointPart, TrialPart, UnionPoint
from llmbo.config.objectives import priced_by
from llmbo.problem.objectives import Objective
from llmbo.problem.proxy import known_values
from llmbo.report import front_of
from llmbo.search.gain import EPSILON, FamilyCurve
from llmbo.types import Trial


@dataclass(frozen=True)
class Curves:
    """The threshold family's quality by size, on proxy and on held-out windows.

    Args:
        size: From values to what the path's steps are priced by, 1 for the dense model (`SearchSpace.weight`).
        judged_size: The same by the costs that all problems are judged by.
    """

    proxy: FamilyCurve
    heldout: FamilyCurve | None
    size: Callable[[Mapping[str, float]], float]
    judged_size: Callable[[Mapping[str, float]], float]
    smallest: float
    quality: Objective
    dense: float
    heldout_dense: float

    def gain(self, values: Mapping[str, float]) -> float | None:
        """In the quality's unit; None below the smallest measured member."""
        size = self.size(values)
        if size < self.smallest:
            return None
        return _at(self.proxy, size) - self.quality.sign * (self.dense - values[self.quality.name])

    def heldout_gain(self, values: Mapping[str, float]) -> float | None:
        size = self.size(values)
        if self.heldout is None or size < self.smallest:
            return None
        return _at(self.heldout, size) - (values["loss"] - self.heldout_dense)


def measured_curves(problem: OpenProblem, config: CompareConfig) -> Curves:
    """Measure as many members of the threshold family as a front has judged points; the store remembers them."""
    quality = next(objective for objective in problem.objectives if not objective.known)
    family = problem.search.threshold_family
    shares = torch.linspace(float(family.shares[0]), 1.0, max(config.judged_points, 12) + 1)[:-1].tolist()
    members = list(dict.fromkeys(family.at(share) for share in shares))
    dense = problem.search.dense[quality.name]
    rows = [problem.measure(x, "threshold").values for x in members]
    whole = known_values(problem.space, problem.space.max_levels)

    size, judged_size = (_size_by(names, whole) for names in (problem.space.priced_by, priced_by(config.judged_by)))
    at = torch.tensor([size(row) for row in rows], dtype=torch.float64)
    excess = [quality.sign * (dense - row[quality.name]) for row in rows]
    proxy = FamilyCurve.through(at, torch.tensor(excess, dtype=torch.float64))
    if problem.judge is None:
        return Curves(proxy, None, size, judged_size, float(at.min()), quality, dense, 0.0)
    heldout_dense = problem.judge(problem.space.max_levels, "dense").values["loss"]
    losses = [problem.judge(x, "threshold").values["loss"] - heldout_dense for x in members]
    heldout = FamilyCurve.through(at, torch.tensor(losses, dtype=torch.float64))
    return Curves(proxy, heldout, size, judged_size, float(at.min()), quality, dense, heldout_dense)


def _size_by(names: Sequence[str], whole: Mapping[str, float]) -> Callable[[Mapping[str, float]], float]:
    """The mean of known costs, each as a part of the dense model's (`whole`)."""
    return lambda values: fmean(values[name] / whole[name] for name in names)


def arm_part(outcome: Outcome, problem: OpenProblem, curves: Curves, config: CompareConfig) -> ArmPart:
    """One finished arm as the result shows it; needs its problem open."""
    return ArmPart(
        label=outcome.arm.label,
        strategy=outcome.arm.strategy,
        seed=outcome.seed,
        checkpoints=[
            _checkpoint(judgement, outcome.trials, problem, curves, config) for judgement in outcome.judgements
        ],
        trace=[round(value, 6) for value in outcome.trace],
        seconds=[round(value, 3) for value in outcome.seconds],
        proposal_seconds=[round(value, 4) for value in outcome.proposal_seconds],
        trials=[
            TrialPart(
                number=trial.number,
                round=trial.round,
                origin=trial.origin,
                digest=problem.space.decode(trial.x).digest,
                values=dict(trial.values),
                gain=curves.gain(trial.values) if trial.complete else None,
            )
            for trial in outcome.trials
        ],
    )


def union_front(outcomes: Sequence[Outcome], problem: OpenProblem) -> list[UnionPoint]:
    """The front of all trials of all arms on one problem, with held-out values of the points that some arm's front was judged by.

    Judging all of them would cost more than judging the arms: a union of many seeds has a hundred points.
    """
    found: dict[tuple[int, ...], set[str]] = {}
    trials: dict[tuple[int, ...], Trial] = {}
    judged: set[tuple[int, ...]] = set()
    for outcome in outcomes:
        numbers = {number for judgement in outcome.judgements for number in judgement.points}
        judged |= {trial.x for trial in outcome.trials if trial.number in numbers}
        for trial in outcome.trials:
            if trial.complete:
                found.setdefault(trial.x, set()).add(outcome.arm.label)
                trials.setdefault(trial.x, trial)
    points = []
    for trial in front_of(list(trials.values()), problem.objectives):
        architecture = problem.space.decode(trial.x)
        points.append(
            UnionPoint(
                digest=architecture.digest,
                found_by=sorted(found[trial.x]),
                values=dict(trial.values),
                heldout=problem.judge(trial.x, trial.origin).values if problem.judge and trial.x in judged else None,
                **architecture.to_dict(),
            )
        )
    return points


def _checkpoint(
    judgement: Judgement, trials: Sequence[Trial], problem: OpenProblem, curves: Curves, config: CompareConfig
) -> CheckpointPart:
    front = front_of(trials[: judgement.evaluations], problem.objectives)
    numbers = list(judgement.points) or [trial.number for trial in judged_numbers(front, max(2, config.judged_points))]
    gains = {number: curves.gain(trials[number].values) for number in numbers}
    heldout = list[Mapping[str, float]]()
    if problem.judge is not None:
        heldout = [problem.judge(trials[number].x, trials[number].origin).values for number in numbers]
    gain, heldout_gain = _mean(gains.values()), _mean(map(curves.heldout_gain, heldout))
    return CheckpointPart(
        evaluations=judgement.evaluations,
        hypervolume=judgement.hypervolume,
        **{metric: judgement.heldout.get(quality) for metric, quality in HELDOUT.items()},
        gain=gain,
        heldout_gain=heldout_gain,
        survival=heldout_gain / gain if heldout_gain is not None and gain is not None and gain > 1e-3 else None,
        points=numbers,
        log_kl=log_kl_by_size([(curves.size(trial.values), trial.values.get("kl")) for trial in front]),
        heldout_log_kl=log_kl_by_size([(curves.judged_size(values), values.get("kl")) for values in heldout]),
    )


def log_kl_by_size(points: Iterable[tuple[float, float | None]]) -> list[float | None]:
    """Log KL of the best model that fits each of `SIZES`, None where none does; empty where KL is not known.

    Nothing is interpolated: between far points a line through logs would promise models that nobody has, the more so near the dense one.
    """
    known = [(size, kl) for size, kl in points if kl is not None and kl > 0]
    fitting = ([kl for own, kl in known if own <= size] for size in SIZES)
    return [round(math.log(min(kls)), 6) if kls else None for kls in fitting] if known else []


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _at(curve: FamilyCurve, size: float) -> float:
    return float(curve(torch.tensor([size], dtype=torch.float64)).exp()) - EPSILON
