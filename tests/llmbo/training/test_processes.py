"""Several processes train what one does: real ones, over gloo."""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.models.loading import load_checkpoint
from llmbo.training import lessons
from llmbo.training.learner import Learner
from llmbo.training.plan import Plan
from llmbo.training.processes import agreed, count, place, together
from llmbo.training.trainer import Lesson, gradients

PROCESSES = 2


def in_processes(body: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of forks that meet each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WORLD_SIZE", str(PROCESSES))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    children = []
    for rank in range(PROCESSES):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
                code = int(body() or 0)  # type: ignore[call-overload]
            except BaseException as error:  # nothing of a fork may go on in the test
                print(f"process {rank}: {error!r}", file=sys.__stderr__)
            finally:
                os._exit(code)
        children.append(child)
    monkeypatch.delenv("WORLD_SIZE")
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@pytest.mark.parametrize("micro", [0, 1])
def test_gradients_of_parts_add_up_to_those_of_the_batch(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro: int
) -> None:
    windows = torch.randint(2, 60, (8, 16), generator=torch.Generator().manual_seed(0))
    plan = Plan(steps=2, batch=5, train="lora", rank=2)  # parts of three windows and of two

    def found() -> dict[str, torch.Tensor]:
        model = load_checkpoint(str(model_folder), "float32", "cpu").model
        learner, lesson = Learner.of(model, plan), Lesson(windows, windows[:2])
        loss = gradients(model, lesson, lesson.head_of(model), torch.arange(plan.batch), micro)
        return {
            "loss": loss,
            **{name: weight.grad for name, weight in learner.trained.items() if weight.grad is not None},
        }

    def part() -> None:
        with together("cpu") as device:
            assert (device, count()) == ("cpu", PROCESSES) and agreed(place()) == 0
            torch.save(found(), tmp_path / f"{place()}.pt")

    assert in_processes(part, monkeypatch) == [0] * PROCESSES
    whole = found()
    for rank in range(PROCESSES):
        parts = torch.load(tmp_path / f"{rank}.pt")
        assert parts.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_recover_what_one_does(
    model_folder: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "words.txt"
    story.write_text(" ".join(f"w{index % 7}" for index in range(2400)), encoding="utf-8")
    monkeypatch.setattr(lessons, "SELF_TOKENS", 512)

    def recover(out: Path, *more: object) -> int:
        words = (
            "--window",
            16,
            "--heldout",
            4,
            "--device",
            "cpu",
            "--compute-dtype",
            "float32",
            "--lr",
            "3e-3",
            "--steps",
            8,
        )
        words += ("--eval-every", 4, "--teacher", model_folder, "--text", f"text:{story}", *more)  # type: ignore[assignment]
        return CliRunner().invoke(app, ["recover", *map(str, (exported, "--out", out, *words))]).exit_code

    assert in_processes(lambda: recover(tmp_path / "two"), monkeypatch) == [0] * PROCESSES
    assert recover(tmp_path / "one") == 0
    one, two = (json.loads((tmp_path / name / "llmbo.json").read_text())["recovery"] for name in ("one", "two"))
    assert [step for step, _ in one["validation"]] == [0, 4, 8] and one["validation"][-1][1] < one["validation"][0][1]
    for (_, value), (_, other) in zip(one["validation"], two["validation"], strict=True):
        assert other == pytest.approx(value, rel=1e-3)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-2, atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two", "words.txt"]
    assert in_processes(lambda: recover(tmp_path / "none", "--batch", 1), monkeypatch) == [2] * PROCESSES
    assert in_processes(lambda: recover(tmp_path / "none", "--text", "self"), monkeypatch) == [0] * PROCESSES


@pytest.mark.parametrize(
    "words", [("elastic", "--model", "{model}", "--out", "{tmp}/out"), ("rerank", "no run")], ids=lambda words: words[0]
)
def test_what_one_process_trains_is_not_begun_by_several(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = [word.format(model=model_folder, tmp=tmp_path) for word in words]
    refused = CliRunner().invoke(app, [*given, "--steps", "1"])
    (line,) = refused.stderr.splitlines()
    assert refused.exit_code == 2 and f"`llmbo {words[0]}` trains in one process, and 2 were started" in line
    assert not list(tmp_path.iterdir())
