"""What a user sees while a run works: a live bar on a terminal, plain lines elsewhere. Everything goes to stderr."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from llmbo.advisor.summary import AdvisorPart
from llmbo.objectives import Objective, ref_point, to_maximize
from llmbo.pareto import hypervolume
from llmbo.report import Report, front_of
from llmbo.types import Proposal, Trial

TRADE_OFF_SHARES = (0.8, 0.65, 0.5)


class Display:
    """Phases, then trials. Implements `types.Phases` and `types.Observer`.

    On a terminal it is one live line that rewrites itself, elsewhere one line for each phase and trial.
    """

    def __init__(self, console: Console, budget: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self.objectives: Sequence[Objective] = ()
        self._console = console
        self._budget = budget
        self._clock = clock
        self._live = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
            transient=True,
        )
        self._task = TaskID(0)  # of the phase that goes on; `phase` sets it before anything is reported

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = self._clock()
        if not self._live:
            self._console.print(f"{name} …", style="dim", highlight=False)
        task = self._task = self._progress.add_task(name, total=total, note="")
        try:
            yield lambda done: self._progress.update(task, completed=done)
        finally:
            self._progress.remove_task(task)
            self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start
            self._console.print(f"{name}: {self._clock() - start:.1f} s", style="dim", highlight=False)

    def on_proposing(self, round: int) -> None:
        self._progress.update(self._task, description="proposing")

    def on_trial_start(self, proposal: Proposal, number: int) -> None:
        self._progress.update(self._task, completed=number, description=f"trial {number} ({proposal.origin})")

    def on_trial_end(self, trial: Trial, trials: Sequence[Trial]) -> None:
        complete = [trial for trial in trials if trial.complete]
        volume = hypervolume(to_maximize([t.values for t in complete], self.objectives), ref_point(self.objectives))
        self._progress.update(
            self._task, completed=trial.number + 1, note=f"hypervolume {volume:.4f} · {self._trade_offs(trials)}"
        )
        if not self._live:
            measured = " ".join(f"{o.name} {trial.values[o.name]:.4g}" for o in self.objectives if trial.complete)
            result = measured or f"failed: {trial.failure}"
            self._console.print(
                f"trial {trial.number + 1}/{self._budget} {trial.origin}: {result} ({trial.seconds:.1f} s) hypervolume {volume:.4f}",
                highlight=False,
                soft_wrap=True,
            )

    def _trade_offs(self, trials: Sequence[Trial]) -> str:
        """The best quality so far below a few sizes."""
        quality = next(objective for objective in self.objectives if not objective.known)
        front = front_of(trials, self.objectives)
        notes = []
        for share in TRADE_OFF_SHARES:
            values = [trial.values[quality.name] for trial in front if trial.values["params_share"] <= share]
            if values:
                notes.append(f"≤{share:.0%}: {min(values):.2f}")
        return f"{quality.name} {' '.join(notes)}" if notes else ""


def summary(report: Report, rows: int = 12) -> Table:
    """The front as a short table: at most `rows` points, spread evenly over it."""
    counts = f"{len(report.front)} points from {len(report.trials)} trials"
    table = Table(title=f"Pareto front of {report.model.name}: {counts}, hypervolume {report.hypervolume.final:.4f}")
    for heading in ("trial", "params", "share", "kl", "loss", "perplexity", "held-out kl", "held-out loss"):
        table.add_column(heading, justify="right")
    count = len(report.front)
    shown = (
        sorted({round(index * (count - 1) / max(1, rows - 1)) for index in range(rows)})
        if count > rows
        else range(count)
    )
    for label, point in [*((str(report.front[i].trial), report.front[i]) for i in shown), ("dense", report.dense)]:
        values, heldout = point.objectives, point.heldout
        table.add_row(
            label,
            f"{values.params / 1e6:.1f}M",
            f"{values.params_share:.1%}",
            f"{values.kl:.3f}",
            f"{values.loss:.3f}",
            f"{values.perplexity:.1f}",
            f"{heldout.kl:.3f}" if heldout else "-",
            f"{heldout.loss:.3f}" if heldout else "-",
        )
    return table


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
