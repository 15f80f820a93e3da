"""What was found, for a terminal: a trial in a line, a finished run in a table."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from llmbo.advisor.parts import AdvisorPart
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
    return f"trial {count} {trial.origin}: {result} ({seconds}) hypervolume {volume(trials, objectives):.4f}"


def result_table(title: str) -> Table:
    """An empty table that leaves most of a terminal's 80 columns to numbers."""
    return Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)


def summary(report: Report, rows: int = 12) -> Table:
    """The front as a short table: at most `rows` points, spread evenly over it."""
    counts = f"{len(report.front)} points from {len(report.trials)} trials"
    table = result_table(f"Pareto front of {report.model.name}: {counts}, hypervolume {report.hypervolume.final:.4f}")
    own, other = text_name(report.data.source), report.elsewhere and text_name(report.elsewhere.source)
    for heading in ("trial", "params", "share"):
        table.add_column(f"\n\n{heading}", justify="right")
    refitted = any(point.refitted for point in report.front)
    both = ("kl", "loss")
    far = [("held-out", other, ("kl",))] if other else []  # for all columns to fit; long names are folded
    for seen, text, names in (("", own, both), ("held-out", own, both), *far):
        for name in names:
            table.add_column(f"{seen}\n{name}\n{text}", justify="right", overflow="fold", max_width=len(seen) or 7)
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
    for label, point in [*((str(report.front[i].trial), report.front[i]) for i in shown), ("dense", report.dense)]:
        values, heldout = point.objectives, point.heldout
        table.add_row(
            label,
            f"{values.params / 1e6:.1f}M",
            f"{values.params_share:.1%}",
            f"{values.kl:.3f}",
            f"{values.loss:.3f}",
            f"{heldout.kl:.3f}" if heldout else "-",
            f"{heldout.loss:.3f}" if heldout else "-",
            *([f"{point.elsewhere.kl:.3f}" if point.elsewhere else "-"] if other else []),
            *([_refitted_kl(point)] if refitted else []),
            *(f"{getattr(point.items[file], metric):.3f}" if point.items else "-" for file, metric in asked),
        )
    return table


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
