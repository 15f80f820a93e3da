"""What the advisor cost and what came of it: the report's part `advisor`. A function of stored trials and consultations."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmbo.advisor.parts import (
    AdvisorPart,
    DirectionGainPart,
    DropPart,
    FilterPart,
    HookPart,
    OutcomesPart,
    ProbePart,
    ProposalPart,
    RefusalPart,
)
from llmbo.advisor.proposer import dropped_and_audited
from llmbo.advisor.store import AdviceStore, Consultation
from llmbo.problem.objectives import Objective, outcomes, ref_point
from llmbo.search.gain import trial_gains
from llmbo.search.pareto import hypervolume_trace
from llmbo.types import Source, Trial


def summarise(
    settings: Mapping[str, Any],
    advice: AdviceStore,
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    dense: Mapping[str, float],
) -> AdvisorPart:
    """Add up a run.

    Args:
        settings: The run's, as stored: `advisor`, `advisor_context`, `advisor_hooks`, `seed`.
    """
    consultations = advice.all()
    added = _hypervolume_added(trials, objectives)
    quality = next(objective for objective in objectives if not objective.known)
    gains = trial_gains(trials, quality, dense)
    by_origin: Counter[str] = Counter()
    for trial in trials:
        by_origin[trial.origin] += added.get(trial.number, 0.0)  # type: ignore[assignment]
    probe = advice.known("marginals")
    reasons = [c.answer.stopped for c in consultations if c.answer is not None and c.answer.stopped]
    return AdvisorPart(
        advisor=settings["advisor"],
        context=settings["advisor_context"],
        hooks={
            hook: _hook(hook, [c for c in consultations if c.hook == hook], trials)
            for hook in settings["advisor_hooks"]
        },
        stopped=reasons[-1] if reasons else None,
        hypervolume_by_origin=dict(by_origin),
        directions=_directions(advice, trials, added, gains),
        proposals=_proposals(consultations, trials),
        refusals=[
            RefusalPart(round=c.round, hook=c.hook, kind=refusal.kind, reason=refusal.reason, text=refusal.text)
            for c in consultations
            if c.answer is not None
            for refusal in c.answer.rejections
        ],
        filter=_filter([c for c in consultations if c.hook == "filter"], trials, gains)
        if "filter" in settings["advisor_hooks"]
        else None,
        probe=ProbePart(**{key: probe[key] for key in ("evaluations", "seconds", "noise")}) if probe else None,
    )


def _proposals(consultations: Sequence[Consultation], trials: Sequence[Trial]) -> list[ProposalPart]:
    numbers = {trial.x: trial.number for trial in trials}
    return [
        ProposalPart(round=c.round, hook=c.hook, why=candidate.why, trial=numbers.get(candidate.x))
        for c in consultations
        if c.answer is not None
        for candidate in c.answer.candidates
    ]


def _hypervolume_added(trials: Sequence[Trial], objectives: Sequence[Objective]) -> dict[int, float]:
    complete = [trial for trial in trials if trial.complete]
    trace = [
        0.0,
        *hypervolume_trace(outcomes(complete, objectives), ref_point(objectives)),
    ]
    return {trial.number: after - before for trial, before, after in zip(complete, trace, trace[1:], strict=False)}


def _hook(hook: str, consultations: Sequence[Consultation], trials: Sequence[Trial]) -> HookPart:
    exchanges = [exchange for consultation in consultations for exchange in consultation.exchanges]
    costs = [exchange.cost for exchange in exchanges if exchange.attempts]
    answers = [consultation.answer for consultation in consultations if consultation.answer is not None]
    refused = Counter(rejection.kind for answer in answers for rejection in answer.rejections)
    source = {"warm_start": Source.WARM_START, "propose": Source.ADVICE}.get(hook)
    accepted = sum(len(answer.candidates) for answer in answers)
    evaluated = sum(trial.source is source for trial in trials)
    return HookPart(
        calls=sum(exchange.attempts > 0 for exchange in exchanges),
        attempts=sum(exchange.attempts for exchange in exchanges),
        prompt_tokens=sum(exchange.prompt_tokens for exchange in exchanges),
        completion_tokens=sum(exchange.completion_tokens for exchange in exchanges),
        cost=None if None in costs else round(sum(cost for cost in costs if cost is not None), 6),
        seconds=round(sum(exchange.seconds for exchange in exchanges), 3),
        outcomes=OutcomesPart(
            evaluated=evaluated if source else None,
            vetoed=max(0, accepted - evaluated) if source else None,
            duplicate=refused["duplicate"],
            illegal=refused["illegal"],
            unparsable=refused["unparsable"],
        ),
    )


def _directions(
    advice: AdviceStore, trials: Sequence[Trial], added: Mapping[int, float], gains: Mapping[int, float]
) -> list[DirectionGainPart]:
    followed = advice.followed()
    reasons = {d.name: d.why for c in advice.all() if c.answer is not None for d in c.answer.directions}
    led = {name: [t for t in trials if t.source is Source.DIRECTION and followed.get(t.x) == name] for name in reasons}
    return [
        DirectionGainPart(
            name=name,
            why=reasons[name],
            trials=len(own),
            hypervolume=sum(added.get(trial.number, 0.0) for trial in own),
            best_gain=max((gains[trial.number] for trial in own if trial.number in gains), default=None),
        )
        for name, own in led.items()
    ]


def _filter(consultations: Sequence[Consultation], trials: Sequence[Trial], gains: Mapping[int, float]) -> FilterPart:
    drops: list[DropPart] = []
    right: list[bool] = []
    audited: list[int] = []
    by_point = {trial.x: trial for trial in trials}
    for consultation in consultations:
        reviewed = [tuple(x) for x in consultation.extra.get("reviewed", ())]
        going = (
            {
                reviewed[index]: gone
                for index, gone in dropped_and_audited(
                    consultation.answer, len(reviewed), consultation.extra["seed"]
                ).items()
            }
            if consultation.answer is not None and reviewed
            else {}
        )
        drops += _drops(consultation, reviewed, going, by_point)
        kept = sorted(
            gains[by_point[x].number]
            for x in reviewed
            if x not in going and x in by_point and by_point[x].number in gains
        )
        for x in (x for x, gone in going.items() if not gone and x in by_point):
            audited.append(by_point[x].number)
            if kept and by_point[x].number in gains:
                right.append(gains[by_point[x].number] < kept[len(kept) // 2])
    return FilterPart(
        reviewed=sum(len(consultation.extra.get("reviewed", ())) for consultation in consultations),
        dropped=len(drops),
        audited=audited,
        precision=sum(right) / len(right) if right else None,
        drops=drops,
    )


def _drops(
    consultation: Consultation,
    reviewed: Sequence[tuple[int, ...]],
    going: Mapping[tuple[int, ...], bool],
    by_point: Mapping[tuple[int, ...], Trial],
) -> list[DropPart]:
    decisions = consultation.answer.decisions if consultation.answer is not None else ()
    against = {reviewed[decision.index]: decision for decision in decisions if not decision.keep}
    return [
        DropPart(
            round=consultation.round,
            confidence=against[x].confidence,
            why=against[x].why,
            trial=by_point[x].number if x in by_point else None,
        )
        for x in going
    ]
