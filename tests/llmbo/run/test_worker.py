"""`llmbo worker` on a tiny model: what it is refused for, and what it does where nobody owns the run any more."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import kubernetes_validate
import optuna
import pytest
import torch
import yaml
from sqlalchemy import make_url
from typer.main import get_command
from typer.testing import CliRunner

from llmbo import optimize
from llmbo.cli import app
from llmbo.errors import ConfigError
from llmbo.run.worker import check_key, helpers

DOCS = Path(__file__).parents[3] / "docs" / "workers"


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
    study.set_user_attr("facts", {**facts, "budget": 9})
    parts: Any = SimpleNamespace(
        config=SimpleNamespace(storage=None, advisor="none", name="tiny"), folder=Path("runs/tiny")
    )
    said, threads = list[str](), torch.get_num_threads()
    with contextlib.chdir(llmbo.folder), helpers(["cpu", "cpu"], parts, said.append):
        log = llmbo.folder / "runs" / "tiny" / "worker-1.log"
        longest = time.monotonic() + 120
        while "is done" not in log.read_text():  # as `--devices` starts it, a process of its own
            assert time.monotonic() < longest, log.read_text()
            time.sleep(0.1)
    assert not said and torch.get_num_threads() == threads
    (tmp_path / "alone").mkdir()
    alone = make_llmbo(tmp_path / "alone")
    assert alone(budget=9).exit_code == 0
    ours, theirs = (
        [(trial["architecture"], trial["objectives"]) for trial in run.report()["trials"]] for run in (llmbo, alone)
    )
    assert ours == theirs and len(ours) == 9


def test_a_key_goes_to_no_server_that_the_database_alone_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, url, advisor, refused in (
        ("secret", "", "openai:m@http://elsewhere/v1", True),
        ("secret", "http://other/v1", "openai:m@http://elsewhere/v1", True),
        ("secret", "http://elsewhere/v1", "openai:m@http://elsewhere/v1", False),
        ("", "", "openai:m@http://elsewhere/v1", False),
        ("secret", "", "openai:m", False),
        ("secret", "", "heuristic", False),
    ):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        with (
            pytest.raises(ConfigError, match="OPENAI_BASE_URL=http://elsewhere/v1")
            if refused
            else contextlib.nullcontext() as caught
        ):
            check_key(advisor)
        assert "secret" not in str(caught)


def test_how_schedulers_start_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script does as it says where it was printed, and names no secret; the files are what Kubernetes and Compose read."""
    (tmp_path / "llmbo").write_text('#!/bin/sh\necho "$(pwd):$*"\n')
    (tmp_path / "llmbo").chmod(0o755)
    place = tmp_path / "my runs"
    place.mkdir()
    monkeypatch.chdir(place)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def script(*words: str) -> str:
        printed = CliRunner().invoke(app, ["worker", *words, "--print-slurm"])
        assert printed.exit_code == 0, printed.output
        return printed.stdout

    def started(text: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", text], env=path | more, cwd=tmp_path, capture_output=True, text=True)

    said = started(script("journal:/a b.log", "--name", "x y", "--device", "cuda:1"))
    assert said.stdout == f"{place}:worker journal:/a b.log --name x y --device cuda:1\n", said.stderr
    secret = script("postgresql://user:hunter2@host/db")
    assert "hunter2" not in secret and secret.splitlines()[1].startswith("#SBATCH ")
    assert (again := started(secret, LLMBO_RUN="here")).stdout == f"{place}:worker\n", again.stderr
    assert started(secret).returncode and "LLMBO_RUN" in started(secret).stderr

    job = yaml.safe_load((DOCS / "kubernetes.yaml").read_text())
    kubernetes_validate.validate(job, "1.31", strict=True)
    compose = yaml.safe_load((DOCS / "docker-compose.yml").read_text())
    schema = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    jsonschema.validate(compose, json.loads(schema.read_text()))
    services = compose["services"]
    monkeypatch.setenv("LLMBO_RUN", services["worker"]["environment"]["LLMBO_RUN"])
    for each in (
        job["spec"]["template"]["spec"]["containers"][0]["args"],
        services["worker"]["command"],
        services["optimize"]["command"],
    ):
        get_command(app).commands[each[0]].make_context(each[0], each[1:])  # type: ignore[attr-defined]
    assert make_url(services["worker"]["environment"]["LLMBO_RUN"]).host in services
    assert services["optimize"]["command"][-1] == services["worker"]["environment"]["LLMBO_RUN"]
    assert services["worker"]["deploy"]["replicas"] == 2


def test_devices_are_a_list() -> None:
    with pytest.raises(ConfigError, match=r"give a list, devices=\['cuda:0', 'cuda:1'\]\.$"):
        optimize("llama", devices="cuda:0,cuda:1")
