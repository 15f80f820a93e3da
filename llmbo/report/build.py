"""Stored trials -> a report. Needs no model."""

from collections.abc import Mapping, Sequence
from typing import Any

from llmbo.advisor.parts import AdvisorPart
from llmbo.config.objectives import OBJECTIVES, parse_limits
from llmbo.problem.objectives import Objective, outcomes, ref_point
from llmbo.problem.space import SearchSpace
from llmbo.report.findings import warnings_of
from llmbo.report.origin import ElsewherePart
from llmbo.report.schema import (
    ArchitecturePart,
    ConstraintPart,
    FrontPoint,
    HypervolumePart,
    ObjectivePart,
    RecipePart,
    Report,
    SpacePart,
    TrialPart,
    Values,
)
from llmbo.search.gain import trial_gains
from llmbo.search.pareto import hypervolume_trace, pareto_front
from llmbo.types import Trial
from pruning.widths import units_of


def front_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The non-dominated complete trials within the limits, smallest first."""
    complete = [trial for trial in trials if trial.complete]
    front = [complete[index] for index in pareto_front(outcomes(complete, objectives))]
    return sorted(front, key=lambda trial: (trial.values["params"], trial.number))


def build_report(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    space: SearchSpace,
    facts: Mapping[str, Any],
    heldout: Mapping[int | None, Mapping[str, float]],
    advisor: AdvisorPart | None = None,
    elsewhere: Mapping[int | None, Mapping[str, float]] = {},
    judged: Mapping[str, Mapping[int | None, Mapping[str, Any]]] = {},
    recipes: Sequence[RecipePart] = (),
) -> Report:
    """Put stored trials into the report's shape.

    Args:
        facts: `run`, `model` and `data` as the report shows them, `dense` and `dense_heldout` values,
            `importance` as a list of `ImportancePart` fields, `item_files` as a list of `ItemsPart`, and `elsewhere` as the report
            shows it, with `dense` values there.
        heldout: Held-out values by trial number.
        advisor: What advice cost and brought, for a run with an advisor.
        elsewhere: Values on text of another domain by trial number.
        judged: `items`, `samples`, `refitted`, `noise` and `noise_elsewhere` of trials by number, and of the dense model (None).
        recipes: Of the allocation path (`llmbo.report.recipes`).
    """
    another = dict(facts.get("elsewhere") or {})
    dense_elsewhere = another.pop("dense", None)
    complete = [trial for trial in trials if trial.complete]
    quality = next(objective for objective in objectives if not objective.known)
    gains = trial_gains(trials, quality, facts["dense"])
    trace = hypervolume_trace(outcomes(complete, objectives), ref_point(objectives))
    limits = parse_limits(facts["run"]["settings"].get("maximum", ()))

    def seen(trial: int | None) -> dict[str, Any]:
        return {kind: found.get(trial) for kind, found in judged.items()}

    return Report(
        run=facts["run"],
        model=facts["model"],
        data=facts["data"],
        elsewhere=ElsewherePart(**another) if another else None,
        items=facts.get("item_files", []),
        space=SpacePart(
            dimensions=space.d,
            kv_group_levels=sorted({units_of(width) for width in space.widths["attention"]}),
            neuron_levels=space.widths["mlp"],
            min_share=space.min_share,
        ),
        objectives=[
            ObjectivePart(
                name=objective.name,
                unit=objective.unit,
                direction="maximize" if objective.maximize else "minimize",
                reference_point=objective.reference,
                known=objective.known,
            )
            for objective in objectives
        ],
        constraints=[
            ConstraintPart(name=name, unit=OBJECTIVES[name].unit, maximum=limit, known=OBJECTIVES[name].known)
            for name, limit in limits.items()
        ],
        dense=_point(
            None, space.max_levels, space, facts["dense"], facts.get("dense_heldout"), dense_elsewhere, **seen(None)
        ),
        trials=[
            TrialPart(
                number=trial.number,
                round=trial.round,
                origin=trial.origin,
                state=trial.state.value,
                architecture=_architecture(space, trial.x),
                objectives=Values.model_validate(trial.values) if trial.complete else None,
                seconds=trial.seconds,
                failure=trial.failure,
                gain=gains.get(trial.number),
                feasible=trial.feasible,
                counts=trial.counts,
                why=trial.why,
                recipe=dict(trial.recipe) or None,
            )
            for trial in trials
        ],
        front=[
            _point(
                trial.number,
                trial.x,
                space,
                trial.values,
                heldout.get(trial.number),
                elsewhere.get(trial.number),
                **seen(trial.number),
            )
            for trial in front_of(trials, objectives)
        ],
        hypervolume=HypervolumePart(final=trace[-1] if trace else 0.0, trace=trace),
        warnings=warnings_of(trials, objectives, limits),
        importance=facts.get("importance", []),
        recipes=list(recipes),
        advisor=advisor,
    )


def _architecture(space: SearchSpace, x: tuple[int, ...]) -> ArchitecturePart:
    return ArchitecturePart(**space.decode(x).to_dict())


def _point(
    trial: int | None,
    x: tuple[int, ...],
    space: SearchSpace,
    values: Mapping[str, float],
    heldout: Mapping[str, float] | None,
    elsewhere: Mapping[str, float] | None,
    **seen: Any,
) -> FrontPoint:
    return FrontPoint(
        trial=trial,
        architecture=_architecture(space, x),
        objectives=Values.model_validate(values),
        heldout=Values.model_validate(heldout) if heldout else None,
        elsewhere=Values.model_validate(elsewhere) if elsewhere else None,
        **seen,
    )
