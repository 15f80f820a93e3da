"""What was found, for a terminal: a trial in a line, a finished run in a table."""

from collections.abc import Sequence
from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmbo.advisor.parts import AdvisorPart
from llmbo.display.console import decimals
from llmbo.display.dashboard import volume
from llmbo.problem.objectives import Objective
from llmbo.report import Report
from llmbo.report.schema import FrontPoint
from llmbo.report.table import text_name
from llmbo.types import Trial


def trial_line(trial: Trial, trials: Sequence[Trial], objectives: Sequence[Objective], budget: int) -> str:
    """A finished trial in one line."""
    measured = " ".join(f"{o.name} {trial.values[o.name]:.4g}" for o in objectives if trial.complete)
    result = measured or f"failed: {trial.failure}"
    count = f"{trial.number + 1}/{budget}" if budget else f"{trial.number + 1}"
    seconds = f"{trial.seconds:.1f} s" if trial.seconds is not None else "?"
    return f"trial {count} {trial.origin}: {result} ({seconds}) hypervolume {decimals(volume(trials, objectives))}"


def result_table(title: str) -> Table:
    """An empty table that leaves most of a terminal's 80 columns to numbers."""
    return Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)


def summary(report: Report, rows: int = 12) -> Table:
    """The front as a short table: at most `rows` points, spread evenly over it."""
    counts = f"{len(report.front)} points from {len(report.trials)} trials"
    table = result_table(
        f"Pareto front of {report.model.name}: {counts}, hypervolume {decimals(report.hypervolume.final)}"
    )
    own, other = text_name(report.data.source), report.elsewhere and text_name(report.elsewhere.source)
    for heading in ("trial", "params", "share"):
        table.add_column(f"\n\n{heading}", justify="right")
    refitted = any(point.refitted for point in report.front)
    by = next((point.noise.by for point in report.front if point.noise), "")
    both = ("kl", "loss")
    far = [("held-out", other, ("kl",))] if other else []  # for all columns to fit; long names are folded
    for seen, text, names in (("", own, both), ("held-out", own, both), *far):
        for name in names:
            wide = 12 if (seen, text, name) == ("held-out", own, by) else len(seen) or 7
            table.add_column(f"{seen}\n{name}\n{text}", justify="right", overflow="fold", max_width=wide)
    if refitted:
        table.add_column(f"refitted\nheld-out kl\n{own}", justify="right", overflow="fold", max_width=11)
    items = [(file.name, "acc_norm" if file.kind == "multiple_choice" else "acc") for file in report.items]
    asked = items if report.dense.items else []
    for file, metric in asked:
        table.add_column(f"\n{metric}\n{file}", justify="right", overflow="fold", max_width=8)
    count = len(report.front)
    spread = sorted({round(index * (count - 1) / max(1, rows - 1)) for index in range(rows)})
    judged = [place for place, point in enumerate(report.front) if point.elsewhere]
    shown = range(count) if count <= rows else judged or spread
    points = [report.front[place] for place in shown]
    above = [None, *(point.trial for point in points)]
    for point, smaller in [*zip(points, above, strict=False), (report.dense, None)]:
        values = point.objectives
        table.add_row(
            _label(point, smaller),
            f"{values.params / 1e6:.1f}M",
            f"{values.params_share:.1%}",
            f"{values.kl:.3f}",
            f"{values.loss:.3f}",
            *(_judged(point, name) for name in both),
            *([f"{point.elsewhere.kl:.3f}" if point.elsewhere else "-"] if other else []),
            *([_refitted_kl(point)] if refitted else []),
            *(f"{getattr(point.items[file], metric):.3f}" if point.items else "-" for file, metric in asked),
        )
    if by:
        table.caption = _noise(report, by)
    return table


def _label(point: FrontPoint, smaller: int | None) -> str:
    """The trial's number, marked where it is not surely better than the `smaller` trial in the row above."""
    if point.trial is None:
        return "dense"
    return f"~{point.trial}" if point.noise and smaller in point.noise.not_better_than else str(point.trial)


def _judged(point: FrontPoint, name: str) -> str:
    """A held-out value, and how sure it is if points are told apart by it."""
    if not point.heldout:
        return "-"
    noise = point.noise if point.noise and point.noise.by == name else None
    return f"{getattr(point.heldout, name):.3f}" + (f" ±{getattr(noise, name):.3f}" if noise else "")


def _noise(report: Report, by: str) -> str:
    """What marks and ± mean, and how many points of the whole front stand in doubt."""
    pairs = [(point.noise, smaller.trial) for smaller, point in pairwise(report.front) if point.noise and smaller.noise]
    doubtful = sum(smaller in noise.not_better_than for noise, smaller in pairs)
    windows = next(point.noise.windows for point in report.front if point.noise)
    cost = " above the dense model's" if by == "loss" else ""
    return (
        f"± 95 % interval of {by}{cost} over {windows} held-out windows. ~ not surely better than the row above, compared "
        f"window by window: {doubtful} of {len(pairs)} neighbours on the whole front."
    )


def _refitted_kl(point: FrontPoint) -> str:
    return f"{point.refitted.heldout.kl:.3f}" if point.refitted and point.refitted.heldout else "-"


def advice_line(part: AdvisorPart) -> str:
    """What the advisor cost and brought, in a line."""
    hooks = part.hooks.values()
    calls, tokens = (
        sum(hook.calls for hook in hooks),
        sum(hook.prompt_tokens + hook.completion_tokens for hook in hooks),
    )
    costs = [hook.cost for hook in hooks]
    cost = "price unknown" if None in costs else f"${sum(cost for cost in costs if cost):.4f}"
    asked = f"{calls} calls, {tokens} tokens, {cost}, {sum(hook.seconds for hook in hooks):.1f} s; " if calls else ""
    advised = {origin: gain for origin, gain in part.hypervolume_by_origin.items() if origin.startswith("advisor:")}
    gained = ", ".join(f"{origin.removeprefix('advisor:')} {gain:.4f}" for origin, gain in advised.items()) or "nothing"
    stopped = f" Without advice for a time: {part.stopped}." if part.stopped else ""
    return f"Advisor {part.advisor}: {asked}hypervolume gained by {gained}.{stopped}"
