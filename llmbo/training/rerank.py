"""Does training change which models of a front are good? Some of its points are recovered alike and compared again."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.config.numbers import MOST, Within
from llmbo.deploy.disk import check_disk
from llmbo.errors import ConfigError, StorageError
from llmbo.files import replace_file
from llmbo.models.checks import check_tokens
from llmbo.problem.texts import judged_by, searched
from llmbo.report.files import find_run
from llmbo.report.schema import Report, TrialPart
from llmbo.run.rebuild import RebuildInputs, config_of, find_trial, load_base, read_run
from llmbo.search.pareto import pareto_front
from llmbo.training.checkpoints import checkpoint_bytes
from llmbo.training.plan import Plan, Progress
from llmbo.training.processes import check_alone
from llmbo.training.recovery import HELDOUT
from llmbo.training.teacher import Live, NextTokens
from llmbo.training.trainer import Lesson, train
from llmbo.types import Phases
from pruning.calibration import TokenWindows, unseen_windows
from pruning.export.rebuild import cast
from pruning.likelihood import DenseDistribution, dense_distribution, quality
from pruning.text import read_mix

FILE = "rerank.json"
RUNGS = (1, 2, 4)  # quarters of a training behind which halving looks
Values = Mapping[str, float]  # `loss` and `kl` in nats per token


@dataclass(frozen=True)
class Point:
    """A trial before and after the same short training, measured on windows that neither saw.

    Args:
        step: Of the weights that validated best; 0 are the untrained ones.
        rungs: With halving, what was measured after each part of the training, the last of them `after`.
        fault: Why its training stopped before its time; empty if it did not.
    """

    trial: int
    params: int
    before: Values
    after: Values
    step: int
    rungs: tuple[Values, ...] = ()
    fault: str = ""


@dataclass(frozen=True)
class Orders:
    """Trials, best first, before and after training, and how alike the orders are: Kendall's tau, -1 to 1.

    None where fewer than two trials can be ordered, or all are equal.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    tau: float | None

    @classmethod
    def of(cls, before: Mapping[int, float], after: Mapping[int, float]) -> "Orders":
        """Both sorted by the given numbers, lower is better."""
        trials = list(before)
        tau = (
            kendalltau([before[t] for t in trials], [after[t] for t in trials]).statistic if len(trials) > 1 else np.nan
        )
        first, last = (tuple(sorted(trials, key=values.__getitem__)) for values in (before, after))
        return cls(first, last, None if np.isnan(tau) else float(tau))


@dataclass(frozen=True)
class Reranking:
    """Recovered points, smallest first. Not compared are those that were trained for a part of the time alone: halving has `left` them
    behind, or their training `failed`."""

    points: tuple[Point, ...]
    left: tuple[Point, ...] = ()
    failed: tuple[Point, ...] = ()

    @property
    def orders(self) -> dict[str, Orders]:
        """By `loss`, by `kl`, and at `equal_size`: by `excess`, what a trial loses to its neighbours."""
        return {
            **{
                name: Orders.of(*(self._named(name, values) for values in (self.before, self.after)))
                for name in ("loss", "kl")
            },
            "equal_size": Orders.of(self.excess(self.before), self.excess(self.after)),
        }

    def excess(self, values: Sequence[Values]) -> dict[int, float]:
        """Loss above the straight line between the next smaller and the next larger point, by trial; below 0 is better.

        The smallest and the largest point have only one neighbour and no number.
        """
        sizes, losses = np.array([p.params for p in self.points]), np.array([value["loss"] for value in values])
        found = {}
        for index in range(1, len(sizes) - 1):
            others = np.delete(np.arange(len(sizes)), index)
            found[self.points[index].trial] = float(
                losses[index] - np.interp(sizes[index], sizes[others], losses[others])
            )
        return found

    def front(self, values: Sequence[Values]) -> list[int]:
        """Trials that no other one beats in both size and loss."""
        worth = torch.tensor(
            [[-p.params, -v["loss"]] for p, v in zip(self.points, values, strict=True)], dtype=torch.float64
        )
        return [self.points[index].trial for index in pareto_front(worth)] if self.points else []

    @property
    def before(self) -> list[Values]:
        return [point.before for point in self.points]

    @property
    def after(self) -> list[Values]:
        return [point.after for point in self.points]

    def to_dict(self) -> dict[str, Any]:
        """For `rerank.json`."""
        return {
            "points": [asdict(point) for point in self.points],
            "left": [asdict(point) for point in self.left],
            "failed": [asdict(point) for point in self.failed],
            "orders": {name: asdict(order) for name, order in self.orders.items()},
            "excess": {"before": self.excess(self.before), "after": self.excess(self.after)},
            "front": {"before": self.front(self.before), "after": self.front(self.after)},
        }

    def _named(self, name: str, values: Sequence[Values]) -> dict[int, float]:
        return {point.trial: value[name] for point, value in zip(self.points, values, strict=True)}


def rerank(
    run: str,
    top: int,
    plan: Plan,
    text: str,
    heldout: int,
    phases: Phases,
    model: str | None = None,
    device: str | None = None,
    on_validation: Callable[[Progress], None] = lambda progress: None,
    halving: bool = False,
) -> Reranking:
    """Recover `top` points of the run's front, evenly over its sizes; every one is in the run's `rerank.json` before the next.

    All are trained on the same batches in the same order. Points that are there from an earlier call are not trained again,
    and an interrupted training goes on from its last validation.

    Args:
        plan: Its seed is replaced by the run's, so that neither pruning nor training saw the windows that are compared.
        text: Empty takes the run's.
        heldout: Windows each for validation and for the comparison.
        model, device: As in `load_base`.
        halving: Train all for a quarter of the steps, the better half at equal size for the next, and the better half of these to the end
            (successive halving, arXiv:1502.07943).

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    check_alone("rerank")
    Within(2, MOST).check("--top", top, whole=True)  # orders are compared
    HELDOUT.check("--heldout", heldout, whole=True)
    report, folder = read_run(run), find_run(run)
    config = config_of(report)
    chosen = spread(report, top)
    plan = replace(plan, seed=config.seed, every=-(-plan.steps // RUNGS[-1]) if halving else plan.every)
    text = text or config.text
    if text == "self":
        raise ConfigError("The run's text is 'self', of which there is no more: give --text.")
    settings = {"text": text, "window": config.window, "heldout": heldout, "plan": asdict(plan)}
    settings["not_trained_on"] = "judged windows"  # what was compared before that was so does not mix with what comes
    rungs = RUNGS if halving else ()
    if halving:
        settings |= {"halving": [trial.number for trial in chosen]}  # who leaves depends on all
    done = _stored(folder / FILE, settings)
    if _pending(chosen, done, rungs):
        loaded, windows = load_base(report, folder, phases, model, device)
        data, elsewhere = report.data.model_dump(), report.elsewhere.model_dump() if report.elsewhere else None
        past = searched(config, data), config.chat, judged_by(config, data, elsewhere)
        held = unseen_windows(read_mix(text), loaded.tokenizer, config.window, plan.seed, heldout, plan.batch, *past)
        check_tokens(loaded.model, loaded.tokenizer, held.calibration, held.proxy, held.heldout)
        inputs = RebuildInputs.of(report, folder, loaded, windows, phases)
        loaded.model.requires_grad_(False)
        dense = dense_distribution(loaded.model, held.heldout)
    while pending := _pending(chosen, done, rungs):
        trial, former = pending[0], done.get(pending[0].number)
        work = folder / "rerank" / f"trial-{trial.number}"
        small = inputs.cut(trial, phases).model
        rung = len(former.rungs) if former else 0
        until = rungs[rung] * plan.every if rungs else plan.steps
        with phases.phase(f"trial {trial.number}", plan.steps) as advance:
            check_disk(work, checkpoint_bytes(small, plan))
            cast(small, torch.float32)  # small steps vanish in bfloat16
            before = former.before if former else _values(small, held.heldout, dense)
            trained, progress = _train(small, inputs, held, plan, work, advance, on_validation, phases.note, until)
            after, fault = _values(trained, held.heldout, dense), progress.fault.partition(";")[0]
        assert trial.objectives is not None  # points of the front are finished
        measured = former.rungs if former else ()
        if rungs and not fault:
            measured = *measured, after
        params, step = trial.objectives.params, progress.best[0]
        done[trial.number] = Point(trial.number, params, before, after, step, measured, fault)
        _store(folder / FILE, settings, done, rungs)
        if not rungs or not _pending(chosen, done, rungs):
            shutil.rmtree(folder / "rerank", ignore_errors=True)
        del small, trained
    return _sorted((done[trial.number] for trial in chosen), rungs)


def _pending(chosen: Sequence[TrialPart], done: Mapping[int, Point], rungs: Sequence[int]) -> list[TrialPart]:
    """Trials whose turn it is: that are not done; with halving, of those that are still in, that lack the least rung. A training that
    failed is not tried again."""

    def lacks(trial: TrialPart, rung: int) -> bool:
        point = done.get(trial.number)
        return point is None or (not point.fault and len(point.rungs) <= rung < len(rungs))

    alive = list(chosen)
    for rung in range(max(1, len(rungs))):
        missing = [trial for trial in alive if lacks(trial, rung)]
        if missing or not rungs:
            return missing
        alive = [trial for trial in alive if len(done[trial.number].rungs) > rung]
        better = survivors([done[trial.number] for trial in alive], rung)
        alive = [trial for trial in alive if trial.number in better]
    return []


def survivors(points: Sequence[Point], rung: int) -> set[int]:
    """Trials of the better half at equal size after a part of the training; the smallest and the largest, which tell what is
    better, stay. Some may have failed since."""
    found = Reranking(_by_size(points))
    excess = found.excess([point.rungs[rung] for point in found.points])
    better = sorted(excess, key=lambda trial: (excess[trial], trial))[: -(-len(excess) // 2)]
    return {*better, *(point.trial for point in (*found.points[:1], *found.points[-1:]))}


def spread(report: Report, top: int) -> list[TrialPart]:
    """`top` points of the front (or all, if it has no more), the smallest and the largest among them.

    Raises:
        ConfigError: A front without two.
    """
    points = [point.trial for point in report.front if point.trial is not None]
    if len(points) < 2:
        raise ConfigError(
            f"The front of the run '{report.run.name}' has {len(points)} points: two are needed to compare."
        )
    places = np.linspace(0, len(points) - 1, min(top, len(points))).round().astype(int)
    return [find_trial(report, points[place]) for place in places]


def _train(
    small: PreTrainedModel,
    inputs: RebuildInputs,
    held: TokenWindows,
    plan: Plan,
    work: Path,
    advance: Callable[[int], None],
    on_validation: Callable[[Progress], None],
    tell: Callable[[str], None],
    until: int,
) -> tuple[PreTrainedModel, Progress]:
    loaded = inputs.loaded
    teacher = Live(loaded.model) if plan.distil else NextTokens()
    dtype = "float32" if loaded.dtype == "float16" else loaded.dtype
    lesson = Lesson(held.calibration, held.proxy, teacher, device=loaded.device, dtype=dtype)
    return train(small, lesson, plan, work, advance, on_validation, tell, until=until)


def _values(model: PreTrainedModel, windows: Tensor, dense: DenseDistribution) -> Values:
    measured = quality(model, windows, dense)
    assert measured.kl is not None
    return {"loss": measured.loss, "kl": measured.kl}


def _by_size(points: Iterable[Point]) -> tuple[Point, ...]:
    return tuple(sorted(points, key=lambda point: (point.params, point.trial)))


def _sorted(points: Iterable[Point], rungs: Sequence[int]) -> Reranking:
    every = _by_size(points)
    failed = tuple(point for point in every if point.fault)
    whole = tuple(point for point in every if not point.fault and len(point.rungs) == len(rungs))
    return Reranking(whole, tuple(point for point in every if point not in (*failed, *whole)), failed)


def _stored(file: Path, settings: Mapping[str, Any]) -> dict[int, Point]:
    """Points that an earlier call with the same settings has finished, by trial."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        entries = [*found["points"], *found.get("left", ()), *found.get("failed", ())]
        points = {int(e["trial"]): Point(**e | {"rungs": tuple(e.get("rungs", ()))}) for e in entries}
        same = found["settings"] == settings
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"'{file}' is damaged or of another version of llmbo: delete it and run again.") from error
    if not same:
        raise StorageError(
            f"'{file}' holds a comparison with other settings: delete it or move it away, then run again."
        )
    return points


def _store(file: Path, settings: Mapping[str, Any], points: Mapping[int, Point], rungs: Sequence[int]) -> None:
    content = {"settings": settings, **_sorted(points.values(), rungs).to_dict()}
    replace_file(file, json.dumps(content, indent=2) + "\n")
