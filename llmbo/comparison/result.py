"""Finished arms -> the comparison: means and intervals over seeds, paired tests, evaluations to reach each other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any, Literal

import numpy as np

from llmbo.comparison.config import CompareConfig
from llmbo.comparison.schema import (
    HELDOUT,
    ArmPart,
    BandPart,
    Comparison,
    ReachPart,
    SummaryPart,
    TestPart,
    UnionPoint,
)
from llmbo.comparison.statistics import Band, bands, evaluations_to_reach, paired
from llmbo.comparison.statistics import band as band_of
from llmbo.problem.objectives import Objective

VOLUMES = ("hypervolume", *HELDOUT)
METRICS = (*VOLUMES, "gain", "heldout_gain")
LOG_KL = ("log_kl", "heldout_log_kl")


def build_comparison(
    config: CompareConfig,
    arms: Sequence[ArmPart],
    union: Sequence[UnionPoint],
    objectives: Sequence[Objective],
    judged: Mapping[str, Sequence[Objective]],
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
        judged={quality: [asdict(objective) for objective in some] for quality, some in judged.items()},
        arms=list(arms),
        summaries=summaries,
        tests=_tests(full, comparable, config),
        reach=_reach([summary for summary in summaries if summary.comparable]),
        union_front=list(union),
    )


def _summary(label: str, parts: Sequence[ArmPart], comparable: bool, config: CompareConfig) -> SummaryPart:
    traces = np.array([_padded(part.trace, config.budget) for part in parts])
    rounds = [seconds for part in parts for seconds in part.proposal_seconds]
    return SummaryPart(
        label=label,
        comparable=comparable,
        checkpoints={
            evaluations: {metric: _band(_values(parts, index, metric)) for metric in METRICS}
            for index, evaluations in enumerate(config.checkpoints)
        },
        trace=[_part(band) for band in bands(traces)],
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
            for metric in (*VOLUMES, *LOG_KL):
                if metric in ("hypervolume", "log_kl") and not comparable[label]:
                    continue
                pairs = [_pair(*both, index, metric) for both in zip(full[config.method], parts, strict=True)]
                if None in pairs:
                    continue
                test = paired(*zip(*(pair for pair in pairs if pair), strict=True))
                tests.append(
                    TestPart(
                        label=label,
                        metric=metric,
                        evaluations=evaluations,
                        difference=_part(test.difference),
                        wins=test.wins,
                        seeds=test.seeds,
                        p=test.p,
                        verdict=test.verdict,
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


def _pair(method: ArmPart, other: ArmPart, index: int, metric: str) -> tuple[float, float] | None:
    """A metric of both under one seed, larger is better; None where it is not known of both."""
    first, second = (getattr(part.checkpoints[index], metric) for part in (method, other))
    if metric not in LOG_KL:
        return None if None in (first, second) else (first, second)
    both = [pair for pair in zip(first, second, strict=False) if None not in pair]
    if not both:
        return None
    ours, others = (fmean(column) for column in zip(*both, strict=True))
    return -ours, -others


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
