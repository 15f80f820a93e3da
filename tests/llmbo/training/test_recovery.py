"""Recovery gains, resumes to the same result, and never returns something worse."""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from click.testing import Result
from safetensors.torch import load_file
from torch.nn import functional as F
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.deploy import disk
from llmbo.errors import ConfigError, StorageError
from llmbo.models.loading import load_checkpoint
from llmbo.training import trainer
from llmbo.training.trainer import Plan, Progress, checkpoint_bytes, forward_kl, train
from pruning.likelihood import quality

PLAN = Plan(steps=12, batch=4, every=4, lr=3e-3)


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
    model = load_checkpoint(str(folder), "float32", "cpu").model
    return train(model, options.pop("teacher", None), *windows, plan, work, "cpu", **options)


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, lora=4, lr=1e-2), replace(PLAN, distil=True)])
def test_training_returns_the_best_validated_weights(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, plan: Plan
) -> None:
    if plan.lora:
        pytest.importorskip("peft", reason="needs peft: pip install 'llmbo[recovery]'")
    teacher = None
    if plan.distil:  # a teacher that knows the text
        teacher, _ = run(model_folder, windows, tmp_path / "teacher", PLAN)
    model, progress = run(model_folder, windows, tmp_path / "work", plan, teacher=teacher)
    assert progress.history[0][0] == 0 and progress.best[1] < progress.history[0][1] - 0.2
    assert quality(model, windows[1]).loss == pytest.approx(progress.best[1], abs=1e-4)  # merged = with adapters
    assert not any("lora" in name for name, _ in model.named_parameters())
    dense = load_checkpoint(str(model_folder), "float32", "cpu").model
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)


def test_trainings_of_different_precision_follow_each_other(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    losses = {}
    for place, precision in enumerate(("no", "bf16", "no")):
        _, progress = run(model_folder, windows, tmp_path / str(place), Plan(2, every=1), mixed_precision=precision)
        losses.setdefault(precision, []).append(progress.history)
    assert losses["no"][0] == losses["no"][1] != losses["bf16"][0]


def test_a_harmful_plan_returns_the_untrained_model(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    model, progress = run(model_folder, windows, tmp_path, replace(PLAN, lr=1e3, steps=40, patience=2))
    assert progress.best[0] == 0 and progress.step == 8  # stopped early
    before = load_checkpoint(str(model_folder), "float32", "cpu").model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("stop", "plan"), [(5, PLAN), (8, PLAN), (8, replace(PLAN, lora=4)), (5, replace(PLAN, distil=True))]
)
def test_an_interrupted_training_ends_where_it_would_have_ended(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, stop: int, plan: Plan
) -> None:
    def interrupt(step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    if plan.lora:
        pytest.importorskip("peft", reason="needs peft: pip install 'llmbo[recovery]'")
    teacher = load_checkpoint(str(model_folder), "float32", "cpu").model if plan.distil else None
    if teacher is not None:
        teacher.get_input_embeddings().weight.data += 0.1
    whole, progress = run(model_folder, windows, tmp_path / "whole", plan, teacher=teacher)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, windows, tmp_path / "parts", plan, teacher=teacher, on_step=interrupt)
    steps: list[int] = []
    resumed, again = run(model_folder, windows, tmp_path / "parts", plan, teacher=teacher, on_step=steps.append)
    assert again.history == progress.history and steps[0] == (stop - 1) // 4 * 4 + 1
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
    [(Accelerator, "save_state", 3), (os, "replace", 5), (os, "replace", 6), (shutil, "rmtree", 3), (trainer, "save_file", 3)],
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
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "progress.json", "custom_checkpoint_0.pkl", "random_states_0.pkl"]
)
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
    if name == "random_states_0.pkl":  # nobody's: training draws from no generator
        run(model_folder, windows, tmp_path / "work", plan)
    else:
        with pytest.raises(StorageError, match=r"step-4' is damaged \(.*delete") as caught:
            run(model_folder, windows, tmp_path / "work", plan)
        assert "\n" not in str(caught.value)
    assert not mark.exists()


def test_a_checkpoint_of_an_earlier_version_is_refused(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    torch.save({}, tmp_path / "state.pt")
    with pytest.raises(StorageError, match="earlier version"):
        run(model_folder, windows, tmp_path, PLAN)


def test_resuming_leaves_the_callers_random_numbers_alone(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    run(model_folder, windows, tmp_path, replace(PLAN, steps=4))
    model = load_checkpoint(str(model_folder), "float32", "cpu").model
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    train(model, None, *windows, replace(PLAN, steps=4), tmp_path, "cpu")
    drawn = random.random(), np.random.random(), torch.rand(1)
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    assert drawn == (random.random(), np.random.random(), torch.rand(1))


def test_forward_kl_is_the_textbook_one() -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 4, 9, generator=rng), torch.randn(3, 4, 9, generator=rng)
    for temperature in (0.5, 1.0, 3.0):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).log_softmax(-1)
        expected = F.kl_div(q, p, reduction="none").sum(-1).mean() * temperature**2
        torch.testing.assert_close(forward_kl(student, teacher, temperature), expected)
        assert forward_kl(teacher, teacher, temperature).abs() < 1e-6


def test_the_learning_rate_warms_up_and_falls() -> None:
    plan = Plan(steps=100, lr=1.0)
    rates = [plan.lr_at(step) for step in range(100)]
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert max(rates) == 1 and 0.1 <= min(rates[5:]) < 0.11


def test_progress_tells_when_to_stop() -> None:
    plan = Plan(steps=100, patience=2)
    assert not Progress([(0, 2.0), (25, 1.0), (50, 1.5)]).is_over(plan)
    assert Progress([(0, 2.0), (25, 1.0), (50, 1.5), (75, 1.2)]).is_over(plan)
    assert Progress([(0, 2.0), (100, 1.0)]).is_over(plan)
    with pytest.raises(ConfigError, match="--steps"):
        Plan(steps=0)


def recover(*words: object) -> Result:
    common = ("--window", 16, "--heldout", 4, "--device", "cpu", "--dtype", "float32", "--lr", "3e-3")
    return CliRunner().invoke(app, ["recover", *map(str, (*common, *words))])


def test_a_recovered_folder_is_better_and_says_how_it_was_made(model_folder: Path, story: Path, tmp_path: Path) -> None:
    out = tmp_path / "better"
    result = recover(model_folder, "--out", out, "--steps", 20, "--eval-every", 10, "--text", f"text:{story}")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["better"]  # no checkpoints are left
    told = json.loads((out / "llmbo.json").read_text())["recovery"]
    assert told["heldout_loss"]["after"] < told["heldout_loss"]["before"] - 0.2
    assert f"{told['heldout_loss']['after']:.4f}" in result.output
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, out))
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    assert load_checkpoint(str(out), "float32", "cpu").tokenizer("w0")["input_ids"] == [2]


def test_a_trial_of_a_run_is_exported_and_recovered(finished: Any, tmp_path: Path) -> None:
    report = finished.report()
    trial, out = report["front"][0]["trial"], tmp_path / "better"
    text = report["data"]["source"]
    with chdir(finished.folder):
        result = recover("tiny", "--trial", trial, "--out", out, "--steps", 2, "--distil", "--text", text)
    assert result.exit_code == 0, result.output
    told = json.loads((out / "llmbo.json").read_text())
    assert told["trial"] == trial and told["recovery"]["plan"]["distil"]
    assert f'from_pretrained("{out}"' in (out / "README.md").read_text()  # not the folder it was exported to first
    again = recover(out, "--out", tmp_path / "again", "--steps", 2, "--heldout", 40, "--text", text)
    assert (
        "holds 1200 tokens, at least 1536 are needed" in again.stderr
        and "256 tokens that the search used" in again.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["better"]


def test_too_little_disk_is_found_before_training(
    model_folder: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    result = recover(model_folder, "--out", tmp_path / "out", "--steps", 2, "--text", f"text:{story}")
    assert result.exit_code == 2 and "Too little disk space" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", [0, 4])
def test_checkpoints_take_no_more_disk_than_is_checked(
    model_folder: Path, windows: tuple[torch.Tensor, torch.Tensor], tmp_path: Path, lora: int
) -> None:
    if lora:
        pytest.importorskip("peft", reason="needs peft: pip install 'llmbo[recovery]'")
    plan = replace(PLAN, lora=lora, steps=4)
    small = load_checkpoint(str(model_folder), "float32", "cpu").model
    expected = checkpoint_bytes(small, plan)
    run(model_folder, windows, tmp_path, plan)
    best = (tmp_path / "best.safetensors").stat().st_size
    state = sum(path.stat().st_size for path in (tmp_path / "step-4").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"best.safetensors", "step-4"}
    overhead = 200_000  # names and archive entries, which do not grow with the weights
    assert expected / 2 - overhead < best + 2 * state < expected + overhead


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("./nowhere",), "'./nowhere'"),
        *((("{model}", "--lora", "--rank", rank), "--rank must be at least 1") for rank in (0, -3)),
        (("{model}", "--rank", -3), "--rank must be at least 1"),  # of no use, and nonsense
        (("{model}", "--rank", 4), "--rank 4 is of no use without --lora"),
        *((("{model}", "--lr", lr), "--lr must be") for lr in ("nan", "inf", -1)),
        *((("{model}", "--temperature", value), "--temperature must be") for value in ("nan", "inf", 0, -1)),
        *(
            (("{model}", flag, 0), f"{flag} must be at least 1")
            for flag in ("--steps", "--batch", "--eval-every", "--heldout")
        ),
        *((("{model}", "--patience", patience), "--patience must be at least 1") for patience in (0, -1)),
        *((("{model}", flag, 10**30), f"{flag} must be at most") for flag in ("--steps", "--rank", "--seed")),
        (("{model}", "--seed", -1), "--seed must be at least 0"),
        (("{model}", "--window", 1), "--window must be at least 2"),
        (("{model}", "--dtype", "x"), "--dtype must be auto"),
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


def test_accelerates_private_name_is_what_the_trainer_takes_it_for() -> None:
    """Two trainings of one process may want different precisions."""
    here = f"accelerate {accelerate.__version__}: see llmbo/training/trainer.py"
    assert hasattr(AcceleratorState, "_reset_state"), f"AcceleratorState has no `_reset_state` any more. {here}"
    for precision in ("no", "bf16", "no"):
        AcceleratorState._reset_state()
        assert accelerate.Accelerator(cpu=True, mixed_precision=precision).mixed_precision == precision, here
