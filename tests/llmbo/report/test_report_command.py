"""`llmbo report`: the right files from the right runs, and one line for everything else."""

import csv
import io
import json
import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.errors import ConfigError
from llmbo.report.comparison import compare
from llmbo.report.files import read_report
from llmbo.report.page import render_page


@pytest.fixture
def runs(finished: Any, tmp_path: Path) -> Path:
    """A working directory with two runs."""
    for name in ("tiny", "other"):
        shutil.copytree(finished.folder / "runs" / "tiny", tmp_path / "runs" / name)
    path = tmp_path / "runs" / "other" / "report.json"
    report = json.loads(path.read_text())
    report["run"]["name"] = "other"
    report["trials"] = report["trials"][:5]
    report["front"] = [point for point in report["front"] if point["trial"] < 5]
    path.write_text(json.dumps(report))
    return tmp_path


def invoke(folder: Path, *words: str) -> Result:
    with chdir(folder):
        return CliRunner().invoke(app, ["report", *words])


def refused(folder: Path, *words: str) -> str:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    result = invoke(folder, *words)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.output
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    return result.stderr


@pytest.mark.parametrize("run", ["tiny", "runs/tiny", "runs/tiny/", "runs/tiny/report.json"])
def test_a_run_can_be_named_in_many_ways(runs: Path, run: str) -> None:
    page = runs / "runs" / "tiny" / "report.html"
    written = page.read_text()  # by `optimize`
    page.unlink()
    result = invoke(runs, run)
    assert result.exit_code == 0 and re.fullmatch(
        r"Recipe, its own: [^\n]+\nReport: runs/tiny/report.html\n", result.stdout
    )
    assert page.read_text() == written


def test_tables_say_what_the_report_says(runs: Path) -> None:
    report = read_report(runs / "runs" / "tiny")
    rows = list(csv.DictReader(io.StringIO(invoke(runs, "tiny", "--format", "csv").stdout)))
    assert [int(row["number"]) for row in rows] == [trial["number"] for trial in report["trials"]]
    for row, trial in zip(rows, report["trials"], strict=True):
        assert (
            float(row["kl"]) == trial["objectives"]["kl"] and json.loads(row["architecture"]) == trial["architecture"]
        )
    front = {point["trial"] for point in report["front"]}
    assert {int(row["number"]) for row in rows if row["on_front"] == "True"} == front
    assert all(bool(row["heldout_kl"]) == (int(row["number"]) in front) for row in rows)
    lines = invoke(runs, "tiny", "other", "--format", "md").stdout.splitlines()
    assert (
        len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(front) + len(front & set(range(5))) + 2
    )
    assert lines[0].startswith("| run | trial |") and sum("| dense |" in line for line in lines) == 2


def test_several_runs_make_one_page_elsewhere(runs: Path) -> None:
    before = (runs / "runs" / "tiny" / "report.html").read_bytes()
    assert invoke(runs, "tiny", "other").stdout.splitlines()[-1] == "Report: comparison.html"
    assert invoke(runs, "tiny", "other", "--out", "both.html").exit_code == 0
    assert (runs / "both.html").read_text() == (runs / "comparison.html").read_text()
    assert (runs / "runs" / "tiny" / "report.html").read_bytes() == before


def test_bad_input_is_one_line(runs: Path) -> None:
    assert "Did you mean 'other'?" in refused(runs, "othr")
    assert "Known runs: other, tiny" in refused(runs, "zzz")
    assert "folder 'no' does not exist" in refused(runs, "tiny", "--out", "no/page.html")
    assert "is a folder" in refused(runs, "tiny", "--out", "runs")
    report = runs / "runs" / "other" / "report.json"
    for content, reason in (('{"a', "cannot be read"), ("[]", "dictionary"), ('{"run": {}}', "run.name")):
        report.write_text(content)
        assert reason in refused(runs, "other")
    whole = json.loads((runs / "runs" / "tiny" / "report.json").read_text())
    report.write_text(json.dumps({**whole, "schema_version": 3}))
    assert "schema_version is 3" in refused(runs, "other")
    report.write_text(
        json.dumps({**whole, "objectives": [{**whole["objectives"][0], "name": "loss"}, whole["objectives"][1]]})
    )
    assert "'runs/tiny' has kl,params_share, 'runs/other' has loss" in refused(runs, "tiny", "other")
    report.unlink()
    assert "llmbo watch" in refused(runs, "other")


def test_a_run_compared_with_itself_changes_nothing(runs: Path) -> None:
    report = read_report(runs / "runs" / "tiny")
    together = compare(["a", "b"], [report, report])
    assert together["traces"][0] == together["traces"][1] == pytest.approx(report["hypervolume"]["trace"])
    assert together["union_hypervolume"] == pytest.approx(report["hypervolume"]["final"])
    assert {point["trial"] for point in together["union"]} == {point["trial"] for point in report["front"]}
    assert together["warnings"] == []
    worse = {
        **report,
        "objectives": [{**part, "reference_point": part["reference_point"] * 2} for part in report["objectives"]],
    }
    assert compare(["a", "b"], [report, worse])["union_hypervolume"] > together["union_hypervolume"]
    with pytest.raises(ConfigError, match="different objectives"):
        compare(["a", "b"], [report, {**report, "objectives": report["objectives"][:1]}])


def test_parts_that_this_version_does_not_know_are_carried_along(runs: Path) -> None:
    report = {**read_report(runs / "runs" / "tiny"), "brand_new": [1]}
    assert '"brand_new":[1]' in render_page([("runs/tiny", report)])
