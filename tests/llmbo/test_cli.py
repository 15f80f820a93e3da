"""The main job from the outside: exit codes, messages, files."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from typer.testing import CliRunner

from llmbo import __version__ as llmbo_version
from llmbo.cli import app
from llmbo.cli.common import one_line_errors
from llmbo.models import silence
from llmbo.problem.preparation import Problem
from llmbo.report import Report


def refused(result: Result) -> str:
    """The one line that says why, after any number of progress lines."""
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:], result.stderr
    assert result.stdout == ""
    return lines[-1]


def check_complete(data: dict[str, Any], budget: int) -> None:
    Report.model_validate(data)
    assert data["run"]["status"] == "complete" and len(data["trials"]) == budget
    assert data["front"] and all(point["heldout"] for point in [data["dense"], *data["front"]])


def search_part(data: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how often a run was started."""
    trials = [{key: value for key, value in trial.items() if key != "seconds"} for trial in data["trials"]]
    dense, *front = (
        {**point, "elsewhere": None, "noise_elsewhere": None, "samples": None}
        for point in (data["dense"], *data["front"])
    )  # one run is judged there, and continues prompts
    return {
        "trials": trials,
        "dense": dense,
        "front": front,
        **{key: data[key] for key in ("model", "data", "space", "objectives", "hypervolume")},
    }


def test_the_version_is_told() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"llmbo {llmbo_version}\n")


def test_it_runs_where_it_was_unpacked_and_not_installed(llmbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = metadata.Distribution.from_name

    def from_name(name: str) -> metadata.Distribution:
        if name == "llmbo":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(metadata.Distribution, "from_name", from_name)
    result = llmbo(budget=1)
    assert result.exit_code == 0, result.output
    assert llmbo.report()["run"]["versions"]["llmbo"] == llmbo_version


@pytest.mark.parametrize(
    "words",
    [
        ("recover", "x", "--out", "y", "--steps", "1"),
        ("rerank", "x"),
        ("evaluate", "x"),
        ("profile", "--model", "x"),
        ("profile", "--model", "x", "--latency-target", "nowhere"),
        ("export", "x", "--trial", "0", "--format", "hf", "--out", "y"),
    ],
    ids=" ".join,
)
def test_a_message_names_only_options_of_its_command(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    if "nowhere" not in words:

        def exhausted() -> None:
            raise MemoryError

        monkeypatch.setattr(silence, "silence_libraries", exhausted)
    said = refused(CliRunner().invoke(app, list(words)))
    commands: Any = typer.main.get_command(app)
    own = {option for parameter in commands.commands[words[0]].params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", said)) <= own
    assert "Out of memory: free some" in said or "--latency-target auto" in said


def test_run_repeat_extend_change_and_start_over(llmbo: Any, finished: Any) -> None:
    assert llmbo(budget=5).exit_code == 0
    check_complete(llmbo.report(), 5)
    before = llmbo.files()

    assert "already spent its budget: 5 of 5" in refused(llmbo(budget=5))
    assert "already spent" in refused(llmbo(budget=3))
    changed = refused(llmbo(budget=9, seed=7, proxy_tokens=80, compensation=None, no_compensation=True))
    assert all(
        change in changed for change in ("seed: 0 -> 7", "proxy_tokens: 64 -> 80", "compensation: True -> False")
    )
    assert "budget" not in changed.split(":")[2]
    assert llmbo.files() == before

    assert llmbo(budget=18).exit_code == 0
    check_complete(llmbo.report(), 18)
    assert search_part(llmbo.report()) == search_part(finished.report())  # that one was never stopped

    result = llmbo(budget=3, seed=7, fresh=True)
    assert result.exit_code == 0
    check_complete(llmbo.report(), 3)
    assert llmbo.report()["run"]["seed"] == 7
    assert "report.json" in result.stdout and "held-out" in result.stdout


def test_an_edited_text_or_model_is_noticed(llmbo: Any, text_file: Path, model_folder: Path) -> None:
    text = llmbo.folder / "words.txt"
    shutil.copy(text_file, text)
    shutil.copytree(model_folder, llmbo.folder / "model")
    flags: dict[str, Any] = {"text": f"text:{text}", "model": llmbo.folder / "model"}
    assert llmbo(budget=2, **flags).exit_code == 0
    before = llmbo.files()
    text.write_text(text.read_text() + " w1 w2")
    assert "sha256" in refused(llmbo(budget=4, **flags))
    shutil.copy(text_file, text)
    assert llmbo.files() == before


@pytest.mark.parametrize("strategy", ["threshold", "random"])
@pytest.mark.parametrize("objectives", ["loss,params", "params_share,kl"])
def test_every_strategy_and_objective_order(llmbo: Any, strategy: str, objectives: str) -> None:
    result = llmbo(budget=4, strategy=strategy, objectives=objectives, batch=3)
    assert result.exit_code == 0, result.output
    data = llmbo.report()
    check_complete(data, 4)
    assert [objective["name"] for objective in data["objectives"]] == objectives.split(",")
    assert {trial["origin"] for trial in data["trials"]} == {strategy}


def test_three_objectives_within_limits(llmbo: Any) -> None:
    """A counted limit is kept by every candidate, a measured one by the front; the report says which are which."""
    free = llmbo(budget=8, objectives="kl,params_share", name="free")
    assert free.exit_code == 0, free.output
    kls = sorted(trial["objectives"]["kl"] for trial in llmbo.report("free")["trials"])
    words = llmbo.flags(budget=18, objectives="kl,params_share,kv_bytes", context=32, serve_batch=3)
    words += ["--max", "params_share=0.8", "--max", f"kl={kls[2]}"]
    with contextlib.chdir(llmbo.folder):
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    data = llmbo.report()
    check_complete(data, 18)
    assert [(part["name"], part["known"]) for part in data["constraints"]] == [("params_share", True), ("kl", False)]
    assert [part["name"] for part in data["objectives"]] == ["kl", "params_share", "kv_bytes"]
    assert [part["reference_point"] for part in data["objectives"][:2]] == [kls[2], 0.8]
    values = [trial["objectives"] for trial in data["trials"]]
    assert all(value["params_share"] <= 0.8 for value in values)
    assert [trial["feasible"] for trial in data["trials"]] == [value["kl"] <= kls[2] for value in values]
    assert all(point["objectives"]["kl"] <= kls[2] for point in data["front"])
    assert {trial["origin"] for trial in data["trials"]} == {"threshold", "qnehvi"}
    groups = data["dense"]["architecture"]["kv_groups"]
    head_dim = data["model"]["head_dim"]
    assert data["dense"]["objectives"]["kv_bytes"] == 2 * sum(groups) * head_dim * 32 * 3 * 2


def test_the_database_can_be_elsewhere_and_shared(llmbo: Any) -> None:
    url = f"sqlite:///{llmbo.folder / 'shared.db'}"
    for name in ("a", "b"):
        assert llmbo(budget=2, strategy="random", name=name, storage=url).exit_code == 0
    assert not (llmbo.folder / "runs" / "a" / "study.db").exists()
    assert llmbo(budget=1, strategy="random", name="a", storage=url, fresh=True).exit_code == 0
    assert len(llmbo.report("a")["trials"]) == 1
    assert "already spent" in refused(llmbo(budget=2, strategy="random", name="b", storage=url))


def test_no_password_reaches_the_report(llmbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report names the command, and reports are passed on."""
    storage = (
        f"sqlite:///file:{llmbo.folder / 'shared.db'}?password=hunter2&uri=true"  # SQLite ignores what it does not know
    )
    flags: dict[str, Any] = {"budget": 1, "strategy": "random", "storage": storage}
    monkeypatch.setattr(sys, "argv", ["llmbo", *llmbo.flags(**flags)])
    assert llmbo(**flags).exit_code == 0
    assert "--budget 1" in llmbo.report()["run"]["command"]
    assert "hunter2" not in json.dumps(llmbo.report())


def test_stopped_between_search_and_report_the_same_command_finishes(
    llmbo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All trials are done, the held-out windows are not: that budget is not spent yet."""

    def stop(self: Problem) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Problem, "heldout", stop)
        result = llmbo(budget=4)
    assert result.exit_code == 130
    data = llmbo.report()
    Report.model_validate(data)
    assert data["run"]["status"] == "interrupted" and len(data["trials"]) == 4
    assert all(point["heldout"] is None for point in data["front"])
    result = llmbo(budget=4)
    assert result.exit_code == 0, result.stderr
    check_complete(llmbo.report(), 4)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import T5Config

    folder = tmp_path_factory.mktemp("t5")
    T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bloom_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BloomConfig

    folder = tmp_path_factory.mktemp("bloom")
    BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2).save_pretrained(folder)
    return folder


# what is wrong -> flags, and what the message says. {t5} and {bloom} are folders, {tmp} is the working directory.
BAD: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "near alias": ({"model": "lama"}, ("'lama'", "did you mean 'llama'")),
    "no folder": ({"model": "./nowhere"}, ("'./nowhere'",)),
    "encoder-decoder": ({"model": "{t5}"}, ("encoder-decoder",)),
    "unsupported family": ({"model": "{bloom}"}, ("'bloom'", "ALiBi")),
    "budget": ({"budget": 0}, ("--budget", "0")),
    "batch": ({"batch": 0}, ("--batch", "0")),
    "seed": ({"seed": 2**64}, ("--seed", str(2**64))),
    "no text file": ({"text": "text:{tmp}/nothing.txt"}, ("nothing.txt",)),
    "folder as text": ({"text": "text:{tmp}"}, ("{tmp}",)),
    "not UTF-8": ({"text": "text:{tmp}/binary"}, ("binary", "UTF-8")),
    "unknown source": ({"text": "web"}, ("'web'", "builtin")),
    "window without positions": (
        {"window": 65, "proxy_tokens": 65, "heldout_tokens": 65},
        ("--window 65", "64 positions"),
    ),
    "short text": ({"text": "text:{tmp}/short.txt"}, ("100 tokens", "256 are needed")),
    "text too short for the windows": ({"calibration_tokens": 1600}, ("1200 tokens", "1728 are needed")),
    "unknown objective": ({"objectives": "kl,speed"}, ("'speed'", "params_share")),
    "one objective": ({"objectives": "kl"}, ("--objectives",)),
    "no cost": ({"objectives": "kl,loss"}, ("kl,loss", "one cost")),
    "four objectives": ({"objectives": "kl,loss,params,flops"}, ("kl,loss,params,flops",)),
    "limit without value": ({"max": "params_share"}, ("--max", "'params_share'")),
    "limit below the smallest share": ({"max": "params_share=0.3"}, ("--max params_share=0.3", "--min-share 0.4")),
    "limit that no model keeps": ({"max": "weight_bytes=10"}, ("weight_bytes <= 10", "raise --max")),
    "limit that no candidate keeps": ({"max": "loss=0.1"}, ("--max loss=0.1", "dense model")),
    "context": ({"context": 0}, ("--context", "0")),
    "impossible reference": ({"reference_point": "0,1"}, ("--reference-point", "kl")),
    "reference worse than dense": (
        {"objectives": "loss,params_share", "reference_point": "0.01,1"},
        ("--reference-point", "loss"),
    ),
    "reference below the smallest": ({"reference_point": "1,0.39"}, ("--reference-point", "params_share")),
    "no number": ({"reference_point": "a,b"}, ("--reference-point", "a,b")),
    "smallest share": ({"min_share": 1.5}, ("--min-share", "1.5")),
    "nothing to choose": ({"min_share": 0.999}, ("--min-share",)),
    "wide step": ({"neuron_step": 25}, ("--neuron-step", "25")),
    "negative step": ({"neuron_step": -1}, ("--neuron-step", "-1")),
    "no multiple": ({"neuron_multiple": 0}, ("--neuron-multiple", "0")),
    "device": ({"device": "cuda:99"}, ("cuda:99",)),
    "name": ({"name": "a/b"}, ("--name", "a/b")),
    "long name": ({"name": "n" * 300}, ("n" * 300,)),
    "storage without driver": ({"storage": "unknown://u:hunter2@nowhere.invalid/db"}, ("nowhere.invalid",)),
    "storage out of reach": ({"storage": "sqlite:///{tmp}/nowhere/study.db"}, ("nowhere",)),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_touches_nothing(llmbo: Any, kind: str, t5_folder: Path, bloom_folder: Path) -> None:
    (llmbo.folder / "short.txt").write_text("w1 " * 100)
    (llmbo.folder / "binary").write_bytes(b"\xff\xfe\x00")
    places = {"t5": t5_folder, "bloom": bloom_folder, "tmp": llmbo.folder}
    flags, words = BAD[kind]
    before = llmbo.files()
    line = refused(llmbo(**{key: str(value).format(**places) for key, value in flags.items()}))
    assert all(word.format(**places) in line for word in words), line
    assert "hunter2" not in line
    assert llmbo.files() == before and not (llmbo.folder / "runs").exists()


@pytest.mark.parametrize(
    "kind",
    [
        "four objectives",
        "impossible reference",
        "short text",
        "reference worse than dense",
        "nothing to choose",
        "wide step",
    ],
)
def test_bad_input_with_fresh_does_not_cost_the_old_run(llmbo: Any, kind: str) -> None:
    assert llmbo(budget=1, strategy="threshold").exit_code == 0
    (llmbo.folder / "short.txt").write_text("w1 " * 100)
    before = llmbo.files()
    flags = {key: str(value).format(tmp=llmbo.folder) for key, value in BAD[kind][0].items()}
    refused(llmbo(**{"fresh": True, **flags}))
    assert llmbo.files() == before


def test_a_damaged_database_is_refused_until_started_over(llmbo: Any) -> None:
    assert llmbo(budget=2, strategy="threshold").exit_code == 0
    database = llmbo.folder / "runs" / "tiny" / "study.db"
    database.write_bytes(database.read_bytes()[:10_000])
    before = llmbo.files()
    assert "study.db" in refused(llmbo(budget=4, strategy="threshold"))
    assert llmbo.files() == before
    assert llmbo(budget=1, strategy="threshold", fresh=True).exit_code == 0
    check_complete(llmbo.report(), 1)


def test_an_unwritable_run_folder_is_refused(llmbo: Any) -> None:
    """A file stands where the folder should be: true for root as well, whom permissions do not stop."""
    (llmbo.folder / "runs").write_text("not a folder")
    assert "runs" in refused(llmbo())
    assert (llmbo.folder / "runs").read_text() == "not a folder"


def test_a_typing_mistake_is_a_usage_error(llmbo: Any) -> None:
    assert llmbo(budget="many").exit_code == 2
    assert llmbo(bugdet=3).exit_code == 2
    assert llmbo(model=None).exit_code == 2
    assert not (llmbo.folder / "runs").exists()


def test_the_aliases_are_listed() -> None:
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == 0 and "llama" in result.stdout and "Apache-2.0" in result.stdout


@pytest.fixture
def background(llmbo: Any, forked: Any) -> Callable[..., Any]:
    """Start `llmbo optimize`, and return when its second trial is measured.

    The process is stopped there (SIGSTOP), so that no test races against its end: a signal sent to it is taken on SIGCONT.
    """

    def start(**flags: object) -> Any:
        process = forked(llmbo.flags(**flags), llmbo.folder)
        process.until("trial 2/", process.err)
        process.send_signal(signal.SIGSTOP)
        return process

    return start


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_run_reports_and_goes_on(
    llmbo: Any,
    background: Callable[..., Any],
    signum: signal.Signals,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    flags: dict[str, Any] = {"budget": 30, "strategy": "random", "batch": 10}
    process = background(**flags)
    try:
        if signum is signal.SIGINT:
            assert "Another process is working on" in refused(llmbo(**flags))
            elsewhere = replace(llmbo, folder=tmp_path_factory.mktemp("elsewhere"))
            storage = f"sqlite:///{llmbo.folder / 'runs' / 'tiny' / 'study.db'}"
            assert f"process {process.pid} on {socket.gethostname()}" in refused(elsewhere(storage=storage, **flags))
            assert elsewhere.files() == {}
        process.send_signal(signum)
        process.send_signal(signal.SIGCONT)
        code, stderr = process.wait(), process.err.read_text()
    finally:
        process.kill()
    assert code == 130, stderr[-3000:]
    assert "Traceback" not in stderr and "same command" in stderr
    data = llmbo.report()
    Report.model_validate(data)
    assert data["run"]["status"] == "interrupted"
    done = sum(trial["state"] == "complete" for trial in data["trials"])
    assert 2 <= done == len(data["hypervolume"]["trace"]) < 30
    assert done >= len(data["trials"]) - 1  # at most the running one is open
    if signum is signal.SIGINT:
        assert llmbo(**flags).exit_code == 0
        check_complete(llmbo.report(), 30)
        kept = [trial["objectives"] for trial in llmbo.report()["trials"]][:done]
        assert kept == [trial["objectives"] for trial in data["trials"]][:done]


def test_a_killed_run_goes_on(llmbo: Any, background: Callable[..., Any]) -> None:
    flags: dict[str, Any] = {"budget": 12, "batch": 3}
    background(**flags).kill()
    assert llmbo(**flags).exit_code == 0
    resumed = search_part(llmbo.report())
    shutil.rmtree(llmbo.folder / "runs")
    assert llmbo(**flags).exit_code == 0
    assert json.dumps(search_part(llmbo.report())) == json.dumps(resumed)


def test_what_an_interruption_turns_into_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of an import, libraries make an ImportError of it."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as caught, one_line_errors("Interrupted. It goes on."):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half a module") from None
    assert caught.value.exit_code == 130 and capsys.readouterr().err == "Interrupted. It goes on.\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_a_fault_of_the_machine_names_the_command(llmbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("llmbo.report.files.find_run", full)
    line = refused(CliRunner().invoke(app, ["report", "tiny"]))
    assert "llmbo report cannot read or write" in line and "No space left" in line and "--fresh" not in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_one_line(forked: Any, tmp_path: Path) -> None:
    said = "error: llmbo {} cannot write its output (No space left on device).\n"
    with open("/dev/full", "w") as full, open(tmp_path / "said", "w") as err:
        command = [sys.executable, "-m", "llmbo", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (1, said.format("--help"))
        assert forked(["models"], tmp_path, (full.fileno(), full.fileno(), err.fileno())).wait() == 1
    assert (tmp_path / "said").read_text() == said.format("models")


@pytest.mark.parametrize("begins", ["typer", "llmbo.cli.watch", "torch.nn"])
def test_ctrl_c_in_the_first_second_is_one_line(begins: str, tmp_path: Path) -> None:
    """Sent by the process to itself when an import begins, so that the moment is hit."""
    program = f"""
import os, signal, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == {begins!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Stop())
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = ["llmbo", "optimize", "--model", "tiny"]
from llmbo.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130 and done.stdout == "", done.stderr
    assert done.stderr.startswith("Interrupted.") and done.stderr.count("\n") == 1
