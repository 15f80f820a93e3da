"""Reports -> one HTML page that needs nothing else: no network, no second file. Needs no model and, for one run, no torch.

Whatever a report holds may come from outside (names, paths, an advisor's words). The template escapes it, the data block
cannot end early, the page's script writes text nodes only, and the content security policy allows no other script.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from llmbo.config.formats import ENGINES, FORMATS, Format
from llmbo.config.run import exported_as
from llmbo.errors import printable
from llmbo.report.comparison import compare, counting
from llmbo.report.quantities import quality_of, quantities
from llmbo.report.recovered import read_recovered
from llmbo.report.table import elsewhere_name, front_rows, item_columns
from llmbo.version import __version__

LIBRARY = "echarts.common.min.js"
SCRIPTS = ("core.js", "charts.js", "trial.js", "sections.js", "recipes.js", "main.js")  # in the order of what they use


def render_page(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The page of one run, or of several on top of each other.

    Args:
        runs: Each run's folder, as the export command should name it, and its report.

    Raises:
        ConfigError: The runs were not searched for the same objectives.
        StorageError: What a run tells of recovered models is damaged.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    labels = labels_of(runs)
    together = compare(labels, [report for _, report in runs])
    data = {
        **{key: value for key, value in together.items() if key != "traces"},
        "quality": quality_of(runs[0][1]["objectives"]),
        "quantities": quantities(runs[0][1]["objectives"], item_columns(runs)),
        "runs": [
            {"label": label, "folder": folder, "trace": trace, "counts": counting(report), "report": report}
            | {"elsewhere": elsewhere_name(report)}
            | {"flags": _flags(report)}
            | {"recovered": [made.model_dump() for made in read_recovered(Path(folder))]}
            for label, trace, (folder, report) in zip(labels, together["traces"], runs, strict=True)
        ],
        "formats": [{"name": row.name, "title": row.description} for row in _formats(runs[0][1])],
    }
    style, library, script = _asset("page.css"), _asset(LIBRARY), "\n".join(map(_asset, SCRIPTS))
    headings, rows = front_rows(runs, labels)
    environment = Environment(
        loader=PackageLoader("llmbo.report", "assets"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.j2").render(
        title=_title(labels, runs),
        policy=_policy(scripts=(library, script), style=style),
        style=Markup(style),
        library=Markup(library),
        script=Markup(script),
        data=Markup(_json(data)),
        facts=_facts(runs, together),
        warnings=[
            f"{label}: {text}" if len(runs) > 1 else text
            for label, (_, report) in zip(labels, runs, strict=True)
            for text in report.get("warnings", [])
        ],
        headings=headings,
        rows=rows,
        version=__version__,
    )


def _formats(report: Mapping[str, Any]) -> list[Format]:
    """All of them, first what the run counted files of, then what its engines take."""
    asked = [exported_as(report["run"]["settings"])[0]]
    asked += [ENGINES[name].format for name in report["run"]["settings"].get("deploy", ()) if name in ENGINES]
    return [FORMATS[name] for name in dict.fromkeys([*asked, *FORMATS])]


def _flags(report: Mapping[str, Any]) -> dict[str, str]:
    """By format, what `llmbo export` is to be told of how weights are stored: as the run counted them."""
    format, counted = exported_as(report["run"]["settings"])
    return {format: FORMATS[format].flag(counted)} if counted else {}


def _asset(name: str) -> str:
    return resources.files("llmbo.report").joinpath("assets", name).read_text(encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no `<`, hence no end tag and no comment. Nothing in it turns text round."""
    return printable(json.dumps(data, ensure_ascii=False, separators=(",", ":"))).replace("<", "\\u003c")


def _policy(scripts: Sequence[str], style: str) -> str:
    """Only the page's own scripts and style, known by their digests, and nothing from anywhere else."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(digest, scripts))}; style-src {digest(style)}"
    )


def labels_of(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Names that tell the runs apart: the runs' own, or their folders where two are called the same."""
    names = [str(report["run"]["name"]) for _, report in runs]
    return names if len(set(names)) == len(names) else [folder for folder, _ in runs]


def _title(labels: Sequence[str], runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if len(runs) > 1:
        return f"llmbo: {', '.join(labels)}"
    return f"llmbo: {runs[0][1]['model']['name']}"


def _facts(runs: Sequence[tuple[str, Mapping[str, Any]]], together: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line below the title."""
    if len(runs) > 1:
        return [("runs", str(len(runs))), ("union front", f"{len(together['union'])} points")]
    report = runs[0][1]
    run, model = report["run"], report["model"]
    return [
        ("run", f"{run['name']} ({run['status']})"),
        ("dense model", f"{model['params'] / 1e6:.1f} M parameters, {model['num_hidden_layers']} layers"),
        ("front", f"{len(report['front'])} points from {len(report['trials'])} trials"),
        ("hypervolume", f"{report['hypervolume']['final']:.4f}"),
        ("text", report["data"]["source"]),
        *([("judged on", report["elsewhere"]["source"])] if report.get("elsewhere") else []),
        ("took", f"{sum(run['seconds'].values()) / 60:.1f} min"),
    ]
