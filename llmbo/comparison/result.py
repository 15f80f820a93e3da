"""Finished arms -> `comparison.json`. The classes below *are* the format."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from llmbo.comparison.config import CompareConfig
from llmbo.comparison.problems import OpenProblem
from llmbo.comparison.runner import Judgement, Outcome, judged_numbers
from llmbo.comparison.statistics import Band, bands, evaluations_to_reach, paired
from llmbo.comparison.statistics import band as band_of
from llmbo.problem.objectives import Objective
from llmbo.report import front_of
from llmbo.search.gain import EPSILON, FamilyCurve
from llmbo.types import Trial

METRICS = ("hypervolume", "heldout_hypervolume", "gain", "heldout_gain")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BandPart(_Part):
    """Mean over seeds and its 95 % bootstrap band."""

    mean: float
    low: float
    high: float


class CheckpointPart(_Part):
    """The front after so many evaluations.

    `gain` is the mean, over `points`, of the threshold family's quality at the same parameter share minus the point's own
    (nats, on the proxy windows); `heldout_gain` the same in held-out loss. `survival` is the share of the proxy's gain
    that held-out text confirms.
    """

    evaluations: int
    hypervolume: float
    heldout_hypervolume: float | None
    gain: float | None
    heldout_gain: float | None
    survival: float | None
    points: list[int]


class TrialPart(_Part):
    """`values` are empty when the trial failed; `gain` is null where the family was not measured."""

    number: int
    round: int
    origin: str
    digest: str
    values: dict[str, float]
    gain: float | None


class ArmPart(_Part):
    """One strategy under one seed. `seconds` are summed up to each trial; `proposal_seconds` are of each round."""

    label: str
    strategy: str
    seed: int
    checkpoints: list[CheckpointPart]
    trace: list[float]
    seconds: list[float]
    proposal_seconds: list[float]
    trials: list[TrialPart]


class SummaryPart(_Part):
    """One strategy over all seeds. `comparable` says whether its proxy values are measured like the method's."""

    label: str
    comparable: bool
    checkpoints: dict[int, dict[str, BandPart | None]]
    trace: list[BandPart]
    seconds: BandPart
    median_proposal_seconds: float


class TestPart(_Part):
    """The method against another strategy, seed by seed; positive differences are in its favour."""

    label: str
    metric: str
    evaluations: int
    difference: BandPart
    wins: int
    seeds: int
    p: float | None


class ReachPart(_Part):
    """Evaluations that `label`'s mean trace needs to reach `baseline`'s mean final hypervolume; null: not within the budget."""

    label: str
    baseline: str
    evaluations: int | None


class UnionPoint(_Part):
    """A point that no trial of any strategy dominates."""

    digest: str
    kv_groups: list[int]
    neurons: list[int]
    found_by: list[str]
    values: dict[str, float]
    heldout: dict[str, float] | None


class Comparison(_Part):
    schema_version: Literal[1] = 1
    name: str
    status: Literal["complete", "interrupted"]
    method: str
    seeds: list[int]
    checkpoints: list[int]
    settings: dict[str, Any]
    facts: dict[str, Any]
    environment: dict[str, Any]
    objectives: list[dict[str, Any]]
    arms: list[ArmPart]
    summaries: list[SummaryPart]
    tests: list[TestPart]
    reach: list[ReachPart]
    union_front: list[UnionPoint]


@dataclass(frozen=True)
class Curves:
    """The threshold family's quality by share, on proxy and on held-out windows."""

    proxy: FamilyCurve
    heldout: FamilyCurve | None
    smallest: float
    quality: Objective
    dense: float
    heldout_dense: float

    def gain(self, values: Mapping[str, float]) -> float | None:
        """In the quality's unit; None below the smallest measured member."""
        share = values["params_share"]
        if share < self.smallest:
            return None
        return _at(self.proxy, share) - self.quality.sign * (self.dense - values[self.quality.name])

    def heldout_gain(self, values: Mapping[str, float]) -> float | None:
        if self.heldout is None or values["params_share"] < self.smallest:
            return None
        return _at(self.heldout, values["params_share"]) - (values["loss"] - self.heldout_dense)


def measured_curves(problem: OpenProblem, config: CompareConfig) -> Curves:
    """Measure as many members of the threshold family as a front has judged points; the store remembers them."""
    quality = next(objective for objective in problem.objectives if not objective.known)
    family = problem.search.threshold_family
    shares = torch.linspace(float(family.shares[0]), 1.0, max(config.judged_points, 12) + 1)[:-1].tolist()
    members = list(dict.fromkeys(family.at(share) for share in shares))
    dense = problem.search.dense[quality.name]
    rows = [problem.measure(x, "threshold").values for x in members]
    at = torch.tensor([row["params_share"] for row in rows], dtype=torch.float64)
    excess = [quality.sign * (dense - row[quality.name]) for row in rows]
    proxy = FamilyCurve.through(at, torch.tensor(excess, dtype=torch.float64))
    if problem.judge is None:
        return Curves(proxy, None, float(at.min()), quality, dense, 0.0)
    heldout_dense = problem.judge(problem.space.max_levels, "dense").values["loss"]
    losses = [problem.judge(x, "threshold").values["loss"] - heldout_dense for x in members]
    heldout = FamilyCurve.through(at, torch.tensor(losses, dtype=torch.float64))
    return Curves(proxy, heldout, float(at.min()), quality, dense, heldout_dense)


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


def build_comparison(
    config: CompareConfig,
    arms: Sequence[ArmPart],
    union: Sequence[UnionPoint],
    objectives: Sequence[Objective],
    facts: Mapping[str, Any],
    environment: Mapping[str, Any],
    status: Literal["complete", "interrupted"],
) -> Comparison:
    """Put finished arms together; strategies that lack a seed yet are left out of means and tests."""
    by_label = {arm.label: {part.seed: part for part in arms if part.label == arm.label} for arm in config.arms}
    full = {
        label: [parts[seed] for seed in config.seeds]
        for label, parts in by_label.items()
        if all(seed in parts for seed in config.seeds)
    }
    method = next(arm for arm in config.arms if arm.label == config.method)
    comparable = {arm.label: arm.problem == method.problem for arm in config.arms}
    summaries = [_summary(label, parts, comparable[label], config) for label, parts in full.items()]
    return Comparison(
        name=config.name,
        status=status,
        method=config.method,
        seeds=list(config.seeds),
        checkpoints=list(config.checkpoints),
        settings=asdict(config),
        facts=dict(facts),
        environment=dict(environment),
        objectives=[asdict(objective) for objective in objectives],
        arms=list(arms),
        summaries=summaries,
        tests=_tests(full, comparable, config),
        reach=_reach([summary for summary in summaries if summary.comparable]),
        union_front=list(union),
    )


def _checkpoint(
    judgement: Judgement, trials: Sequence[Trial], problem: OpenProblem, curves: Curves, config: CompareConfig
) -> CheckpointPart:
    front = front_of(trials[: judgement.evaluations], problem.objectives)
    numbers = list(judgement.points) or [trial.number for trial in judged_numbers(front, max(2, config.judged_points))]
    gains = {number: curves.gain(trials[number].values) for number in numbers}
    heldout = dict[int, float | None]()
    if problem.judge is not None:
        heldout = {
            number: curves.heldout_gain(problem.judge(trials[number].x, trials[number].origin).values)
            for number in numbers
        }
    gain, heldout_gain = _mean(gains.values()), _mean(heldout.values())
    return CheckpointPart(
        evaluations=judgement.evaluations,
        hypervolume=judgement.hypervolume,
        heldout_hypervolume=judgement.heldout,
        gain=gain,
        heldout_gain=heldout_gain,
        survival=heldout_gain / gain if heldout_gain is not None and gain is not None and gain > 1e-3 else None,
        points=numbers,
    )


def _summary(label: str, parts: Sequence[ArmPart], comparable: bool, config: CompareConfig) -> SummaryPart:
    traces = np.array([_padded(part.trace, config.budget) for part in parts])
    low, high = bands(traces)
    mean = traces.mean(0)
    rounds = [seconds for part in parts for seconds in part.proposal_seconds]
    return SummaryPart(
        label=label,
        comparable=comparable,
        checkpoints={
            evaluations: {metric: _band(_values(parts, index, metric)) for metric in METRICS}
            for index, evaluations in enumerate(config.checkpoints)
        },
        trace=[
            BandPart(mean=m, low=lo, high=hi)
            for m, lo, hi in zip(mean.tolist(), low.tolist(), high.tolist(), strict=True)
        ],
        seconds=_part(band_of([part.seconds[-1] if part.seconds else 0.0 for part in parts])),
        median_proposal_seconds=float(np.median(rounds)) if rounds else 0.0,
    )


def _tests(
    full: Mapping[str, Sequence[ArmPart]], comparable: Mapping[str, bool], config: CompareConfig
) -> list[TestPart]:
    if config.method not in full:
        return []
    tests = []
    for label, parts in full.items():
        if label == config.method:
            continue
        for index, evaluations in enumerate(config.checkpoints):
            for metric in ("hypervolume", "heldout_hypervolume"):
                first, second = _values(full[config.method], index, metric), _values(parts, index, metric)
                if None in first or None in second or (metric == "hypervolume" and not comparable[label]):
                    continue
                test = paired([v for v in first if v is not None], [v for v in second if v is not None])
                tests.append(
                    TestPart(
                        label=label,
                        metric=metric,
                        evaluations=evaluations,
                        difference=_part(test.difference),
                        wins=test.wins,
                        seeds=test.seeds,
                        p=test.p,
                    )
                )
    return tests


def _reach(summaries: Sequence[SummaryPart]) -> list[ReachPart]:
    return [
        ReachPart(
            label=one.label,
            baseline=other.label,
            evaluations=evaluations_to_reach([band.mean for band in one.trace], other.trace[-1].mean),
        )
        for one in summaries
        for other in summaries
        if one is not other
    ]


def _values(parts: Sequence[ArmPart], index: int, metric: str) -> list[float | None]:
    return [getattr(part.checkpoints[index], metric) for part in parts]


def _padded(trace: Sequence[float], length: int) -> list[float]:
    """A strategy that has nothing left to propose stays where it is."""
    return [*trace, *[trace[-1] if trace else 0.0] * (length - len(trace))]


def _band(values: Sequence[float | None]) -> BandPart | None:
    known = [value for value in values if value is not None]
    return _part(band_of(known)) if known and len(known) == len(values) else None


def _part(band: Band) -> BandPart:
    return BandPart(mean=band.mean, low=band.low, high=band.high)


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _at(curve: FamilyCurve, share: float) -> float:
    return float(curve(torch.tensor([share], dtype=torch.float64)).exp()) - EPSILON
