"""A run of the first version opens for ever: its report, its database, its recorded advice, and the run itself, continued and exported.

`data/first_version` was written by `llmbo optimize --model model --name tiny …` (`FLAGS`, budget 18) before the house was
ordered. It is never written anew: what changes must still read it, or refuse it in one line and raise `schema_version`.
"""

import contextlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.config import RESTATED, RunConfig, restated
from llmbo.config.advisor import HOOKS
from llmbo.run.facts import differences
from llmbo.run.stored import as_started

OLD = Path(__file__).parent / "data" / "first_version"
FLAGS = [
    "--model",
    "model",
    "--text",
    "text:words.txt",
    "--window",
    "16",
    "--calibration-tokens",
    "128",
    "--proxy-tokens",
    "64",
    "--heldout-tokens",
    "64",
    "--dtype",
    "float32",
    "--device",
    "cpu",
]
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """`llmbo WORDS` in a copy of the old run's working directory."""
    shutil.copytree(OLD, tmp_path / "old")
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.chdir(tmp_path / "old"):
        yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    signal.signal(signal.SIGTERM, before)


def report(folder: Path = OLD, name: str = "tiny") -> dict[str, Any]:
    return json.loads((folder / "runs" / name / "report.json").read_text(encoding="utf-8"))


def test_the_old_run_holds_every_kind_of_trial() -> None:
    """Or the tests below would prove little."""
    origins = {trial["origin"] for trial in report()["trials"]}
    assert origins == {"threshold", "advisor:warm_start", "qnehvi"} and report()["run"]["status"] == "complete"


@pytest.mark.parametrize(("format", "part"), [("html", "<html"), ("csv", "advisor:warm_start"), ("md", "| trial |")])
def test_its_report_is_rendered(run: Run, format: str, part: str) -> None:
    done = run("report", "tiny", "--format", format, "--out", "out.txt")
    assert done.exit_code == 0, done.output
    assert part in Path("out.txt").read_text(encoding="utf-8")


def test_its_study_opens_in_optuna(run: Run) -> None:
    study = optuna.load_study(study_name="tiny", storage="sqlite:///runs/tiny/study.db")
    assert [trial.values for trial in study.trials] == [
        [trial["objectives"][name] for name in ("kl", "params_share")] for trial in report()["trials"]
    ]


def test_it_is_followed_to_its_end(run: Run) -> None:
    done = run("watch", "tiny")
    assert done.exit_code == 0 and "trial 18/18" in done.output and "is complete" in done.output


def test_it_goes_on_and_keeps_what_it_has(run: Run) -> None:
    done = run("optimize", *FLAGS, "--name", "tiny", "--budget", 20, "--advisor", "heuristic")
    assert done.exit_code == 0, done.output
    old, new = report(), report(Path())
    assert new["elsewhere"] is None and not new["data"]["chat"]  # it is older than these settings
    assert new["run"]["settings"]["heldout_text"] == "none"
    kept = {name: new["run"]["settings"][name] for name in RESTATED}
    assert kept == {"advisor_hooks": list(HOOKS), "advisor_share": 1.0, "advisor_warm_start": 3}
    assert len(new["trials"]) == 20 and all(trial["counts"] for trial in new["trials"])
    since: dict[str, Any] = {"file_bytes": None}  # which the first version left out, as it did `counts` and `recipe`
    kept_trials = [{**trial, "counts": True, "recipe": None} for trial in old["trials"]]
    kept_trials = [trial | {"objectives": trial["objectives"] | since} for trial in kept_trials]
    assert kept_trials == new["trials"][:18]
    assert not any(point["noise"] for point in new["front"] if point["trial"] < 18)  # whose windows nobody kept
    assert all(point["noise"] for point in new["front"] if point["trial"] >= 18)
    before, after = ({point["trial"]: point["heldout"] for point in part["front"]} for part in (old, new))
    assert before.keys() & after.keys() and all(
        before[number] | since == after[number] for number in before.keys() & after.keys()
    )


def test_a_changed_setting_is_refused_by_name(run: Run) -> None:
    done = run("optimize", *FLAGS, "--name", "tiny", "--budget", 20, "--advisor", "heuristic", "--seed", 1)
    assert done.exit_code == 2 and "seed: 0 -> 1" in done.output
    done = run(
        "optimize", *FLAGS, "--name", "tiny", "--budget", 20, "--advisor", "heuristic", "--heldout-text", "builtin"
    )
    assert done.exit_code == 2 and "heldout_text: none -> builtin" in done.output


@pytest.mark.parametrize(
    ("typed", "share"),
    [({}, 1.0), ({"advisor_share": 0.25, "advisor_hooks": HOOKS}, 1.0), ({"advisor_share": 0.2}, 0.2)],
)
@pytest.mark.usefixtures("run")
def test_its_share_of_advice_is_the_one_that_it_had(typed: dict[str, Any], share: float) -> None:
    """Left open, or typed as it was typed then; anything else is another setting."""
    config = RunConfig(model="model", name="tiny", window=16, advisor="heuristic", **typed)
    config = as_started(config, "sqlite:///runs/tiny/study.db")
    assert config.advisor_share == share and config.advisor_warm_start == 3 and config.advisor_hooks == HOOKS


def test_a_file_is_counted_as_it_was_when_a_run_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `quantize` meant a GGUF file once; now that of the engine is counted."""
    now = RunConfig("it", objectives=("kl", "file_bytes"), deploy=("hf",))
    stored = {**now.settings(), "quantize": ""}
    monkeypatch.setattr("llmbo.run.stored.stored_run", lambda *place: (stored, {}, 0))
    continued = as_started(now, "")
    assert now.counted_format == "hf" and not differences(restated(stored), continued.settings())
    for config in (continued, RunConfig.from_settings(stored)):
        assert (config.counted_format, config.counted_type) == ("gguf", "f16")


def test_its_advice_is_replayed(run: Run) -> None:
    done = run("optimize", *FLAGS, "--name", "other", "--budget", 12, "--advisor", "replay:runs/tiny/advisor.jsonl")
    assert done.exit_code == 0, done.output
    new, old = (
        [trial["why"] for trial in part["trials"][:12] if trial["origin"] == "advisor:warm_start"]
        for part in (report(Path(), "other"), report())
    )
    assert new == old and len(old) > 1 and all(old)  # what it offsets is the present version's path


def test_a_trial_of_it_is_exported(run: Run) -> None:
    done = run("export", "tiny", "--trial", 3, "--format", "hf", "--out", "small")
    assert done.exit_code == 0, done.output
    details = json.loads(Path("small/llmbo.json").read_text(encoding="utf-8"))
    assert details["architecture"] == report()["trials"][3]["architecture"]
