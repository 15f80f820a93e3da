"""What a recovery brought: for `llmbo.json`, as a section of the model card, and for the run's page."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmbo.report.recovered import HeldOut, ItemsJudged, Recovered
from llmbo.training.lessons import Course
from llmbo.training.plan import METHODS, Plan, Progress
from pruning.likelihood import Quality


@dataclass(frozen=True)
class Outcome:
    """What is held out, on windows that neither training nor the choice of the best step has seen; `kl` only where the dense model taught.

    Args:
        tokens: Trained on until the best step.
        items: Files that were asked for.
    """

    before: Quality
    after: Quality
    tokens: int
    plan: Plan
    progress: Progress
    items: tuple[ItemsJudged, ...] = ()

    @property
    def gain(self) -> float:
        """In loss, nats per token."""
        return self.before.loss - self.after.loss

    @property
    def scores(self) -> Iterator[tuple[str, str, str]]:
        """Of each file of items a name, and what was right before and after, with standard errors."""
        for file in self.items:
            before, after = (f"{each['acc']:.3f} ± {each['acc_stderr']:.3f}" for each in (file.before, file.after))
            yield f"{file.name}, acc of {file.count} items", before, after


def told(course: Course, outcome: Outcome, command: str) -> tuple[dict[str, Any], str]:
    """How it was made: for `llmbo.json`, and as a section of the model card."""
    windows, plan, progress = course.windows, course.plan, outcome.progress
    text = {
        "source": windows.source,
        "sha256": windows.sha256,
        "sources": [asdict(source) for source in windows.sources],
        "window": windows.length,
        "bos": windows.bos,
        "chat": windows.chat,
    }
    recovery: dict[str, Any] = {
        "command": command,
        "plan": asdict(plan),
        "text": text,
        "dtype": course.lesson.dtype,
        "heldout": {"before": asdict(outcome.before), "after": asdict(outcome.after)},
        "items": [file.model_dump() for file in outcome.items],
        "best_step": progress.best[0],
        "tokens": outcome.tokens,
        "validation": progress.history,
    }
    judged = "KL" if course.dense else "loss"
    lines = [
        "## Recovery",
        "",
        f"Trained on {outcome.tokens} tokens of {windows.source}, in windows of {windows.length} ({METHODS[plan.train][0]}; "
        f"{'distilled from the dense model' if plan.distil else 'next tokens'}; {progress.best[0]} steps of {plan.batch} windows, peak "
        f"rate {plan.peak:g}, warm-up and cosine, AdamW, products in {course.lesson.dtype}).",
        "",
        "| held-out | before | after |",
        "|---|---|---|",
        f"| loss, nats per token | {outcome.before.loss:.4f} | {outcome.after.loss:.4f} |",
    ]
    if outcome.before.kl is not None and outcome.after.kl is not None:
        lines.append(f"| KL from the dense model | {outcome.before.kl:.4f} | {outcome.after.kl:.4f} |")
    lines += [f"| {' | '.join(row)} |" for row in outcome.scores]
    lines += ["", f"Validation {judged} by step: " + ", ".join(f"{s}: {v:.4f}" for s, v in progress.history) + "."]
    lines += [
        f"{file.name}, acc by step: " + ", ".join(f"{s}: {v:.3f}" for s, v in file.between) + "."
        for file in outcome.items
        if file.between
    ]
    if progress.fault:
        recovery["fault"] = progress.fault
        lines += ["", f"Training stopped early: {progress.fault.split(';')[0]}."]
    return recovery, "\n".join([*lines, "", f"    {command}", ""])


def recovered(trial: int, folder: Path, course: Course, outcome: Outcome, command: str) -> Recovered:
    """For the page of the run that the trial is of."""
    plan, source = course.plan, course.windows.source
    what = f"{METHODS[plan.train][0]}, {'distilled on' if plan.distil else 'next tokens of'} {source}"
    before, after = (HeldOut(**asdict(found)) for found in (outcome.before, outcome.after))
    return Recovered(
        trial=trial, folder=str(folder), command=command, what=what, tokens=outcome.tokens, distilled=plan.distil,
        before=before, after=after, items=list(outcome.items), validation=outcome.progress.history,
    )  # fmt: skip
