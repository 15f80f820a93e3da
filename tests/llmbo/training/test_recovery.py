"""Recovery gains, resumes to the same result, and never returns something worse."""

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from contextlib import chdir, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.deploy import disk
from llmbo.errors import StorageError
from llmbo.evaluation.items import Exam, read_item_files
from llmbo.models.loading import load_checkpoint
from llmbo.problem.texts import load_windows
from llmbo.training import checkpoints, lessons, recovery, trainer
from llmbo.training.checkpoints import checkpoint_bytes
from llmbo.training.learner import Learner, Refitter
from llmbo.training.plan import MINUTES, Length, Plan, Progress
from llmbo.training.teacher import Kept, Live, NextTokens, Streams, kept_bytes
from llmbo.training.trainer import Lesson, batch_of, epoch_order, gradients, train
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.distillation import heard
from pruning.export import Pruned
from pruning.export.rebuild import cast
from pruning.export.vllm import decilm
from pruning.likelihood import Head, dense_distribution, last_hidden, quality
from pruning.masks import PruningMask, Ranking
from pruning.shrinking import shrink

PLAN = Plan(steps=12, batch=4, every=4, lr=3e-3, train="all")
GAINS = {"all": 0.2, "lora": 0.2, "refit-lora": 0.2, "norms": 0.05}  # at least, nats


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text with something to learn: every word calls for the next one."""
    path = tmp_path_factory.mktemp("story") / "words.txt"
    path.write_text(" ".join(f"w{index % 7}" for index in range(2400)), encoding="utf-8")
    return path


@pytest.fixture
def windows() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation windows of a text with something to learn."""
    ids = (torch.arange(40 * 16) % 7 + 2).view(40, 16)
    return ids[:32], ids[32:]


def run(folder: Path, windows: tuple[torch.Tensor, torch.Tensor], work: Path, plan: Plan, **options: Any) -> Any:
    """Train the model of a folder, from whose dense self it learns where `teacher` is one."""
    model, teacher = load_checkpoint(str(folder), "float32", "cpu").model, options.pop("teacher", None)
    lesson = Lesson(*windows, teacher=Live(teacher) if teacher else NextTokens(), dtype=options.pop("dtype", "float32"))
    if teacher is not None:
        whole = Architecture((2,) * 4, (24,) * 4)
        lesson = replace(lesson, dense=dense_distribution(teacher, windows[1]), refitter=Refitter.of(teacher, whole))
    lesson = replace(lesson, examine=lambda model: {"loss": quality(model, windows[1]).loss}, examined=2)
    return train(model, lesson, plan, work, **options)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        *(replace(PLAN, train=kind, rank=4, lr=1e-2) for kind in ("lora", "norms")),
        replace(PLAN, distil=True),
        replace(PLAN, distil=True, train="refit-lora", rank=4, lr=1e-2),
    ],
)
def test_training_returns_the_best_validated_weights(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, plan: Plan
) -> None:
    teacher = None
    if plan.distil:  # a teacher that knows the text
        teacher, _ = run(model_folder, windows, tmp_path / "teacher", PLAN)
    model, progress = run(model_folder, windows, tmp_path / "work", plan, teacher=teacher)
    assert progress.history[0][0] == 0 and progress.best[1] < progress.history[0][1] - GAINS[plan.train]
    found = quality(model, windows[1], dense_distribution(teacher, windows[1]) if teacher else None)
    assert (found.kl if teacher else found.loss) == pytest.approx(progress.best[1], abs=1e-4)  # merged = with adapters
    assert not any("lora" in name for name, _ in model.named_parameters())
    dense = load_checkpoint(str(model_folder), "float32", "cpu").model
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)


def test_a_harmful_plan_returns_the_untrained_model(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    another = torch.full_like(windows[0], 20)  # a text of one word, which is not in the other
    model, progress = run(model_folder, (another, windows[1]), tmp_path, replace(PLAN, steps=40, patience=2))
    assert progress.best[0] == 0 and progress.step == 8  # stopped early
    before = load_checkpoint(str(model_folder), "float32", "cpu").model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("stop", "plan"),
    [
        (5, PLAN),
        (8, PLAN),
        (9, PLAN),
        (8, replace(PLAN, train="lora", rank=4)),
        (5, replace(PLAN, distil=True, train="refit-lora")),
    ],
)
def test_an_interrupted_training_ends_where_it_would_have_ended(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, stop: int, plan: Plan
) -> None:
    def interrupt(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    teacher = load_checkpoint(str(model_folder), "float32", "cpu").model if plan.distil else None
    if teacher is not None:
        teacher.get_input_embeddings().weight.data += 0.1
    whole, progress = run(model_folder, windows, tmp_path / "whole", plan, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, windows, tmp_path / "parts", plan, teacher=teacher, on_step=interrupt)
    steps: list[int] = []
    resumed, again = run(model_folder, windows, tmp_path / "parts", plan, teacher=teacher, on_step=steps.append)
    assert again.history == progress.history and steps[0] == (stop - 1) // 4 * 4 + 1
    assert again.scores == progress.scores and [step for step, _ in again.scores] == [8]
    if not plan.distil:  # validated by the very loss
        assert [found["loss"] for _, found in again.scores] == [again.history[step // 4][1] for step, _ in again.scores]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    with pytest.raises(StorageError, match="other settings"):
        run(model_folder, windows, tmp_path / "parts", replace(plan, seed=1), teacher=teacher)


class Death(BaseException):
    """Stands in for a power cut: nothing may catch it."""


def dying(times: int, deed: Callable[..., Any], done: bool) -> Callable[..., Any]:
    """`deed`, whose process dies at the last of so many times: after it, or else before."""
    count = iter(range(1, times + 1))

    def do(*given: Any, **named: Any) -> Any:
        last = next(count) == times
        if last and not done:
            raise Death
        result = deed(*given, **named)
        if last:
            raise Death
        return result

    return do


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    ("where", "name", "times"),
    [(os, "replace", 5), (os, "replace", 6), (shutil, "rmtree", 3), (checkpoints, "save_file", 7), (checkpoints, "save_file", 9)],
    ids=str,
)  # fmt: skip
def test_a_process_that_dies_while_it_saves_leaves_a_whole_checkpoint(
    model_folder: Path,
    windows: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    times: int,
    done: bool,
) -> None:
    whole, progress = run(model_folder, windows, tmp_path / "whole", PLAN)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, dying(times, getattr(where, name), done))
        with pytest.raises(Death):
            run(model_folder, windows, tmp_path / "parts", PLAN)
    last = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "parts").glob("step-*[0-9]"))
    steps: list[int] = []
    found: list[int] = []
    resumed, again = run(
        model_folder,
        windows,
        tmp_path / "parts",
        PLAN,
        on_step=steps.append,
        on_validation=lambda progress: found.append(len([*(tmp_path / "parts").glob("step-*[0-9]")])),
    )
    assert again.history == progress.history and steps == list(range(last + 1, PLAN.steps + 1)) and last > 0
    assert set(found) == {1}  # what the dead process left takes no disk any more
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"best.safetensors", f"step-{PLAN.steps}"}


class Hostile:
    """Unpickles to a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("hostile", [False, True])
@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "progress.json"])
def test_a_damaged_checkpoint_is_named_and_runs_nothing(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, name: str, hostile: bool
) -> None:
    plan = replace(PLAN, steps=4)
    run(model_folder, windows, tmp_path / "work", plan)
    file, mark = tmp_path / "work" / "step-4" / name, tmp_path / "mark"
    if hostile:
        torch.save(Hostile(mark), file)
    else:
        file.write_bytes(b"{")
    with pytest.raises(StorageError, match=r"step-4' is damaged .*\(.*delete") as caught:
        run(model_folder, windows, tmp_path / "work", plan)
    assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_resuming_leaves_the_callers_random_numbers_alone(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    run(model_folder, windows, tmp_path, replace(PLAN, steps=4))
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    run(model_folder, windows, tmp_path, replace(PLAN, steps=4))
    drawn = random.random(), np.random.random(), torch.rand(1)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert drawn == (random.random(), np.random.random(), torch.rand(1))


@pytest.mark.parametrize("changes", [{"micro": 1}, {"micro": 3}, {"recompute": True}], ids=str)
def test_less_memory_gives_the_same_gradients(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], changes: dict[str, Any]
) -> None:
    found = []
    for plan in (replace(PLAN, train="lora"), replace(PLAN, train="lora", **changes)):
        model = load_checkpoint(str(model_folder), "float32", "cpu").model
        learner = Learner.of(model, plan)
        lesson = Lesson(*windows)
        loss = gradients(model, lesson, lesson.head_of(model), batch_of(32, plan, 0), plan.micro)
        found.append([loss, *(weight.grad for weight in learner.trained.values())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("recompute", [False, True])
def test_hidden_states_add_their_distance_and_its_gradient(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], recompute: bool
) -> None:
    dense = load_checkpoint(str(model_folder), "float32", "cpu").model.requires_grad_(False)
    architecture = Architecture((2, 0, 1, 2), (24, 0, 7, 24))
    ranking = Ranking(torch.arange(2).repeat(4, 1), torch.arange(24).repeat(4, 1))
    small = shrink(dense, PruningMask.from_architecture(architecture, ranking))
    plan = replace(PLAN, train="norms", recompute=recompute)
    streams = Streams.of(Refitter.of(dense, architecture), 0.5)
    assert (streams.own, streams.dense) == ((0, 1, 2), (1, 2, 3))  # the first stands for the dropped one, too
    learner, batch, found = Learner.of(small, plan), windows[0][:2], []
    for teacher in (Live(dense), Live(dense, streams)):
        lesson = Lesson(*windows, teacher=teacher)
        loss = gradients(small, lesson, lesson.head_of(small), torch.arange(2))
        found.append([loss, *(weight.grad.clone() for weight in learner.trained.values() if weight.grad is not None)])
        small.zero_grad()
    with torch.no_grad():  # what a stock model gives behind its layers; the last without the final norm
        own, theirs = (m(batch, output_hidden_states=True).hidden_states for m in (small, dense))
        apart = [
            (own[p + 1] - theirs[q + 1]).square().sum(-1) / theirs[q + 1].square().sum(-1) for p, q in ((0, 1), (1, 2))
        ]
    least = 0.5 * sum(float(each.mean()) for each in apart) / 3
    more = float(found[1][0] - found[0][0])
    assert least < more and any(not torch.allclose(a, b) for a, b in zip(found[0][1:], found[1][1:], strict=True))
    with torch.no_grad(), heard([small.model.layers[2], dense.model.layers[3]]) as last:
        last_hidden(small, batch), last_hidden(dense, batch)
    third = float(((last[0] - last[1]).square().sum(-1) / last[1].square().sum(-1)).mean())
    assert more == pytest.approx(least + 0.5 * third / 3, rel=1e-4)
    weight, step = next(iter(learner.trained.values())), 1e-3  # the gradient is that of the loss
    with torch.no_grad():
        direction = found[1][1] / found[1][1].norm()
        values = []
        for sign in (1, -1):
            weight.add_(sign * step * direction)
            lesson = Lesson(*windows, teacher=Live(dense, streams))
            with torch.enable_grad():
                values.append(float(gradients(small, lesson, lesson.head_of(small), torch.arange(2))))
            weight.sub_(sign * step * direction)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(found[1][1].norm()), rel=0.02)


def test_a_head_converted_once_gives_the_same_gradients(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor]
) -> None:
    model, lesson, found = (
        load_checkpoint(str(model_folder), "float32", "cpu").model,
        Lesson(*windows, dtype="bfloat16"),
        [],
    )
    learner = Learner.of(model, replace(PLAN, train="norms"))
    for head in (Head.of(model), lesson.head_of(model)):
        loss = gradients(model, lesson, head, torch.arange(4))
        found.append([loss, *(weight.grad.clone() for weight in learner.trained.values())])
        model.zero_grad()
    assert lesson.head_of(model).projection.weight.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight.dtype == torch.float32
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_memory_that_runs_out_halves_what_passes_at_once(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(model_folder, windows, tmp_path / "whole", PLAN)

    def little_memory(most: int) -> Callable[..., torch.Tensor]:
        def read(model: Any, batch: torch.Tensor) -> torch.Tensor:
            if len(batch) > most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return last_hidden(model, batch)

        return read

    told: list[str] = []
    monkeypatch.setattr(trainer, "last_hidden", little_memory(2))
    halved, progress = run(model_folder, windows, tmp_path / "halved", PLAN, tell=told.append)
    assert progress.micro == 2 and len(told) == 1 and "Out of memory at step 0" in told[0] and "2 windows" in told[0]
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(halved.state_dict()[name], weight, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(trainer, "last_hidden", little_memory(1))
    with pytest.raises(torch.OutOfMemoryError):  # once, not until it fits
        run(model_folder, windows, tmp_path / "none", PLAN)


def test_a_loss_that_is_no_number_ends_at_the_last_good_checkpoint(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = Plan.lr_at
    monkeypatch.setattr(Plan, "lr_at", lambda plan, step: rate(plan, step) if step < 6 else float("nan"))
    model, progress = run(model_folder, windows, tmp_path / "work", PLAN)
    assert [step for step, _ in progress.history] == [0, 4] and progress.is_over(PLAN)
    (last,) = re.findall(r"checkpoint is '(.*)'", progress.fault)
    assert Path(last) == tmp_path / "work" / "step-4" and (Path(last) / "weights.safetensors").is_file()
    assert "between steps 4 and 8" in progress.fault
    assert quality(model, windows[1]).loss == pytest.approx(progress.best[1])


def test_a_full_disk_loses_the_newest_checkpoint_alone(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(model_folder, windows, tmp_path / "whole", PLAN)
    written = iter(range(100))

    def full(tensors: Any, file: Path) -> None:
        if next(written) >= 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(StorageError, match=r"step-8.*No space left.*goes on from the checkpoint before"):
            run(model_folder, windows, tmp_path / "parts", PLAN)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"best.safetensors", "step-4"}
    resumed, _ = run(model_folder, windows, tmp_path / "parts", PLAN)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_predictions_on_disk_teach_what_the_dense_model_does(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dense = (load_checkpoint(str(model_folder), "float32", "cpu").model for _ in range(2))
    with torch.no_grad():
        for weight in dense.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    training, order = windows[0], epoch_order(len(windows[0]), 0, 0)[:20]
    made = Kept.of(dense, training, order, tmp_path, "dense", nullcontext)
    again = Kept.of(dense, training, order, tmp_path, "dense", None)  # type: ignore[arg-type]  # is not asked again
    stored = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert stored == pytest.approx(kept_bytes(20, 16, 62), rel=0.05)
    hidden, places = last_hidden(model, training[order[3:7]]).detach(), order[3:7]
    losses = [teacher.loss(hidden, Head.of(model), training[places], places) for teacher in (Live(dense), made, again)]
    assert losses[1] == losses[2] == pytest.approx(losses[0].item(), rel=0.02) and losses[0] > 0.05
    with pytest.raises(TypeError):  # of another model, or other windows, nothing is there
        Kept.of(dense, training, order, tmp_path, "another", None)  # type: ignore[arg-type]


def test_the_learning_rate_warms_up_and_falls() -> None:
    plan = Plan(steps=100, lr=1.0)
    rates = [plan.lr_at(step) for step in range(100)]
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == 1 and 0.1 <= min(rates[5:]) < 0.11


@pytest.mark.parametrize("steps", [1, 3, 7, 15, 20, 40, 50, 60, 74, 100, 101, 120, 200, 999])
@pytest.mark.parametrize("validations", [lessons.VALIDATIONS, 3, 13])
def test_refits_are_as_many_as_time_is_reserved_for(steps: int, validations: int) -> None:
    plan = Plan(steps=steps, every=-(-steps // validations), train="refit-lora")
    ends = [min(done, steps) for done in range(plan.every, steps + plan.every, plan.every)]
    due = [place for place, step in enumerate(ends) if plan.refits_after(step)]
    assert len(due) == min(lessons.REFITS, len(ends)) and ends[due[-1]] == steps
    gaps = [after - before for before, after in zip([-1, *due], due, strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert not any(replace(plan, train="lora").refits_after(step) for step in ends)


def test_progress_tells_when_to_stop() -> None:
    plan = Plan(steps=100, patience=2)
    assert not Progress([(0, 2.0), (25, 1.0), (50, 1.5)]).is_over(plan)
    assert Progress([(0, 2.0), (25, 1.0), (50, 1.5), (75, 1.2)]).is_over(plan)
    assert Progress([(0, 2.0), (100, 1.0)]).is_over(plan)


def test_minutes_leave_room_for_steps() -> None:
    timed = {"step": 2.0, "teacher": 0.25, "windows": 1000, "batch": 4, "apart": 60.0}
    assert Length(minutes=11).steps_of(**timed | {"windows": 800}) == 240  # 2.5 seconds each, of 600
    assert Length(minutes=11).steps_of(**timed | {"windows": 400}) == 250  # 100 for all that the dense model can tell
    assert Length().steps_of(**timed | {"windows": 10**6}) == int((60 * MINUTES - 60) / 2.5)
    assert Length(minutes=0.1).steps_of(**timed) > 0
    assert Length(tokens=1025).known_steps(512) == 3 and Length(steps=7).known_steps(512) == 7
    assert Length().known_steps(512) is None


def recover(*words: object) -> Result:
    common = ("--window", 16, "--heldout", 4, "--device", "cpu", "--compute-dtype", "float32", "--lr", "3e-3")
    return CliRunner().invoke(app, ["recover", *map(str, (*common, *words))])


def test_a_recovered_folder_is_better_and_says_how_it_was_made(model_folder: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "better"
    result = recover(model_folder, "--out", out, "--steps", 20, "--eval-every", 10, "--text", f"text:{story}")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["better"]  # no checkpoints are left
    told = json.loads((out / "llmbo.json").read_text())["recovery"]
    before, after = (told["heldout"][when]["loss"] for when in ("before", "after"))
    assert after < before - 0.2 and f"{after:.4f}" in result.output
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    assert load_checkpoint(str(out), "float32", "cpu").tokenizer("w0")["input_ids"] == [2]


def test_what_a_training_of_another_model_has_left_is_refused(
    model_folder: Path, exported: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: Any) -> None:
        raise KeyboardInterrupt

    words = ("--out", tmp_path / "out", "--minutes", 0.01, "--text", f"text:{story}", "--compute-dtype", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(recovery, "train", interrupt)
        assert recover(model_folder, *words).exit_code == 130
    settled = json.loads((tmp_path / "out.recovery" / "asked.json").read_text())["settled"][0]
    refused = recover(exported, *words)
    assert refused.exit_code == 2 and "holds the training of another model: delete it" in refused.stderr
    refused = recover(model_folder, *words, "--seed", 1)
    assert refused.exit_code == 2 and "other settings (plan" in refused.stderr
    monkeypatch.setattr(lessons, "_affordable", interrupt)  # nothing is timed again
    monkeypatch.setattr(recovery, "choose_dtype", interrupt)
    assert recover(model_folder, *words).exit_code == 0
    assert json.loads((tmp_path / "out" / "llmbo.json").read_text())["recovery"]["plan"]["steps"] == settled


def test_a_trial_of_a_run_is_exported_and_recovered(
    finished: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(finished.folder / "runs", home / "runs")
    report = finished.report()
    trial, out = report["front"][0]["trial"], tmp_path / "better"
    text = report["data"]["source"]
    items = home / "words.jsonl"
    items.write_text(
        "".join(json.dumps({"question": f"w{n}", "choices": ["w1", "w2"], "answer": 0}) + "\n" for n in range(9))
    )
    cut = recovery.RebuildInputs.cut

    def in_bfloat16(*given: Any) -> Any:  # what a run has by default: rotary frequencies are float32 all the same
        found = cut(*given)
        cast(found.model, torch.bfloat16)
        return found

    words = (
        "--trial",
        trial,
        "--out",
        out,
        "--steps",
        2,
        "--train",
        "refit-lora",
        "--compute-dtype",
        "bfloat16",
        "--items",
        items,
        "--limit",
        6,
        "--items-every",
        2,
        "--text",
        text,
    )
    beside = home / "runs" / "tiny" / "recovered.json"
    courses: list[Any] = []
    course_for = recovery.course_for
    with chdir(home), monkeypatch.context() as patch:
        patch.setattr(
            recovery, "course_for", lambda *given, **named: courses.append(given) or course_for(*given, **named)
        )
        patch.setattr(recovery.RebuildInputs, "cut", in_bfloat16)
        beside.write_text("[{}]")
        refused = recover("tiny", *words)
        assert refused.exit_code == 2 and "recovered.json' is damaged" in refused.stderr and not out.exists()
        beside.unlink()
        result = recover("tiny", *words)
    assert result.exit_code == 0, result.output
    [(student, windows, *_)] = courses
    run_windows = load_windows(RunConfig.from_settings(report["run"]["settings"]), student)
    trained, judged, ranked = (
        set(map(tuple, part.tolist())) for part in (windows.calibration, run_windows.heldout, run_windows.calibration)
    )
    assert len(judged) == 4 and not trained & judged and trained & ranked
    (made,) = json.loads(beside.read_text())
    assert made["trial"] == trial and [step for step, _ in made["validation"]] == [0, 1, 2]
    assert json.dumps(made["folder"]) in (beside.parent / "report.html").read_text()
    (judged,) = made["items"]
    assert (judged["name"], judged["count"], judged["kind"]) == ("words", 6, "multiple_choice")
    [(step, right)] = judged["between"]
    assert step == 2 and f"step 2: validation {made['validation'][2][1]:.4f}" in result.stderr
    assert f"words {right:.3f}\n" in result.stderr
    assert f"words, acc by step: 2: {right:.3f}." in (out / "README.md").read_text()
    (file,) = read_item_files([str(items)], 6)
    written = load_checkpoint(str(out), "float32", "cpu")
    assert Exam.of(file, written.model, written.tokenizer).taken_by(written.model) == judged["after"]
    row = " ".join(f"{judged[when]['acc']:.3f} ± {judged[when]['acc_stderr']:.3f} |" for when in ("before", "after"))
    assert f"| words, acc of 6 items | {row}" in (out / "README.md").read_text()
    assert f"words, acc of 6 items: {judged['before']['acc']:.3f} ± " in result.stdout
    told = json.loads((out / "llmbo.json").read_text())
    assert told["trial"] == trial and told["recovery"]["plan"]["distil"]
    card = (out / "README.md").read_text()
    assert f'from_pretrained("{out}"' in card and "Trained briefly" in card and "Measured before training" in card
    assert f"| KL from the dense model | {told['recovery']['heldout']['before']['kl']:.4f} |" in card
    again = recover(out, "--out", tmp_path / "again", "--steps", 2, "--heldout", 40, "--text", text)
    assert (
        "holds 1200 tokens, at least 1536 are needed" in again.stderr
        and "256 tokens that the search used" in again.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["better"]
    monkeypatch.setattr(lessons, "SELF_TOKENS", 256)
    sampled = recover(out, "--out", tmp_path / "sampled", "--steps", 1, "--text", "self", "--micro-batch", 2)
    assert sampled.exit_code == 0, sampled.output
    told = json.loads((tmp_path / "sampled" / "llmbo.json").read_text())
    assert told["recovery"]["text"]["source"].startswith("self") and told["recovery"]["plan"]["distil"]


def test_a_model_under_other_names_than_the_dense_one_s_is_not_refitted(
    build: Callable[[str], Any], model_folder: Path, story: Path, tmp_path: Path
) -> None:
    dense = build("phi3").float()
    whole, tokenizer = anatomy_of(dense), AutoTokenizer.from_pretrained(model_folder)
    small = decilm(Pruned(dense, whole, Architecture.full(whole), tokenizer))
    told = {"base_model": {"name": str(tmp_path / "dense")}, "architecture": Architecture.full(whole).to_dict()}
    for name, model in (("dense", dense), ("small", small)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    (tmp_path / "small" / "llmbo.json").write_text(json.dumps(told))
    words = (tmp_path / "small", "--out", tmp_path / "out", "--steps", 1, "--text", f"text:{story}")
    refused = recover(*words, "--train", "refit-lora")
    assert refused.exit_code == 2 and "--train refit-lora needs the dense model" in refused.stderr, refused.output
    assert recover(*words).exit_code == 0


def test_what_the_format_cannot_hold_is_refused_before_training(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "train", None)  # is not called
    trial, words = finished.report()["front"][0]["trial"], ("--steps", 1, "--out", tmp_path / "out")
    with chdir(finished.folder):
        refused = recover("tiny", "--trial", trial, *words, "--format", "gguf")
    assert refused.exit_code == 2 and re.search("WordLevel.*--format hf", refused.stderr), refused.output
    assert not list(tmp_path.iterdir())


def test_too_little_disk_is_found_before_training(
    model_folder: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = recover(model_folder, "--out", tmp_path / "out", "--steps", 2, "--text", f"text:{story}")
    assert result.exit_code == 2 and "Too little disk space" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["all", "lora", "norms"])
def test_checkpoints_take_no_more_disk_than_is_checked(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, kind: str
) -> None:
    plan = replace(PLAN, train=kind, rank=4, steps=4)
    small = load_checkpoint(str(model_folder), "float32", "cpu").model
    expected = checkpoint_bytes(small, plan)
    run(model_folder, windows, tmp_path, plan)
    best = (tmp_path / "best.safetensors").stat().st_size
    state = sum(path.stat().st_size for path in (tmp_path / "step-4").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "step-4"}
    overhead = 60_000  # names and places, which do not grow with the weights
    assert expected / 2 - overhead < best + 2 * state < expected + overhead


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("./nowhere",), "'./nowhere'"),
        *((("{model}", "--lora", "--rank", rank), "--rank must be at least 1") for rank in (0, -3)),
        (("{model}", "--rank", -3), "--rank must be at least 1"),  # of no use, and nonsense
        (("{model}", "--rank", 4, "--no-lora"), "--rank 4 is of no use without adapters"),
        (("{model}", "--train", "x"), "Unknown --train 'x'"),
        (("{model}", "--train", "norms", "--lora"), "--train norms and --lora"),
        (("{model}", "--minutes", 5), "--steps 2 and --minutes 5 both say"),
        (("{model}", "--train", "refit-lora"), "--train refit-lora needs the dense model"),
        (("{model}", "--hidden", 0.1), "--hidden 0.1 needs the dense model"),
        (("{model}", "--hidden", 0.1, "--no-distil"), "--hidden 0.1 compares with the dense model"),
        (("{model}", "--text", "self"), "--text self needs the dense model"),
        (("{model}", "--compute-dtype", "float16"), "loses small gradients"),
        (("{model}", "--format", "gguf"), "--format gguf needs --trial"),
        (("{model}", "--dtype", "bfloat16"), "--dtype bfloat16 needs --trial"),
        (("{model}", "--quantize", "q8_0"), "--quantize q8_0 needs --trial"),
        (("{model}", "--max-shard-size", "1MB"), "--max-shard-size 1MB needs --trial"),
        (("{model}", "--refit", "table"), "--refit table needs --trial"),
        (("{model}", "--items", "{tmp}/none.jsonl"), "none.jsonl"),
        (("{model}", "--items-every", "2"), "--items-every 2 needs --items"),
        (("{model}", "--limit", -1), "--limit must be at least 0"),
        *((("{model}", "--lr", lr), "--lr must be") for lr in ("nan", "inf", -1)),
        *((("{model}", flag, 0), f"{flag} must be at least 1") for flag in ("--steps", "--heldout", "--tokens")),
        *((("{model}", "--patience", patience), "--patience must be at least 1") for patience in (0, -1)),
        *((("{model}", flag, 10**30), f"{flag} must be at most") for flag in ("--steps", "--rank", "--seed")),
        (("{model}", "--seed", -1), "--seed must be at least 0"),
        (("{model}", "--window", 1), "--window must be at least 2"),
        (("{model}", "--compute-dtype", "x"), "--compute-dtype must be auto"),
        (("no run", "--trial", -1), "--trial must be at least 0"),
        (("{model}", "--distil"), "--teacher"),
        (("{model}", "--distil", "--teacher", "./nowhere"), "'./nowhere'"),
        (("{model}", "--text", "text:{tmp}/short.txt"), "short.txt"),
        (("no run", "--trial", 3), "'no run'"),
        (("{model}", "--out", "{model}"), "not empty"),
    ],
)
def test_bad_input_is_one_line(
    model_folder: Path, story: Path, tmp_path: Path, words: tuple[Any, ...], said: str
) -> None:
    (tmp_path / "short.txt").write_text("w1 " * 40)
    places = {"model": model_folder, "tmp": tmp_path}
    given = [str(word).format(**places) for word in words]
    defaults = {"--steps": 2, "--text": f"text:{story}", "--out": tmp_path / "out"}
    rest = [word for flag, value in defaults.items() if flag not in given for word in (flag, value)]
    with chdir(tmp_path):
        result = recover(*given, *rest)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert said in line
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
