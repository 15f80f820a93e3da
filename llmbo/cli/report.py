"""`llmbo report`: the page, pictures and tables of finished runs."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llmbo.cli.common import one_line_errors, say


class Format(StrEnum):
    HTML = "html"
    CSV = "csv"
    MD = "md"


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or names below runs/.")],
    format: Annotated[
        Format, typer.Option(help="html: the page; csv: every trial; md: the front as a table.")
    ] = Format.HTML,
    out: Annotated[
        Path | None, typer.Option(help="File to write. By default html goes next to report.json, the rest to stdout.")
    ] = None,
) -> None:
    """Write the report page of a run, or one page that compares several.

    Example: llmbo report runs/llama          writes runs/llama/report.html

    Example: llmbo report llama other --out both.html

    Example: llmbo report llama --format csv > trials.csv
    """
    from llmbo.report.files import find_run, read_report

    with one_line_errors(interrupted="Interrupted. Nothing was written."):
        folders = [find_run(run) for run in runs]
        found = [(str(folder), read_report(folder)) for folder in folders]
        text = _render(found, format)
        for folder, one in found:
            for warning in one.get("warnings", []):
                say(f"warning: {folder}: {warning}", err=True)
        if out is None and format is Format.HTML:
            out = folders[0] / "report.html" if len(folders) == 1 else Path("comparison.html")
        if out is None:
            say(text, nl=False)
            return
        _write(out, text)
        for folder, one in found:
            for line in _recipes(one):
                say(f"{folder}: {line}" if len(found) > 1 else line)
        say(f"Report: {out}")


def _recipes(report: Mapping[str, Any]) -> Iterator[str]:
    """The run's own recipe, and the best that it found, in a line each."""
    for part in report.get("recipes", []):
        if names := [word for name, word in (("own", "its own"), ("best", "the best found")) if name in part["names"]]:
            gain = "" if part.get("gain") is None else f", {part['gain']:.1%} less lost at equal size"
            yield f"Recipe, {' and '.join(names)}{gain}: {part['words']}"


def _render(runs: list[tuple[str, Mapping[str, Any]]], format: Format) -> str:
    from llmbo.report.page import labels_of, render_page
    from llmbo.report.table import as_csv, as_markdown

    writers = {
        Format.HTML: lambda: render_page(runs),
        Format.CSV: lambda: as_csv(runs, labels_of(runs)),
        Format.MD: lambda: as_markdown(runs, labels_of(runs)),
    }
    return writers[format]()


def _write(path: Path, text: str) -> None:
    from llmbo.errors import ConfigError
    from llmbo.files import replace_file

    if not path.parent.is_dir():
        raise ConfigError(f"--out {path}: the folder '{path.parent}' does not exist. Make it first.")
    if path.is_dir():
        raise ConfigError(f"--out {path} is a folder: name a file in it.")
    replace_file(path, text)
