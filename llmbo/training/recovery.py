"""Recover a pruned checkpoint by short training, and write it only as something better than what it was."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmbo.config import RunConfig
from llmbo.config.numbers import MOST, Within, check_numbers
from llmbo.deploy.disk import check_disk
from llmbo.deploy.export import exported_beside
from llmbo.errors import ConfigError, ModelError, first_line
from llmbo.models.checks import check_finite, check_tokens
from llmbo.models.loading import Checkpoint, find_checkpoint, load_checkpoint
from llmbo.models.placement import check_dtype, choose_dtype
from llmbo.problem.texts import searched
from llmbo.training.trainer import Plan, Progress, checkpoint_bytes, train
from llmbo.types import Phases
from pruning.calibration import Dealt, TokenWindows, unseen_windows
from pruning.export.folder import check_out, whole_folder
from pruning.likelihood import quality
from pruning.text import read_mix

HELDOUT = Within(1, MOST)  # windows
MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Task:
    """What to recover, on which text.

    Args:
        source: A folder written by `llmbo export`, or any other small model; with `trial`, a run.
        out: Folder to make.
        text: builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN] or mix:…; as a chat where the run behind the folder had it so.
        window: Tokens per window.
        heldout: Windows each for validation and for the final comparison; neither is trained on.
        teacher: Dense model for distillation; empty takes the one the folder names.
        dtype: Of the matrix products while training; "auto" takes the faster one here.
        trial: Of the run that `source` names.
    """

    source: str
    out: Path
    text: str
    window: Annotated[int, Within(2, MOST)]
    heldout: Annotated[int, HELDOUT]
    teacher: str
    dtype: str
    device: str
    trial: Annotated[int | None, Within(0, MOST)] = None

    def __post_init__(self) -> None:
        check_numbers(self)
        check_dtype(self.dtype)


@dataclass(frozen=True)
class Outcome:
    """Held-out losses in nats per token, on windows that neither training nor the choice of the best step has seen."""

    before: float
    after: float
    tokens: int
    progress: Progress

    @property
    def gain(self) -> float:
        return self.before - self.after


def recover(
    task: Task,
    plan: Plan,
    command: str,
    phases: Phases,
    on_validation: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Train, keep the best, write it, read it back.

    The model that validates best is written, the untrained one included: the result is never worse than what came in. An
    interrupted recovery goes on from `OUT.recovery`, which is removed at the end.

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    check_out(task.out)
    if task.trial is not None:
        with exported_beside(task.out, task.source, task.trial, command, phases) as folder:
            exported = replace(task, source=str(folder), trial=None)
            return recover(exported, plan, command, phases, on_validation)
    with phases.phase("model"):
        small = load_checkpoint(task.source, "float32", task.device)  # small steps vanish in bfloat16
        check_disk(task.out, 4 * small.parameters + checkpoint_bytes(small.model, plan))
        kind = choose_dtype(task.dtype, small.device, small.model.config.get_text_config())
        stored = _saved_dtype(task.source)
        teacher = _teacher(task, small, kind) if plan.distil else None
        seen, chat = _searched(small.source)
        text = read_mix(task.text)
        windows = unseen_windows(text, small.tokenizer, task.window, plan.seed, task.heldout, plan.batch, seen, chat)
        check_tokens(small.model, small.tokenizer, windows.calibration, windows.proxy, windows.heldout)
    before = quality(small.model, windows.heldout).loss
    check_finite(task.source, small.dtype, before)
    work = task.out.with_name(task.out.name + ".recovery")
    with phases.phase("training", plan.steps) as advance:
        trained, progress = train(
            small.model,
            teacher,
            windows.calibration,
            windows.proxy,
            plan,
            work,
            small.device,
            MIXED[kind],
            advance,
            on_validation,
        )
    with phases.phase("writing and reading back"):
        after = quality(trained, windows.heldout).loss
        outcome = Outcome(before, after, progress.best[0] * plan.batch * task.window, progress)
        nn.Module.to(trained, dtype=stored)
        _write(trained, small, task, plan, outcome, command, windows)
    shutil.rmtree(work, ignore_errors=True)
    return outcome


def _searched(source: str) -> tuple[tuple[Dealt, ...], bool]:
    """The windows that the run behind an exported folder took, none if no run is; and whether it put its text as a chat."""
    told = _details(source)
    if "settings" not in told or "text" not in told:
        return (), False
    config = RunConfig.from_settings(told["settings"], strategy="qnehvi", advisor="none")
    return searched(config, told["text"]), config.chat


def _saved_dtype(source: str) -> torch.dtype:
    found = find_checkpoint(source).config.dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _teacher(task: Task, small: Checkpoint, dtype: str) -> PreTrainedModel:
    name = task.teacher or _base_model(small)
    if not name:
        raise ConfigError(f"--distil needs the dense model, which '{task.source}' does not name: give --teacher.")
    teacher = load_checkpoint(name, dtype, task.device).model
    if teacher.config.vocab_size != small.model.config.vocab_size:
        raise ModelError(
            f"'{name}' cannot teach '{task.source}': it knows {teacher.config.vocab_size} tokens, "
            f"not {small.model.config.vocab_size}."
        )
    teacher.requires_grad_(False)
    return teacher


def _base_model(small: Checkpoint) -> str:
    """Where the dense model is: its name, or the place it was loaded from."""
    base = _details(small.source).get("base_model") or {}
    return next((name for name in (base.get("name", ""), base.get("source", "")) if name), "")


def _details(source: str) -> dict[str, Any]:
    file = Path(source) / "llmbo.json"
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ModelError(f"'{file}' is damaged ({first_line(error)}): export the model again.") from error
    return found


def _write(
    model: PreTrainedModel,
    small: Checkpoint,
    task: Task,
    plan: Plan,
    outcome: Outcome,
    command: str,
    windows: TokenWindows,
) -> None:
    recovery = {
        "command": command,
        "plan": asdict(plan),
        "text": {
            "source": windows.source,
            "sha256": windows.sha256,
            "sources": [asdict(source) for source in windows.sources],
            "window": windows.length,
            "bos": windows.bos,
            "chat": windows.chat,
        },
        "heldout_loss": {"before": outcome.before, "after": outcome.after},
        "best_step": outcome.progress.best[0],
        "tokens": outcome.tokens,
        "validation": outcome.progress.history,
    }
    files = {"llmbo.json": json.dumps({**_details(small.source), "recovery": recovery}, indent=2) + "\n"}
    card = Path(small.source) / "README.md"
    if card.is_file():
        told = card.read_text(encoding="utf-8").replace(f'"{task.source}"', f'"{task.out}"')  # where to load it from
        files["README.md"] = f"{told}\n{_section(plan, outcome, windows, command)}"
    with whole_folder(task.out, files) as folder:
        model.save_pretrained(folder)
        small.tokenizer.save_pretrained(folder)
        _read_back(folder, model, windows)


def _section(plan: Plan, outcome: Outcome, windows: TokenWindows, command: str) -> str:
    how = "LoRA" if plan.lora else "all weights but the embeddings"
    goal = "distilled from the dense model" if plan.distil else "next tokens"
    return (
        f"## Recovery\n\nTrained on {outcome.tokens} tokens of {windows.source} ({how}; {goal}): held-out loss "
        f"{outcome.before:.4f} → {outcome.after:.4f} nats per token.\n\n    {command}\n"
    )


def _read_back(folder: Path, model: PreTrainedModel, windows: TokenWindows) -> None:
    again = load_checkpoint(str(folder), "float32", "cpu").model
    sample = windows.heldout[:1]
    nn.Module.to(model, dtype=torch.float32, device="cpu")  # as stored, then widened
    found, expected = quality(again, sample).loss, quality(model, sample).loss
    if not abs(found - expected) < 1e-3:
        raise ModelError(
            f"What was written measures {found:.4f} where {expected:.4f} was expected; it has been deleted."
        )
