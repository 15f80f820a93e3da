"""Recover a pruned model by short training, and write it only as something better than what it was."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmbo.config import RunConfig
from llmbo.config.numbers import MOST, Within, check_numbers
from llmbo.deploy.disk import check_disk
from llmbo.deploy.export import base_of, write
from llmbo.deploy.reader import started
from llmbo.deploy.request import ExportRequest
from llmbo.errors import ConfigError, ModelError, first_line
from llmbo.evaluation.items import Exam, items_part
from llmbo.models.checks import check_finite
from llmbo.models.loading import Checkpoint, find_checkpoint, load_checkpoint
from llmbo.models.placement import check_dtype, choose_dtype
from llmbo.report.recovered import ItemsJudged, read_recovered
from llmbo.report.write import add_recovered
from llmbo.run.rebuild import RebuildInputs, config_of
from llmbo.training.checkpoints import checkpoint_bytes
from llmbo.training.lessons import Course, Student, course_for, settled_dtype, windows_for
from llmbo.training.outcome import Outcome, recovered, told
from llmbo.training.plan import BATCH, DEVICE_BATCH, Length, Plan, Progress
from llmbo.training.processes import check_batch, in_turn, meet, place
from llmbo.training.trainer import train
from llmbo.types import Phases
from pruning.architecture import Architecture
from pruning.export.folder import check_out, whole_folder
from pruning.export.rebuild import cast
from pruning.items import ItemFile
from pruning.likelihood import quality

HELDOUT = Within(1, MOST)  # windows


@dataclass(frozen=True)
class Task:
    """What to recover, on which text.

    Args:
        source: A folder written by `llmbo export`, or any other small model; with `trial`, a run.
        out: Folder to make.
        text: builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN], mix:… or self; empty takes `Student.text_for`. As a chat
            where the run had it so.
        window: Tokens per window.
        heldout: Windows each for validation and for the final comparison; neither is trained on.
        teacher: Dense model; empty takes the one the folder names.
        compute_dtype: Of the matrix products while training; "auto" takes the faster one here.
        items: To judge by before and after, and behind every so many validations (`items_every`; 0 for none).
        trial: Of the run that `source` names.
        format, refit, dtype, quantize, max_shard_size: As `llmbo export` has them, for a trial; a folder stays what it is.
        distil: Learn from the dense model; None where it is known.
    """

    source: str
    out: Path
    text: str = ""
    window: Annotated[int, Within(2, MOST)] = 256
    heldout: Annotated[int, HELDOUT] = 12
    teacher: str = ""
    compute_dtype: str = "auto"
    device: str = "auto"
    items: tuple[ItemFile, ...] = ()
    items_every: Annotated[int, Within(0, MOST)] = 0
    trial: Annotated[int | None, Within(0, MOST)] = None
    format: str = ""
    refit: str = ""
    dtype: str = ""
    quantize: str = ""
    max_shard_size: str = "5GB"
    distil: bool | None = None

    def __post_init__(self) -> None:
        check_numbers(self)
        if self.items_every and not self.items:
            raise ConfigError(f"--items-every {self.items_every} needs --items: name a file of them.")
        check_dtype(self.compute_dtype, "--compute-dtype")
        if self.compute_dtype == "float16":
            raise ConfigError("--compute-dtype float16 loses small gradients: take bfloat16 or float32.")
        for name in ("format", "refit", "dtype", "quantize", "max_shard_size"):
            value, default = getattr(self, name), getattr(Task, name)
            if self.trial is None and value != default:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} {value} needs --trial: a folder is written as it came, for transformers.")


Watcher = Callable[[Progress], None]


def recover(
    task: Task,
    plan: Plan,
    length: Length,
    command: str,
    phases: Phases,
    on_validation: Watcher = lambda progress: None,
) -> Outcome:
    """Train, keep the best, write it, read it back.

    The model that validates best is written, the untrained one included: the result is never worse than what came in. An
    interrupted recovery goes on from `OUT.recovery`, which is removed at the end.

    Args:
        plan: Zeros follow from `length` and the device; `distil` from the task.

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    check_out(task.out)
    if plan.hidden and task.distil is False:
        raise ConfigError(f"--hidden {plan.hidden:g} compares with the dense model: leave out --no-distil.")
    outcome = (_folder if task.trial is None else _trial)(task, plan, length, command, phases, on_validation)
    meet()
    if not place():
        shutil.rmtree(_work(task), ignore_errors=True)
    return outcome


def _work(task: Task) -> Path:
    return task.out.with_name(task.out.name + ".recovery")


def _trial(task: Task, plan: Plan, length: Length, command: str, phases: Phases, watch: Watcher) -> Outcome:
    """Cut a trial's model from the run's base, which teaches it, and export it as if it had been so from the start."""
    request = ExportRequest.of(
        task.source, task.trial, task.format, task.out, task.dtype, task.max_shard_size, task.refit, task.quantize
    )
    report = request.report
    read_recovered(request.folder)  # one that is damaged is told of before the training
    with started(request.format.name) as read:
        loaded, run_windows = base_of(
            request, phases, task.teacher or None, None if task.device == "auto" else task.device
        )
        with in_turn():
            inputs = RebuildInputs.of(report, request.folder, loaded, run_windows, phases)
            cut = inputs.cut(request.trial, phases, request.refit)
        cast(cut.model, torch.float32)  # small steps vanish in bfloat16
        kind = _dtype(task, loaded)
        loaded.model.requires_grad_(False)
        student = Student(cut.model, loaded.tokenizer, loaded.device, kind, loaded.model, request.architecture)
        elsewhere = report.elsewhere.model_dump() if report.elsewhere else None
        student.searched_by(config_of(report), report.data.model_dump(), elsewhere)
        plan = replace(plan, distil=task.distil is not False)
        places = {parameter.device.type for parameter in loaded.model.parameters()}
        if places != {torch.device(loaded.device).type} and (plan.distil or plan.train == "refit-lora"):
            raise ConfigError(
                f"The run '{report.run.name}' kept its model's layers off the device, and a dense model that teaches needs them there: "
                "take --no-distil, or --device cpu."
            )
        trained, course, outcome = _trained(student, task, plan, length, phases, watch)
        if place():
            return outcome
        how = told(course, outcome, command)
        write(request, loaded, run_windows, replace(cut, model=trained), command, phases, read, how)
        add_recovered(request.folder, recovered(request.trial.number, task.out, course, outcome, command))
    return outcome


def _folder(task: Task, plan: Plan, length: Length, command: str, phases: Phases, watch: Watcher) -> Outcome:
    """Train what a folder holds, and write it as that folder was."""
    with phases.phase("model"):
        small = load_checkpoint(task.source, "float32", task.device)
        stored, details = _saved_dtype(task.source), _details(task.source)
        kind = _dtype(task, small)
        name = task.teacher or _base_model(details)
        plan = replace(plan, distil=bool(name) if task.distil is None else task.distil)
        if not name and (plan.distil or task.text == "self"):
            asking = "--distil" if plan.distil else "--text self"
            raise ConfigError(f"{asking} needs the dense model, which '{task.source}' does not name: give --teacher.")
        wanted = plan.distil or task.text == "self" or plan.train == "refit-lora"
        student = Student(small.model, small.tokenizer, small.device, kind)
        if wanted and name:
            student.dense = _teacher(name, task, small, kind)
        if "architecture" in details and student.dense is not None and _alike(small.model, student.dense):
            student.architecture = Architecture.from_dict(details["architecture"])
        if "settings" in details and "text" in details:
            config = RunConfig.from_settings(details["settings"], strategy="qnehvi", advisor="none")
            student.searched_by(config, details["text"], details.get("elsewhere_text"))
    trained, course, outcome = _trained(student, task, plan, length, phases, watch)
    if place():
        return outcome
    cast(trained, stored)
    with phases.phase("writing and reading back"):
        _write(trained, small, task, details, course, told(course, outcome, command))
    return outcome


def _trained(
    student: Student, task: Task, plan: Plan, length: Length, phases: Phases, watch: Watcher
) -> tuple[PreTrainedModel, Course, Outcome]:
    """The model with what it has learned in its own weights, float32, and how that went."""
    for option, asked in (
        ("--train refit-lora", plan.train == "refit-lora"),
        (f"--hidden {plan.hidden:g}", plan.hidden),
    ):
        if asked and student.refitter is None:
            raise ConfigError(
                f"{option} needs the dense model and what was kept of it, which a run or its export tells: leave it out."
            )
    work = _work(task)
    plan = replace(plan, batch=plan.batch or (BATCH if student.device == "cpu" else DEVICE_BATCH))
    check_batch(plan.batch)
    check_disk(task.out, 4 * student.model.num_parameters() + checkpoint_bytes(student.model, plan))
    start, text = time.perf_counter(), task.text or student.text_for(plan)
    windows = windows_for(student, text, task.window, plan, task.heldout, work, length, phases)
    course = course_for(student, windows, plan, length, work, phases, spent=time.perf_counter() - start)
    plan = course.plan
    before = quality(student.model, windows.heldout, course.dense)
    check_finite(task.source, "float32", before.loss)
    exams = [Exam.of(file, student.model, student.tokenizer) for file in task.items]
    first = _taken(exams, student.model, phases)

    def examine(model: PreTrainedModel) -> dict[str, float]:
        return {exam.name: exam.taken_by(model)["acc"] for exam in exams}

    lesson = replace(course.lesson, examine=examine, examined=task.items_every)
    with phases.phase("training", plan.steps) as advance:
        trained, progress = train(student.model, lesson, plan, work, advance, watch, phases.note)
    after = quality(trained, windows.heldout, course.dense)
    scores = zip(task.items, first, _taken(exams, trained, phases), strict=True)
    items = (
        ItemsJudged(
            **items_part(file).model_dump(),
            before=one,
            after=two,
            # a stopped training may have been asked for other items
            between=[(step, found[file.name]) for step, found in progress.scores if file.name in found],
        )
        for file, one, two in scores
    )
    tokens = progress.best[0] * plan.batch * task.window
    return trained, course, Outcome(before, after, tokens, plan, progress, tuple(items))


def _taken(exams: Sequence[Exam], model: PreTrainedModel, phases: Phases) -> list[dict[str, float]]:
    """A model's scores in each exam."""
    if not exams:
        return []
    with phases.phase("items"):
        return [exam.taken_by(model) for exam in exams]


def _dtype(task: Task, loaded: Checkpoint) -> str:
    """Of the matrix products."""
    former = settled_dtype(_work(task)) if task.compute_dtype == "auto" else ""
    return former or choose_dtype(task.compute_dtype, loaded.device, loaded.model.config.get_text_config())


def _saved_dtype(source: str) -> torch.dtype:
    found = find_checkpoint(source).config.dtype
    return found if isinstance(found, torch.dtype) else torch.float32


def _teacher(name: str, task: Task, small: Checkpoint, dtype: str) -> PreTrainedModel:
    teacher = load_checkpoint(name, dtype, task.device).model
    if teacher.config.vocab_size != small.model.config.vocab_size:
        raise ModelError(
            f"'{name}' cannot teach '{task.source}': it knows {teacher.config.vocab_size} tokens, "
            f"not {small.model.config.vocab_size}."
        )
    return teacher.requires_grad_(False)


def _alike(small: PreTrainedModel, dense: PreTrainedModel) -> bool:
    """Whether what is left has the dense model's names: a refit looks for it there. Of a Phi-3 that was written for vLLM it has not."""
    own, whole = ({name for name, _ in model.named_parameters()} for model in (small, dense))
    return own <= whole


def _base_model(details: dict[str, Any]) -> str:
    """Where the dense model is: its name, or the place it was loaded from."""
    base = details.get("base_model") or {}
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
    details: dict[str, Any],
    course: Course,
    told: tuple[dict[str, Any], str],
) -> None:
    recovery, section = told
    files = {"llmbo.json": json.dumps({**details, "recovery": recovery}, indent=2) + "\n"}
    card = Path(small.source) / "README.md"
    if card.is_file():
        former = card.read_text(encoding="utf-8").replace(f'"{task.source}"', f'"{task.out}"')  # where to load it from
        files["README.md"] = f"{former}\n{section}"
    with whole_folder(task.out, files) as folder:
        model.save_pretrained(folder)
        small.tokenizer.save_pretrained(folder)
        _read_back(folder, model, course)


def _read_back(folder: Path, model: PreTrainedModel, course: Course) -> None:
    again = load_checkpoint(str(folder), "float32", "cpu").model
    sample = course.windows.heldout[:1]
    nn.Module.to(model, "cpu")
    cast(model, torch.float32)  # as stored, then widened
    found, expected = quality(again, sample).loss, quality(model, sample).loss
    if not abs(found - expected) < 1e-3:
        raise ModelError(
            f"What was written measures {found:.4f} where {expected:.4f} was expected; it has been deleted."
        )
