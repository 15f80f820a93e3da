"""What a model that was pruned will learn from: windows, the dense model's predictions, and as many steps as there is time for."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config import RunConfig
from llmbo.errors import StorageError, first_line
from llmbo.files import replace_file
from llmbo.models.checks import check_tokens
from llmbo.models.loading import fingerprint
from llmbo.problem.texts import judged_by, searched
from llmbo.training.learner import REFIT_TOKENS, Refitter
from llmbo.training.plan import PASSES, REFITS, VALIDATIONS, Length, Plan
from llmbo.training.processes import agreed, in_turn, place
from llmbo.training.teacher import TOP_K, Kept, Live, NextTokens, Streams, kept_bytes
from llmbo.training.trainer import Lesson, batch_of, epoch_order, gradients
from llmbo.types import WRITING, Phases
from pruning.architecture import Architecture
from pruning.calibration import Dealt, TokenWindows, unseen_windows
from pruning.likelihood import DenseDistribution, dense_distribution
from pruning.sampling import sample_windows, sampled_windows
from pruning.tensor_files import TensorFiles
from pruning.text import read_mix

ASKED = "asked.json"
TIMED = 2  # steps, behind one to warm up
SELF_TOKENS = 1 << 16  # sampled of the dense model to train on, at most; it writes them one by one
SELF_SHARE = 1 / 3  # of a training's minutes: on a CPU, what is written in them passes `PASSES` times in the rest
SELF_SEED = 1 << 40  # apart from those of runs, so that nothing is sampled that a search has seen


@dataclass
class Student:
    """A model to train, and what is known of where it comes from.

    Args:
        model: In float32.
        dense: That it was cut from, in the dtype of the products; None where neither distillation nor refits ask for it.
        architecture: What was kept of `dense`, where that is known.
        seen: Windows that the search took of its text.
        judged: Windows of any text that the search's front was judged by.
        chat: Whether texts are put through the chat template.
        text: Of the search; the default of searches where there was none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: str
    dtype: str
    dense: PreTrainedModel | None = None
    architecture: Architecture | None = None
    seen: tuple[Dealt, ...] = ()
    judged: tuple[Dealt, ...] = ()
    chat: bool = False
    text: str = RunConfig.text

    def searched_by(self, config: RunConfig, data: Mapping[str, Any], elsewhere: Mapping[str, Any] | None) -> None:
        """Take over what is known of its search; the latter two as for `judged_by`."""
        self.seen, self.judged = searched(config, data), judged_by(config, data, elsewhere)
        self.chat, self.text = config.chat, config.text

    def text_for(self, plan: Plan) -> str:
        """What to train on where nobody says: the search's text; where that was not chosen either, what the dense model writes, if it
        teaches."""
        chosen = self.text != RunConfig.text or self.chat
        return "self" if plan.distil and not chosen else self.text

    @property
    def refitter(self) -> Refitter | None:
        return Refitter.of(self.dense, self.architecture) if self.dense and self.architecture else None


@dataclass(frozen=True)
class Course:
    """A plan with all its steps, and what it is carried out on.

    Args:
        dense: What the dense model predicts on the held-out windows; None where it does not teach.
    """

    plan: Plan
    lesson: Lesson
    windows: TokenWindows
    dense: DenseDistribution | None


def windows_for(
    student: Student, text: str, window: int, plan: Plan, heldout: int, work: Path, length: Length, phases: Phases
) -> TokenWindows:
    """To train on (`calibration`), to validate by (`proxy`) and to compare on (`heldout`). The search has seen none of the latter, and
    was judged by none of them all.

    Args:
        text: As `read_mix` takes it, or `self`: sampled from the dense model, as many as the training will see, and kept in `work`.
    """
    if text == "self":
        _settled(work / ASKED, {"plan": asdict(plan), "length": asdict(length)})  # not only behind minutes of writing
        with in_turn():
            windows = _sampled(student, window, plan, heldout, TensorFiles(work), length, phases)
        windows = agreed(windows)  # should the disk have taken none of them
    else:
        with phases.phase("text"):
            mix, past = read_mix(text), (student.seen, student.chat, student.judged)
            windows = unseen_windows(mix, student.tokenizer, window, plan.seed, heldout, plan.batch, *past)
    check_tokens(student.model, student.tokenizer, windows.calibration, windows.proxy, windows.heldout)
    return windows


def _sampled(
    student: Student, window: int, plan: Plan, heldout: int, files: TensorFiles, length: Length, phases: Phases
) -> TokenWindows:
    dense = student.dense
    assert dense is not None  # whoever asks for its text has loaded it
    counts = {"calibration": _to_sample(student, window, plan, length), "proxy": heldout, "heldout": heldout}
    seed = plan.seed + SELF_SEED
    total, least = sum(counts.values()), 2 * heldout + plan.batch
    timed = length.known_steps(plan.batch * window) is None

    def sample() -> dict[str, Tensor]:
        start = time.perf_counter()

        def enough(windows: int) -> bool:
            return timed and windows >= least and time.perf_counter() - start > SELF_SHARE * length.seconds

        with phases.phase(WRITING, total * window) as advance:
            return sample_windows(dense, student.tokenizer, counts, window, seed, advance=advance, enough=enough).parts

    asked = json.dumps([counts, window, asdict(length) if timed else {}])
    name = f"self_{fingerprint(dense)}_{plan.seed}_{hashlib.sha256(asked.encode()).hexdigest()[:16]}"
    found = files.once(name, sample)
    return sampled_windows(found, seed)


def _to_sample(student: Student, window: int, plan: Plan, length: Length) -> int:
    """Windows to train on, at most, that the dense model is asked to write."""
    most, steps = SELF_TOKENS // window, length.known_steps(plan.batch * window)
    if steps:
        passes = PASSES if student.device == "cpu" and _may_be_kept(plan) else 1
        most = min(most, -(-steps * plan.batch // passes))
    return max(plan.batch, most)


def course_for(
    student: Student,
    windows: TokenWindows,
    plan: Plan,
    length: Length,
    work: Path,
    phases: Phases,
    kept: Path | None = None,
    lesson_of: Callable[..., Lesson] = Lesson,
    about: Mapping[str, Any] | None = None,
    spent: float = 0.0,
) -> Course:
    """Settle how many steps there will be, and have the dense model tell what it predicts.

    What was settled is kept in `work`, with what it was settled for: an interrupted training goes on with as many steps.

    Args:
        plan: 0 stands for steps and steps between validations that follow from `length`.
        kept: Where the dense model's predictions go; by default below `work`.
        about: What else a training must have been settled for.
        spent: Seconds of the minutes that are over.

    Raises:
        StorageError: `work` holds the training of another model, or one with other settings.
    """
    asked = {
        "plan": asdict(plan),
        "length": asdict(length),
        "model": fingerprint(student.model),
        "teacher": fingerprint(student.dense) if student.dense else "",
        "text": windows.sha256,
        "dtype": student.dtype,
        **(about or {}),
    }
    training, validation = windows.calibration, windows.proxy
    refitter = student.refitter if plan.train == "refit-lora" else None
    lesson = lesson_of(training, validation, refitter=refitter, device=student.device, dtype=student.dtype)
    heldout = None
    if plan.distil:
        assert student.dense is not None
        with lesson.autocast():
            dense, heldout = (dense_distribution(student.dense, part) for part in (validation, windows.heldout))
        streams = None
        if plan.hidden:
            cut = student.refitter
            assert cut is not None  # whoever asks for it knows what was kept
            streams = Streams.of(cut, plan.hidden)
        lesson = replace(lesson, dense=dense, teacher=Live(student.dense, streams))
    settled = agreed(_settled(work / ASKED, asked))
    if settled is None:
        steps = length.known_steps(plan.batch * windows.length) or 0
        if not steps:
            with phases.phase("timing"):
                steps = agreed(_affordable(student, lesson, plan, length, spent))
        work.mkdir(parents=True, exist_ok=True)
        settled = agreed((steps, _may_be_kept(plan) and _is_kept(student, lesson, steps * plan.batch, work)))
        if not place():
            replace_file(work / ASKED, json.dumps({"asked": asked, "settled": settled}))
    steps, is_kept = settled
    plan = replace(plan, steps=steps, every=plan.every or max(1, -(-steps // VALIDATIONS)))
    if is_kept:
        assert student.dense is not None
        if student.device == "cpu":
            training = training[: max(plan.batch, plan.steps * plan.batch // PASSES)]
            lesson = replace(lesson, training=training)
        order = epoch_order(len(training), plan.seed, 0)
        if plan.steps <= len(training) // plan.batch:
            order = order[: plan.steps * plan.batch]
        with phases.phase("dense model", len(order)) as advance, in_turn():
            name = f"{asked['teacher']} {student.dtype}"
            folder = kept or work / "teacher"
            teacher = Kept.of(student.dense, training, order, folder, name, lesson.autocast, advance)
        lesson = replace(lesson, teacher=teacher)
        if not lesson.refitter:
            student.dense = None  # nobody asks it again
    return Course(plan, lesson, windows, heldout)


def settled_dtype(work: Path) -> str:
    """In what an interrupted training computes: which dtype is faster may look different today. Empty if there was none."""
    try:
        return str(json.loads((work / ASKED).read_text(encoding="utf-8"))["asked"]["dtype"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _settled(file: Path, asked: Mapping[str, Any]) -> tuple[int, bool] | None:
    """Steps of an interrupted training, and whether the dense model's predictions are on the disk; None if there was none."""
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        other = [name for name, value in asked.items() if stored["asked"][name] != value]
        steps, kept = stored["settled"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"'{file}' is damaged ({first_line(error)}): delete '{file.parent}', then run again."
        ) from error
    if other:
        what = {"model": "the training of another model", "teacher": "what another dense model taught"}
        told = what.get(other[0], f"a recovery with other settings ({', '.join(other)})")
        raise StorageError(f"'{file.parent}' holds {told}: delete it, or choose another --out.")
    return steps, kept


def _may_be_kept(plan: Plan) -> bool:
    """Hidden states would take several times the disk of predictions."""
    return plan.distil and not plan.hidden


def _is_kept(student: Student, lesson: Lesson, trained: int, work: Path) -> bool:
    """Whether the dense model's predictions go to the disk: where windows come again, which it then reads but once, and on a CPU, which
    loses nothing by it and has the dense model's memory to gain; and where there is room.

    Args:
        trained: Windows in all steps.
    """
    assert student.dense is not None
    windows, window = lesson.training.shape
    vocabulary = student.dense.config.get_text_config().vocab_size
    needed = kept_bytes(min(trained, windows), window, vocabulary)
    again = trained > windows or student.device == "cpu"
    return again and needed < shutil.disk_usage(work).free // 2


def _affordable(student: Student, lesson: Lesson, plan: Plan, length: Length, spent: float) -> int:
    """Steps that the minutes leave room for, by the time that the first take here."""
    model, places = student.model, batch_of(len(lesson.training), plan, 0)
    kept = student.device == "cpu" and _may_be_kept(plan)
    trial = replace(lesson, teacher=NextTokens()) if kept else lesson
    learner = lesson.learner(model, plan)
    head = trial.head_of(model)
    step = _seconds(lambda: gradients(model, trial, head, places, plan.micro).item())
    model.zero_grad()
    judged = _seconds(lambda: lesson.judge(model))
    learner.merged()  # adapters that have learned nothing: the weights are what they were
    teacher = 0.0
    if kept:
        assert student.dense is not None
        batch, dense = lesson.training[places], student.dense

        def ask() -> object:
            with lesson.autocast():
                return dense_distribution(dense, batch, k=TOP_K)

        teacher = _seconds(ask) / plan.batch
    refits = REFITS * 3 * REFIT_TOKENS / lesson.validation.numel() if plan.train == "refit-lora" else 0.0
    apart = spent + judged * (VALIDATIONS + 1 + refits)
    return length.steps_of(step, teacher, len(lesson.training), plan.batch, apart)


def _seconds(work: Callable[[], object]) -> float:
    """Of one call, which ends by waiting for the device; the first warms up."""
    times = []
    for _ in range(1 + TIMED):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sum(times[1:]) / TIMED
