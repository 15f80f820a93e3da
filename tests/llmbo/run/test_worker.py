"""`llmbo worker` on a tiny model: what it is refused for, and what it does where nobody owns the run any more."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from typer.testing import CliRunner

from llmbo.cli import app


def test_a_worker_finishes_a_run_as_its_owner_would_have(
    llmbo: Any, make_llmbo: Callable[[Path], Any], tmp_path: Path
) -> None:
    """The owner has gone after five of nine trials; the worker proposes in its place and writes the report."""

    def worker(**facts: Any) -> Any:
        stored = study.user_attrs["facts"]
        study.set_user_attr("facts", {**stored, "budget": 9, **facts})
        with contextlib.chdir(llmbo.folder):
            result = CliRunner().invoke(app, ["worker", "runs/tiny"])
        study.set_user_attr("facts", {**study.user_attrs["facts"], **{key: stored[key] for key in facts}})
        return result

    assert llmbo(budget=5).exit_code == 0
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{llmbo.folder}/runs/tiny/study.db")
    facts = study.user_attrs["facts"]
    for changed, said in (
        ({"versions": {**facts["versions"], "torch": "1.0"}}, "torch: 1.0 -> "),
        ({"model": {**facts["model"], "fingerprint": "another"}}, "fingerprint"),
        ({"dense": {**facts["dense"], "loss": facts["dense"]["loss"] + 1}}, "computes otherwise"),
    ):
        refused = worker(**changed)
        assert refused.exit_code == 2 and said in refused.output.splitlines()[-1], refused.output
    assert worker().exit_code == 0
    (tmp_path / "alone").mkdir()
    alone = make_llmbo(tmp_path / "alone")
    assert alone(budget=9).exit_code == 0
    ours, theirs = (
        [(trial["architecture"], trial["objectives"]) for trial in run.report()["trials"]] for run in (llmbo, alone)
    )
    assert ours == theirs and len(ours) == 9
