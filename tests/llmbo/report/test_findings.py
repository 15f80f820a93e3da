"""A run whose trials all miss the limits or the reference point says so: at its end, in the report, on the page."""

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.cli.common import EXIT_NOTHING_COUNTS
from llmbo.report.findings import warnings_of
from llmbo.types import Trial, TrialState

# flags -> what the line names: the limit, the best that was reached, the remedy
NOTHING: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "limit": ({"max": "kl=1e-12"}, ("--max kl=1e-12", "the best kl is", "of trial", "larger limit")),
    "reference point": (
        {"reference_point": "1e-12,1"},
        ("kl 1e-12, params_share 1", "the best kl is", "of trial", "--reference-point"),
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_run_without_a_front_is_loud(llmbo: Any, kind: str) -> None:
    flags, words = NOTHING[kind]
    result = llmbo(budget=3, strategy="threshold", **flags)
    report = llmbo.report()
    lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert result.exit_code == EXIT_NOTHING_COUNTS and len(lines) == 1
    assert report["warnings"] == [lines[0].removeprefix("warning: ")] and all(word in lines[0] for word in words)
    best = min(trial["objectives"]["kl"] for trial in report["trials"])
    assert f"{best:.4g}" in lines[0] and len(report["trials"]) == 3  # what was measured is kept
    assert "warning" in (page := (llmbo.folder / "runs/tiny/report.html").read_text(encoding="utf-8"))
    assert f'role="alert">{lines[0][9:29]}' in page
    again = CliRunner().invoke(app, ["report", str(llmbo.folder / "runs" / "tiny"), "--format", "md"])
    assert again.exit_code == 0 and lines[0].removeprefix("warning: ") in again.stderr


@pytest.mark.parametrize("flag", ["quiet", "json_logs"])
def test_it_is_said_to_programs_too(llmbo: Any, flag: str) -> None:
    result = llmbo(budget=1, strategy="threshold", max="kl=1e-12", **{flag: True})
    assert result.exit_code == EXIT_NOTHING_COUNTS
    said = result.stderr.splitlines()
    if flag == "quiet":
        assert len(said) == 1 and said[0].startswith("warning: No trial keeps")
    else:
        (event,) = [event for line in said if (event := json.loads(line))["event"] == "warning"]
        assert event["text"].startswith("No trial keeps")


def test_the_page_of_such_a_run_works(finished: Any, browser: Any, tmp_path: Any) -> None:
    from llmbo.report.page import render_page

    report = finished.report()
    for trial in report["trials"]:
        trial |= {"feasible": False, "counts": False}
    report |= {"front": [], "warnings": ["No trial keeps <b>--max</b> kl=1e-12."]}
    report["hypervolume"] |= {"final": 0.0, "trace": [0.0] * len(report["trials"])}
    file = tmp_path / "report.html"
    file.write_text(render_page([("runs/tiny", report)]), encoding="utf-8")
    page, complaints = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=yes]", timeout=20_000)
    assert page.inner_text("[role=alert]") == report["warnings"][0] and complaints == []
    page.close()


def made(toy: Any, *kls: float, **changes: Any) -> list[Trial]:
    trials = toy.trials(toy.random_points(len(kls), 1))
    return [
        replace(trial, values={**trial.values, "kl": kl}, feasible=kl <= 0.5, **changes)
        for trial, kl in zip(trials, kls, strict=True)
    ]


def test_nothing_is_said_where_something_counts_or_nothing_has_ended(toy: Any) -> None:
    assert warnings_of([], toy.objectives, {"kl": 0.5}) == []
    assert warnings_of(made(toy, 0.1, state=TrialState.RUNNING), toy.objectives, {"kl": 0.5}) == []
    assert warnings_of(made(toy, 0.9, 0.4), toy.objectives, {"kl": 0.5}) == []


def test_the_line_names_what_was_missed(toy: Any) -> None:
    (limit,) = warnings_of(made(toy, 0.9, 0.7, 0.8), toy.objectives, {"kl": 0.5, "params_share": 0.9})
    assert "--max kl=0.5 (the best kl is 0.7, of trial 1)" in limit and "params_share" not in limit
    strict = [replace(one, reference=0.001) if one.name == "kl" else one for one in toy.objectives]
    (reference,) = warnings_of(made(toy, 0.3, 0.2), strict, {})
    assert "the best kl is 0.2, of trial 1" in reference and "the best params_share" not in reference
    lost = [replace(trial, values={**trial.values, "error": 0.1}) for trial in made(toy, 0.1)]
    assert "No trial was measured to its end" in warnings_of(lost, toy.objectives, {})[0]
    failed = made(toy, 0.1, state=TrialState.FAILED, failure="out of memory")
    assert "out of memory" in warnings_of(failed, toy.objectives, {})[0]
