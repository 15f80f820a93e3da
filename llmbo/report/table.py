"""A report -> rows, for people (Markdown) and programs (CSV)."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmbo.errors import printable
from llmbo.report.quantities import item_values

REFITTED = ("objectives", "heldout", "elsewhere")
NOISES = ("noise", "noise_elsewhere", "refitted_noise", "refitted_noise_elsewhere")
Runs = Sequence[tuple[str, Mapping[str, Any]]]


def front_rows(runs: Runs, labels: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the fronts, smallest model first, each run's dense model last."""
    quantities = _quantities(runs)
    measured = [name for name in quantities if any(_judged(report, name) for _, report in runs)]
    others = dict.fromkeys(name for _, report in runs if (name := elsewhere_name(report)))
    seen_there = [name for name in measured if any(_elsewhere(report["dense"], name) is not None for _, report in runs)]
    own = {text_name(report["data"]["source"]) for _, report in runs}
    on = f" on {own.pop()}" if others and len(own) == 1 else ""  # several runs may have texts of their own
    items, refitted = item_columns(runs), [name for name in measured if _was_refitted(runs, name)]
    noise, both = noise_columns(runs), ("kl", "loss")
    own_noise = [name for name in (*both, "not_better_than") if ("noise", name) in noise]
    far_noise, refitted_noise = (
        [name for name in both if (field, name) in noise] for field in ("noise_elsewhere", "refitted_noise")
    )
    headings = [
        *(["run"] if len(runs) > 1 else []),
        "trial",
        *(f"{name}{on}" if name in seen_there else name for name in quantities),
        *(f"held-out {name}{on}" if name in seen_there else f"held-out {name}" for name in measured),
        *("not surely better than" if name not in both else f"± held-out {name}{on}" for name in own_noise),
        *(f"held-out {name} on {other}" for other in others for name in seen_there),
        *(f"± held-out {name} on {other}" for other in others for name in far_noise),
        *(f"refitted held-out {name}{on if name in seen_there else ''}" for name in refitted),
        *(f"± refitted held-out {name}{on}" for name in refitted_noise),
        *items,
    ]
    rows = []
    for label, (_, report) in zip(labels, runs, strict=True):
        for point in [*report["front"], report["dense"]]:
            number = "dense" if point["trial"] is None else str(point["trial"])
            values = [_shown(point["objectives"].get(name)) for name in quantities]
            heldout = [_shown((point["heldout"] or {}).get(name)) for name in measured]
            elsewhere = [
                _shown(_elsewhere(point, name) if elsewhere_name(report) == other else None)
                for other in others
                for name in seen_there
            ]
            asked = [_shown(item_values(point).get(name)) for name in items]
            again = [_shown(_refitted(point, "heldout").get(name)) for name in refitted]
            unsure = [_shown(_noise(point, "noise", name)) for name in own_noise]
            unsure_there = [
                _shown(_noise(point, "noise_elsewhere", name) if elsewhere_name(report) == other else None)
                for other in others
                for name in far_noise
            ]
            unsure_again = [_shown(_noise(point, "refitted_noise", name)) for name in refitted_noise]
            seen = (*values, *heldout, *unsure, *elsewhere, *unsure_there, *again, *unsure_again, *asked)
            rows.append([*([label] if len(runs) > 1 else []), number, *seen])
    return headings, rows


def text_name(source: str) -> str:
    """A text's name for a heading: `builtin`, `python`, `self`, `mix`, a file's or a data set's own."""
    kind, _, rest = source.partition(":")
    return Path(rest).name if kind == "text" else rest.split(":")[0] if kind == "hf" else source.split()[0]


def elsewhere_name(report: Mapping[str, Any]) -> str:
    """Of the text of another domain that a report has values on; empty if it has none."""
    return text_name(report["elsewhere"]["source"]) if report.get("elsewhere") else ""


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
    there = [name for name in quantities if any(_elsewhere(report["dense"], name) is not None for _, report in runs)]
    elsewhere = ["elsewhere", *(f"elsewhere_{name}" for name in there)] if there else []
    refitted = [name for name in quantities if _was_refitted(runs, name)]
    again = [f"refitted_{part}_{name}" for part in REFITTED for name in refitted]
    noise = noise_columns(runs)
    unsure = [f"{field}_{name}" for field, name in noise]
    headings = ("run", *keys, "on_front", *quantities, *heldout, *unsure, *elsewhere, *again, *items, "architecture")
    writer.writerow([_defused(cell) for cell in headings])
    for label, (_, report) in zip(labels, runs, strict=True):
        front = {point["trial"]: point for point in report["front"]}
        for trial in report["trials"]:
            values, point = trial["objectives"] or {}, front.get(trial["number"], {})
            seen, far = point.get("heldout") or {}, point.get("elsewhere") or {}
            cells = [
                *(trial.get(key) for key in keys),
                trial["number"] in front,
                *(values.get(name) for name in quantities),
                *(seen.get(name) for name in quantities),
                *(_noise(point, *column) for column in noise),
                *([elsewhere_name(report) if far else None] if there else []),
                *(far.get(name) for name in there),
                *(_refitted(point, part).get(name) for part in REFITTED for name in refitted),
                *(item_values(point).get(name) for name in items),
            ]
            writer.writerow([_defused(cell) for cell in (label, *cells, json.dumps(trial["architecture"]))])
    return out.getvalue()


def item_columns(runs: Runs) -> list[str]:
    """Names of what was asked of the fronts in files of items."""
    return list(dict.fromkeys(name for _, report in runs for name in item_values(report["dense"])))


def noise_columns(runs: Runs) -> list[tuple[str, str]]:
    """What chance leaves open, of which values and in what, where any point of the fronts tells it."""
    points = [point for _, report in runs for point in report["front"]]
    return list(dict.fromkeys((field, name) for field in NOISES for point in points for name in _noises(point, field)))


def _noises(point: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """One of `NOISES`; empty where a point has none."""
    part = (point.get("refitted") or {}) if field.startswith("refitted_") else point
    return part.get(field.removeprefix("refitted_")) or {}


def _noise(point: Mapping[str, Any], field: str, name: str) -> float | int | str | None:
    """As a cell; numbers of trials with blanks between them."""
    value = _noises(point, field).get(name)
    return " ".join(map(str, value)) if isinstance(value, list) else value


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


def _elsewhere(point: Mapping[str, Any], name: str) -> float | None:
    """The value on text of another domain."""
    value: float | None = (point.get("elsewhere") or {}).get(name)
    return value


def _refitted(point: Mapping[str, Any], part: str) -> Mapping[str, float]:
    """What a point measures with refits in sequence, on windows named in `REFITTED`."""
    return (point.get("refitted") or {}).get(part) or {}


def _was_refitted(runs: Runs, name: str) -> bool:
    """Whether refits in sequence changed `name` anywhere: they change no cost."""
    points = [point for _, report in runs for point in report["front"] if point.get("refitted")]
    return any(point["objectives"].get(name) != _refitted(point, "objectives").get(name) for point in points)


def _shown(value: float | str | None) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
