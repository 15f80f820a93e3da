"""A report -> rows, for people (Markdown) and programs (CSV)."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmbo.errors import printable
from llmbo.report.quantities import item_values

Runs = Sequence[tuple[str, Mapping[str, Any]]]


def front_rows(runs: Runs, labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the fronts, smallest model first, each run's dense model last."""
    quantities = _quantities(runs)
    measured = [name for name in quantities if any(_judged(report, name) for _, report in runs)]
    items = item_columns(runs)
    headings = [
        *(["run"] if len(runs) > 1 else []),
        "trial",
        *quantities,
        *(f"held-out {name}" for name in measured),
        *items,
    ]
    rows = []
    for label, (_, report) in zip(labels, runs, strict=True):
        for point in [*report["front"], report["dense"]]:
            number = "dense" if point["trial"] is None else str(point["trial"])
            values = [_shown(point["objectives"].get(name)) for name in quantities]
            heldout = [_shown((point["heldout"] or {}).get(name)) for name in measured]
            asked = [_shown(item_values(point).get(name)) for name in items]
            rows.append([*([label] if len(runs) > 1 else []), number, *values, *heldout, *asked])
    return headings, rows


def as_markdown(runs: Runs, labels: Sequence[str]) -> str:
    """The fronts as a Markdown table."""
    headings, rows = front_rows(runs, labels)
    cells = [[printable(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headings, *rows)]
    lines = [cells[0], ["---:"] * len(headings), *cells[1:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_csv(runs: Runs, labels: Sequence[str]) -> str:
    """Every trial, one row each. Values in full precision, the architecture as JSON."""
    quantities = _quantities(runs)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    keys = ("number", "round", "origin", "state", "seconds", "gain", "failure", "why")
    heldout, items = [f"heldout_{name}" for name in quantities], item_columns(runs)
    writer.writerow(
        [_defused(cell) for cell in ("run", *keys, "on_front", *quantities, *heldout, *items, "architecture")]
    )
    for label, (_, report) in zip(labels, runs, strict=True):
        front = {point["trial"]: point["heldout"] or {} for point in report["front"]}
        asked = {point["trial"]: item_values(point) for point in report["front"]}
        for trial in report["trials"]:
            values, seen = trial["objectives"] or {}, front.get(trial["number"], {})
            cells = [
                *(trial.get(key) for key in keys),
                trial["number"] in front,
                *(values.get(name) for name in quantities),
                *(seen.get(name) for name in quantities),
                *(asked.get(trial["number"], {}).get(name) for name in items),
            ]
            writer.writerow([_defused(cell) for cell in (label, *cells, json.dumps(trial["architecture"]))])
    return out.getvalue()


def item_columns(runs: Runs) -> list[str]:
    """Names of what was asked of the fronts in files of items."""
    return list(dict.fromkeys(name for _, report in runs for name in item_values(report["dense"])))


def _defused(cell: object) -> object:
    """A word that a spreadsheet would run as a formula gets a quote before it (OWASP, CSV injection); numbers stay numbers."""
    if not isinstance(cell, str):
        return cell
    text = printable(cell)
    if not text.startswith(("=", "+", "-", "@", "\t", "\n", "\r")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _quantities(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for _, report in runs for name in report["dense"]["objectives"]))


def _judged(report: Mapping[str, Any], name: str) -> bool:
    """Whether held-out windows say something about `name` that the proxy windows do not."""
    heldout = [(point["objectives"], point["heldout"]) for point in report["front"] if point["heldout"]]
    return any(proxy.get(name) != seen.get(name) for proxy, seen in heldout)


def _shown(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
