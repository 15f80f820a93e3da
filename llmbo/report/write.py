"""A report -> the files of a run folder."""

import json
from pathlib import Path

from llmbo.files import replace_file
from llmbo.report.files import read_report
from llmbo.report.page import render_page
from llmbo.report.picture import draw_front
from llmbo.report.recovered import FILE, Recovered, read_recovered
from llmbo.report.schema import Report


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json`, `report.html`, `front.png` and `front.svg`; a reader never sees half a file.

    `report.json` goes first: when the disk fills up, the numbers are what must not be lost.
    """
    replace_file(folder / "report.json", report.model_dump_json(indent=2) + "\n")
    for name, content in draw_front(report).items():
        replace_file(folder / name, content)
    page = render_page([(str(folder), json.loads(report.model_dump_json()))])
    replace_file(folder / "report.html", page)


def add_recovered(run: Path, made: Recovered) -> None:
    """Add a model, in place of what was told of its folder before, and write the run's page anew."""
    others = [former for former in read_recovered(run) if former.folder != made.folder]
    content = [entry.model_dump() for entry in (*others, made)]
    replace_file(run / FILE, json.dumps(content, indent=2) + "\n")
    replace_file(run / "report.html", render_page([(str(run), read_report(run))]))
