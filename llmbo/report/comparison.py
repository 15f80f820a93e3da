"""Reports of several runs -> what they have in common: one reference point, hypervolumes against it, the union front."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from llmbo.errors import ConfigError

Report = Mapping[str, Any]


def compare(labels: Sequence[str], reports: Sequence[Report]) -> dict[str, Any]:
    """What the page shows of the runs together.

    Returns:
        `reference_point` by objective, the worst of all runs'; `traces`, hypervolume after each complete trial by run;
        `union`, the points that no trial of any run beats, as run and trial numbers; `union_hypervolume`; `warnings`.

    Raises:
        ConfigError: The runs were not searched for the same objectives.
    """
    reference = _common_reference(labels, reports)
    if len(reports) == 1:
        volume = reports[0]["hypervolume"]
        union = [{"run": 0, "trial": point["trial"]} for point in reports[0]["front"]]
        return _parts(reference, [volume["trace"]], union, volume["final"], [])

    from llmbo.problem.objectives import Objective, ref_point, to_maximize
    from llmbo.search.pareto import hypervolume, hypervolume_trace, pareto_front

    objectives = [
        Objective(part["name"], part["unit"], part["known"], reference[part["name"]], part["direction"] == "maximize")
        for part in reports[0]["objectives"]
    ]
    complete = [[trial for trial in report["trials"] if trial["state"] == "complete"] for report in reports]
    gains = [to_maximize([trial["objectives"] for trial in trials], objectives) for trials in complete]
    for trials, own in zip(
        complete, gains, strict=True
    ):  # what breaks a constraint or lost its race adds no hypervolume
        own[[not _counts(trial) for trial in trials]] = -inf
    all_of_them = [(run, trial) for run, trials in enumerate(complete) for trial in trials if _counts(trial)]
    joined = to_maximize([trial["objectives"] for _, trial in all_of_them], objectives)
    union = [{"run": all_of_them[index][0], "trial": all_of_them[index][1]["number"]} for index in pareto_front(joined)]
    traces = [hypervolume_trace(own, ref_point(objectives)) for own in gains]
    return _parts(reference, traces, union, hypervolume(joined, ref_point(objectives)), _warnings(reports))


def _counts(trial: Mapping[str, Any]) -> bool:
    """Whether a complete trial keeps the limits and was measured to the end."""
    return trial.get("feasible", True) and trial["objectives"].get("error") is None


def _parts(
    reference: dict[str, float],
    traces: list[list[float]],
    union: list[dict[str, int]],
    volume: float,
    warnings: list[str],
) -> dict[str, Any]:
    return {
        "reference_point": reference,
        "traces": traces,
        "union": union,
        "union_hypervolume": volume,
        "warnings": warnings,
    }


def _common_reference(labels: Sequence[str], reports: Sequence[Report]) -> dict[str, float]:
    def axes(report: Report) -> dict[str, str]:
        return {part["name"]: part["direction"] for part in report["objectives"]}

    for label, report in zip(labels, reports, strict=True):
        if axes(report) != axes(reports[0]):
            first, other = (",".join(axes(one)) for one in (reports[0], report))
            raise ConfigError(
                f"Runs with different objectives share no front: '{labels[0]}' has {first}, '{label}' has {other}. "
                "Report them one by one."
            )
    worst = {"minimize": max, "maximize": min}
    return {
        name: worst[direction](
            part["reference_point"] for report in reports for part in report["objectives"] if part["name"] == name
        )
        for name, direction in axes(reports[0]).items()
    }


# What must be equal for values of two runs to mean the same: the report's part, its key, and what to tell the reader.
_MUST_AGREE = (
    ("model", "fingerprint", "The runs prune different models: compare shapes, not values."),
    ("data", "sha256", "The runs measured on different texts: their values are not on one scale."),
    ("data", "window", "The runs cut their text into windows of different lengths: their losses are not on one scale."),
    ("data", "proxy", "The runs measured candidates on different numbers of tokens: held-out values compare better."),
    ("run", "dtype", "The runs computed in different number formats: differences in the third digit mean nothing."),
)


def _warnings(reports: Sequence[Report]) -> list[str]:
    return [
        text for part, key, text in _MUST_AGREE if len({str(report.get(part, {}).get(key)) for report in reports}) > 1
    ]
