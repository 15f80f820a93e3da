"""What the page knows of the names in a report: unit, format, direction. Rows of the table, and objectives that it lacks."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from llmbo.config.objectives import QUANTITIES, Quantity

SHOWN = ("unit", "format", "maximize", "measured", "brief")


def quality_of(objectives: Sequence[Mapping[str, Any]]) -> str:
    """Of a report's objectives the one that says how good a model is."""
    measured = [part["name"] for part in objectives if not part["known"]]
    rows = [name for name in measured if name in QUANTITIES]
    return next(iter([*rows, *measured, objectives[0]["name"]]))


def item_values(point: Mapping[str, Any]) -> dict[str, float]:
    """What a point of a front got right of each file of items, as quantities beside the others: "arc_easy acc_norm"."""
    return {
        f"{file} {metric}": value
        for file, scores in (point.get("items") or {}).items()
        for metric, value in scores.items()
        if value is not None and not metric.endswith("_stderr")
    }


def quantities(objectives: Sequence[Mapping[str, Any]], items: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """What is known of each quantity that a report with these objectives may hold, by name.

    Args:
        items: Names of quantities that `item_values` gave.

    Returns:
        `unit`, `format`, `maximize`, `measured` and `brief`, as in `llmbo.config.objectives.Quantity`. An objective is as the report
        says, whether this version has a row for it or not. `gain`, quality saved, is in its quality's unit.
    """
    rows = dict(QUANTITIES)
    for part in objectives:
        row = rows.get(part["name"], Quantity(part["unit"], ""))
        rows[part["name"]] = replace(row, unit=part["unit"], maximize=part["direction"] == "maximize")
    quality = quality_of(objectives)
    rows[quality] = replace(rows[quality], measured=True)
    for name in items:
        measured = Quantity("share of items", "", measured=True, maximize=True, format="share")
        rows[name] = Quantity("", "", measured=True) if name.endswith(" perplexity") else measured
    rows["gain"] = replace(rows[quality], maximize=True, brief=True)
    return {name: {key: asdict(row)[key] for key in SHOWN} for name, row in rows.items()}
