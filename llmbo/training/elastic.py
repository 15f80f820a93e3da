"""Train one adapter for all sub-networks of a model: what is searched afterwards has learned to be narrow.

Every step is a sandwich (Yu et al., arXiv:1903.05134): the smallest member of the allocation path, one member of a random size, and every
`WHOLE`-th step the dense model learn the dense model's distributions. Output projections are left out: at the members' widths they are
refits, which a search fits anew to the adapted model.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.config import RunConfig
from llmbo.config.numbers import MOST, Within, check_numbers
from llmbo.deploy.disk import check_disk
from llmbo.errors import ConfigError
from llmbo.models.adapter import Adapter, fingerprints
from llmbo.models.checks import check_finite
from llmbo.models.loading import load_checkpoint, load_model
from llmbo.models.placement import check_dtype, choose_device, choose_dtype
from llmbo.problem.kept import digest
from llmbo.problem.preparation import Problem, fitted, prepared
from llmbo.problem.texts import load_windows
from llmbo.run.tokens import settled
from llmbo.training.checkpoints import checkpoint_bytes
from llmbo.training.learner import LORA_ALPHA, Learner, recompute
from llmbo.training.lessons import Student, course_for, settled_dtype, windows_for
from llmbo.training.plan import BATCH, DEVICE_BATCH, Length, Plan, Progress
from llmbo.training.processes import check_alone
from llmbo.training.recovery import HELDOUT, Watcher
from llmbo.training.trainer import Lesson, train
from llmbo.types import Phases
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import SPLITS, TokenWindows, apportioned, cut_windows, unseen_windows
from pruning.elastic import adapt, merge, take_out
from pruning.export.folder import check_out, whole_folder
from pruning.likelihood import DenseDistribution, Quality
from pruning.projection import Projection
from pruning.supernet import Supernet
from pruning.text import read_mix

WHOLE = 4  # steps from one with the dense model to the next
JUDGED = (0.0, 0.5, 1.0)  # members that validate, as parts of the way from the smallest to the dense model
LEFT = 0.5  # of the text, to searches

Draw = Callable[[Problem, torch.Generator], tuple[int, ...]]  # the levels of the member between a sandwich's outer ones


@dataclass(frozen=True)
class Task:
    """What to train an adapter for, on which text.

    Args:
        out: Folder to make.
        text: As for `RunConfig`. Half of its windows are left alone, for the searches that come after.
        window: Tokens per window.
        heldout: Windows each for validation and for the comparison at the end.
        min_share, neuron_step, calibration_tokens, seed: As for the searches that come after.
        dtype: Of the matrix products while training; "auto" takes the faster one here.
    """

    model: str
    out: Path
    text: str = "builtin"
    window: Annotated[int, Within(8, MOST)] = 256
    heldout: Annotated[int, HELDOUT] = 12
    min_share: float = RunConfig.min_share
    neuron_step: int = 0
    calibration_tokens: int = 0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        check_numbers(self)
        check_dtype(self.dtype)
        if self.dtype == "float16":
            raise ConfigError("--dtype float16 loses small gradients: take bfloat16 or float32.")

    @property
    def config(self) -> RunConfig:
        """Of the search that the members are from."""
        few = self.window * (
            self.heldout if self.text.startswith("mix:") else 1
        )  # every text of a mix has windows in each split
        return RunConfig(
            self.model, text=self.text, window=self.window, min_share=self.min_share, neuron_step=self.neuron_step,
            calibration_tokens=self.calibration_tokens, proxy_tokens=few, heldout_tokens=few, seed=self.seed,
            dtype="float32", device=choose_device(self.device), heldout_text="none", offload="none", refit_anchors=0,
        )  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A member of the path, before and after, on windows that nothing has seen; refits are those of the model of the time."""

    share: float
    before: Quality
    after: Quality


@dataclass(frozen=True)
class Outcome:
    """The members are those that validated. `tokens`: of the text, until the best step; each passed two members or three."""

    members: tuple[Member, ...]
    tokens: int
    plan: Plan
    progress: Progress


def on_path(problem: Problem, generator: torch.Generator) -> tuple[int, ...]:
    """A member of the allocation path. Sizes are uniform in share, as parameter-calibrated sampling has them (arXiv:2410.06479)."""
    return problem.family.part_way(float(torch.rand((), generator=generator, dtype=torch.float64)))


@dataclass(frozen=True)
class Sandwich(Lesson):
    """A lesson for the members of an open problem's path, the dense model among them.

    Args:
        seed: Of the members that are drawn.
        draw: Takes an open problem and a generator.
        made: Takes what was merged, by name of the projection.
    """

    problem: Problem | None = None
    seed: int = 0
    draw: Draw = on_path
    made: dict[str, tuple[Tensor, Tensor]] | None = None

    @property
    def _open(self) -> Problem:
        assert self.problem is not None  # a default, only because those before it have some
        return self.problem

    def learner(self, model: PreTrainedModel, plan: Plan) -> Learner:
        """Changes of the blocks' inputs, and norms, learn."""
        model.requires_grad_(False)
        learning = adapt(self._open.supernet, plan.rank, LORA_ALPHA, plan.seed)
        learning += _norms(model).values()
        if plan.recompute:
            recompute(model)
        own = {id(parameter.requires_grad_(True)) for parameter in learning}
        trained = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}
        return Learner(model, trained, {}, partial(self._merged, model))

    def _merged(self, model: PreTrainedModel) -> PreTrainedModel:
        assert self.made is not None
        self.made.update(merge(self._open.supernet))
        return model.requires_grad_(False)

    def forms(self, step: int) -> Sequence[Callable[[], AbstractContextManager[object]]]:
        """The smallest member, one that is drawn, and in turns the dense model."""
        family, generator = self._open.family, torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        members = [family.part_way(0), self.draw(self._open, generator)]
        if step % WHOLE == 0:
            members.append(self._open.space.max_levels)
        return [partial(self._open.supernet.active, self._open.space.decode(x)) for x in members]

    def judge(self, model: PreTrainedModel) -> float:
        """Mean KL over some members."""
        assert self.dense is not None
        return sum(found.kl or 0.0 for found in self.qualities(self.validation, self.dense)) / len(JUDGED)

    def qualities(self, windows: Tensor, dense: DenseDistribution) -> list[Quality]:
        """Of the members that validate."""
        with self.autocast():
            return [self._open.supernet.quality(a, windows, dense) for a in self.judged]

    @property
    def judged(self) -> list[Architecture]:
        """The members that validate, smallest first."""
        return [self._open.space.decode(self._open.family.part_way(part)) for part in JUDGED]


def train_elastic(
    task: Task,
    plan: Plan,
    length: Length,
    command: str,
    phases: Phases,
    watch: Watcher = lambda progress: None,
    draw: Draw = on_path,
) -> Outcome:
    """Train an adapter and write it. An interrupted training goes on from `OUT.training`, which is removed at the end.

    Args:
        plan: Zeros follow from `length` and the device.
        draw: As for `Sandwich`. An interrupted training goes on with the same one.

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    check_alone("elastic")
    check_out(task.out)
    work = task.out.with_name(task.out.name + ".training")
    config = task.config
    with phases.phase("model"):
        loaded = load_model(task.model, "float32", config.device)
        former = settled_dtype(work) if task.dtype == "auto" else ""
        dtype = former or choose_dtype(task.dtype, loaded.device, loaded.model.config.get_text_config())
        config = settled(config, anatomy_of(loaded.model), "float32", loaded.device)
        plan = replace(plan, batch=plan.batch or (BATCH if loaded.device == "cpu" else DEVICE_BATCH), distil=True)
        base = {"name": loaded.name, "source": loaded.source, "fingerprints": fingerprints(loaded.model)}
        before = {name: norm.clone() for name, norm in _norms(loaded.model).items()}
        teacher = load_checkpoint(task.model, dtype, loaded.device).model.requires_grad_(False)
    student = Student(loaded.model, loaded.tokenizer, loaded.device, dtype, teacher, text=task.text)
    del teacher
    with phases.phase("text"):
        check_disk(task.out, checkpoint_bytes(loaded.model, plan))
        run_windows = load_windows(config, loaded, phases=phases)
        start = time.perf_counter()
        windows, reserved = dealt_windows(student, config, plan, task.heldout, work, length, phases)
        spent = time.perf_counter() - start
    made: dict[str, tuple[Tensor, Tensor]] = {}
    with prepared(config, loaded, run_windows, phases) as problem:
        family = problem.family
        about = {"members": digest(family.path.int().tolist()), "heldout": digest(windows.proxy.tolist())}
        lesson_of = partial(Sandwich, problem=problem, seed=task.seed, draw=draw, made=made)
        try:
            course = course_for(
                student, windows, plan, length, work, phases, lesson_of=lesson_of, about=about, spent=spent
            )
            lesson, plan, dense = course.lesson, course.plan, course.dense
            assert isinstance(lesson, Sandwich) and dense is not None
            first = lesson.qualities(windows.heldout, dense)
            check_finite(task.model, "float32", *(found.loss for found in first))
            with phases.phase("training", plan.steps) as advance:
                trained, progress = train(loaded.model, lesson, plan, work, advance, watch, phases.note)
        finally:
            take_out(problem.supernet)
        shares = [
            float(problem.space.share(torch.tensor([problem.space.encode(a)], dtype=torch.float64)))
            for a in lesson.judged
        ]
        judged = lesson.judged
    with phases.phase("refits of the adapted model"):
        found, _ = fitted(replace(loaded, model=trained), run_windows.calibration, problem.space, tell=phases.note)
    with Supernet(trained, found.ranking, found.refits) as supernet:
        last = [supernet.quality(member, windows.heldout, dense) for member in judged]
    members = tuple(map(Member, shares, first, last))
    outcome = Outcome(members, progress.best[0] * plan.batch * task.window, plan, progress)
    norms = {name: norm for name, norm in _norms(trained).items() if not torch.equal(norm, before[name])}
    told = {"base_model": base, "text": _text(windows, task, reserved), **_told(outcome, course.lesson, command)}
    with phases.phase("writing"), whole_folder(task.out, {}) as folder:
        Adapter(task.out, made, norms, LORA_ALPHA, told).save(folder)
        Adapter.read(str(folder))
    shutil.rmtree(work, ignore_errors=True)
    return outcome


def _norms(model: PreTrainedModel) -> dict[str, torch.nn.Parameter]:
    """Weights and biases of norms: of modules, none of them a projection, that own nothing but vectors."""
    return {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if not isinstance(module, Projection) and all(p.ndim == 1 for p in module.parameters(recurse=False))
        for own, parameter in module.named_parameters(recurse=False)
    }


def dealt_windows(
    student: Student, config: RunConfig, plan: Plan, heldout: int, work: Path, length: Length, phases: Phases
) -> tuple[TokenWindows, dict[str, int]]:
    """To train on, to validate by and to compare on; and how many windows of each text are left to searches."""
    if config.text == "self":
        return windows_for(student, "self", config.window, plan, heldout, work, length, phases), {}
    text, tokenizer = read_mix(config.text), student.tokenizer
    everything = unseen_windows(text, tokenizer, config.window, config.seed, heldout, plan.batch)
    whole = len(everything.calibration) + 2 * heldout
    kept = max(round(LEFT * whole), sum(config.windows.values()))
    counts = kept, heldout, max(plan.batch, whole - kept - 2 * heldout - len(everything.sources)) + heldout
    dealt = cut_windows(text, tokenizer, dict(zip(SPLITS, counts, strict=True)), config.window, config.seed)
    shares = {source.sha256: source.share for source in dealt.sources} or {dealt.sha256: 1.0}
    reserved = dict(zip(shares, apportioned(kept, list(shares.values())), strict=True))
    return replace(dealt, calibration=dealt.heldout[heldout:], heldout=dealt.heldout[:heldout]), reserved


def _text(windows: TokenWindows, task: Task, reserved: dict[str, int]) -> dict[str, Any]:
    return {
        "source": windows.source,
        "sha256": windows.sha256,
        "window": task.window,
        "seed": task.seed,
        "reserved": reserved,
    }


def _told(outcome: Outcome, lesson: Lesson, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "plan": asdict(outcome.plan),
        "dtype": lesson.dtype,
        "members": [asdict(member) for member in outcome.members],
        "best_step": outcome.progress.best[0],
        "tokens": outcome.tokens,
        "validation": outcome.progress.history,
        "fault": outcome.progress.fault,
    }
