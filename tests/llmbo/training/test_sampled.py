"""The text `self`: the dense model writes as much as the training will see, in a part of its time, once."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from experiments.quiet import Quiet
from llmbo.cli import app
from llmbo.models.loading import load_checkpoint
from llmbo.training import lessons, recovery
from llmbo.training.lessons import Student, course_for, windows_for
from llmbo.training.plan import LEAST_STEPS, Length, Plan

WINDOW, HELDOUT, BATCH = 8, 3, 2
PLAN = Plan(steps=0, batch=BATCH, distil=True, every=0)
Make = Callable[..., Any]


@pytest.fixture
def student(model_folder: Path) -> Student:
    small, dense = (load_checkpoint(str(model_folder), "float32", "cpu") for _ in range(2))
    return Student(small.model, small.tokenizer, "cpu", "float32", dense.model)


@pytest.fixture
def text(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(lessons, "SELF_TOKENS", 50 * WINDOW)
    return lambda length, plan=PLAN, phases=Quiet(): windows_for(  # noqa: B008 - it has no state
        student, "self", WINDOW, plan, HELDOUT, tmp_path, length, phases
    )


@pytest.mark.parametrize(
    ("steps", "batch", "written"),
    [(7, 2, 7), (7, 3, 11), (1, 2, 2), (49, 2, 49), (51, 2, 50), (1000, 2, 50), (1, 60, 60)],
)
def test_what_is_written_is_what_is_trained_on(
    student: Student, text: Make, tmp_path: Path, steps: int, batch: int, written: int
) -> None:
    """Each window twice on a CPU, where predictions are kept; never less than a batch, nor more than the most but for that."""
    plan, length = replace(PLAN, batch=batch), Length(steps=steps)
    windows = text(length, plan)
    assert [len(part) for part in (windows.calibration, windows.proxy, windows.heldout)] == [written, HELDOUT, HELDOUT]
    assert windows.available_tokens == WINDOW * (written + 2 * HELDOUT)
    trained = course_for(replace(student), windows, plan, length, tmp_path / "training", Quiet()).lesson.training
    assert len(windows.calibration) - len(trained) in (0, 1)  # an odd number of passes
    again = text(Length(tokens=steps * batch * WINDOW), plan)
    assert again.sha256 == windows.sha256


def test_every_step_has_its_own_windows_where_nothing_is_kept(text: Make) -> None:
    assert len(text(Length(steps=7), replace(PLAN, hidden=0.1)).calibration) == 14
    assert len(text(Length(steps=7), replace(PLAN, distil=False)).calibration) == 14


@pytest.mark.parametrize(("minutes", "written"), [(1.0, 96), (0.5, 64), (0.001, 32), (60.0, 116)])
def test_minutes_end_the_writing(text: Make, monkeypatch: pytest.MonkeyPatch, minutes: float, written: int) -> None:
    """A third of them, 32 windows in ten seconds; what is there is what a second call takes."""
    monkeypatch.setattr(lessons, "SELF_TOKENS", 110 * WINDOW)
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(lessons, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    told: list[tuple[str, int | None]] = []
    reached: list[int] = []

    class Watched(Quiet):
        @contextmanager
        def phase(self, name: str, total: int | None = None) -> Any:
            told.append((name, total))
            yield reached.append

    windows = text(Length(minutes=minutes), phases=Watched())
    assert windows.available_tokens == written * WINDOW and len(windows.calibration) == written - 2 * HELDOUT
    assert len(windows.proxy) == len(windows.heldout) == HELDOUT
    assert told == [("dense model writes", 116 * WINDOW)]
    assert reached == sorted(set(reached)) and reached[-1] == written * WINDOW
    monkeypatch.setattr(lessons, "sample_windows", None)
    again = text(Length(minutes=minutes))
    assert torch.equal(again.calibration, windows.calibration) and again.sha256 == windows.sha256


def test_minutes_that_are_over_leave_fewer_steps(
    student: Student, text: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    length = Length(minutes=5)
    windows = text(length)
    monkeypatch.setattr(lessons, "_seconds", lambda work: 1.0)

    def steps(spent: float) -> int:
        return course_for(
            replace(student), windows, PLAN, length, tmp_path / f"{spent}", Quiet(), spent=spent
        ).plan.steps

    assert steps(60.0) == steps(0.0) - 60 and steps(300.0) == LEAST_STEPS


def test_a_stopped_training_goes_on_with_its_text_and_others_are_refused_before_anything_is_written(
    exported: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recover(*words: object) -> Result:
        common = ("--window", 16, "--heldout", 4, "--device", "cpu", "--compute-dtype", "float32", "--text", "self")
        return CliRunner().invoke(
            app,
            ["recover", *map(str, (exported, "--out", tmp_path / "out", "--teacher", model_folder, *common, *words))],
        )

    def interrupt(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "train", interrupt)
        assert recover("--minutes", 0.02).exit_code == 130
    monkeypatch.setattr(lessons, "sample_windows", interrupt)
    for words, other in (
        (("--steps", 4), "length"),
        (("--minutes", 0.03), "length"),
        (("--minutes", 0.02, "--rank", 2), "plan"),
    ):
        refused = recover(*words)
        assert refused.exit_code == 2 and f"other settings ({other})" in refused.stderr, refused.output
    assert recover("--minutes", 0.02).exit_code == 0


@pytest.mark.parametrize("stands", [True, False])
def test_who_names_no_text_trains_on_what_the_dense_model_writes(
    exported: Path, model_folder: Path, tmp_path: Path, stands: bool
) -> None:
    """Where it teaches, and where the search had none of its own."""
    words = ("--window", 16, "--heldout", 2, "--steps", 1, "--device", "cpu", "--compute-dtype", "float32")
    teacher = ("--teacher", model_folder) if stands else ("--no-distil",)
    done = CliRunner().invoke(app, ["recover", *map(str, (exported, "--out", tmp_path / "out", *teacher, *words))])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "out" / "llmbo.json").read_text())["recovery"]["text"]["source"]
    assert told.startswith("self" if stands else "builtin"), told


def test_a_text_that_was_chosen_stays_the_one_to_train_on(student: Student) -> None:
    def text(plan: Plan = PLAN, **known: Any) -> str:
        return replace(student, **known).text_for(plan)

    assert [text(text="python"), text(text="self"), text(text="text:book.txt")] == ["python", "self", "text:book.txt"]
    assert text(chat=True) == "builtin"  # put as a chat, as the search had it
    assert (text(), text(replace(PLAN, distil=False))) == ("self", "builtin")
