"""Reports of several runs -> what they have in common: one reference point, hypervolumes against it, the union front."""

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from llmbo.errors import ConfigError
from llmbo.types import counts

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
    traces, candidates = [], []
    for run, report in enumerate(reports):
        told = zip(report["trials"], counting(report), strict=True)
        complete = [(trial, eligible) for trial, eligible in told if trial["state"] == "complete"]
        gains = to_maximize([trial["objectives"] for trial, _ in complete], objectives)
        gains[[not eligible for _, eligible in complete]] = -inf
        traces.append(hypervolume_trace(gains, ref_point(objectives)))
        candidates += [(run, trial) for trial, eligible in complete if eligible]
    joined = to_maximize([trial["objectives"] for _, trial in candidates], objectives)
    union = [{"run": candidates[index][0], "trial": candidates[index][1]["number"]} for index in pareto_front(joined)]
    return _parts(reference, traces, union, hypervolume(joined, ref_point(objectives)), _warnings(reports))


def counting(report: Report) -> list[bool]:
    """Which trials of a report, whatever version wrote it, may stand on the front."""

    def derived(trial: Report) -> bool:
        return counts(trial["state"], trial.get("feasible", True), trial["objectives"] or {})

    return [derived(trial) if trial.get("counts") is None else trial["counts"] for trial in report["trials"]]


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
    ("data", "chat", "Some of the runs put their text as a chat, others did not: their values are not on one scale."),
    ("data", "window", "The runs cut their text into windows of different lengths: their losses are not on one scale."),
    ("data", "proxy", "The runs measured candidates on different numbers of tokens: held-out values compare better."),
    ("run", "dtype", "The runs computed in different number formats: differences in the third digit mean nothing."),
)


def _warnings(reports: Sequence[Report]) -> list[str]:
    return [
        text
        for part, key, text in _MUST_AGREE
        if len({str(report.get(part, {}).get(key) or "") for report in reports}) > 1
    ]
