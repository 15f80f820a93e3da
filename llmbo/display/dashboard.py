"""What a running search looks like in a terminal: a small front, the last trials, what is left. Fits any width and height.

A picture of stored trials and nothing else, so that the process that searches and `llmbo watch` draw the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from llmbo.display.console import decimals
from llmbo.display.team import Member, team_table
from llmbo.problem.objectives import Objective, outcomes, ref_point
from llmbo.report import front_of
from llmbo.search.gain import trial_gains
from llmbo.search.pareto import hypervolume
from llmbo.types import Trial

STYLES = ("blue", "yellow", "green", "magenta", "cyan", "red")
TRADE_OFF_SHARES = (0.8, 0.65, 0.5)
SIDE_BY_SIDE = 84  # columns from which the list of trials stands beside the front
SMALLEST_PLOT = (36, 14)  # columns and lines below which no front is drawn


@dataclass(frozen=True)
class Progress:
    """Stored trials and what follows from them, worked out once however often it is drawn.

    Args:
        dense: The dense model's values, empty while unknown.
    """

    trials: Sequence[Trial]
    objectives: Sequence[Objective]
    dense: Mapping[str, float]

    @cached_property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.complete]

    @cached_property
    def finished(self) -> int:
        return sum(trial.seconds is not None for trial in self.trials)

    @cached_property
    def on_front(self) -> set[int]:
        return {trial.number for trial in front_of(self.trials, self.objectives)}

    @cached_property
    def gains(self) -> dict[int, float]:
        return trial_gains(self.trials, self.quality, self.dense) if self.dense else {}

    @cached_property
    def styles(self) -> dict[str, str]:
        """A colour for each origin, in the order of their appearance."""
        origins = dict.fromkeys(trial.origin for trial in self.trials)
        return {origin: STYLES[index % len(STYLES)] for index, origin in enumerate(origins)}

    @cached_property
    def summary(self) -> str:
        return (
            f"hypervolume {decimals(volume(self.trials, self.objectives))}   {trade_offs(self.trials, self.objectives)}"
        )

    @property
    def size(self) -> Objective:
        return next(objective for objective in self.objectives if objective.known)

    @property
    def quality(self) -> Objective:
        return next(objective for objective in self.objectives if not objective.known)


@dataclass(frozen=True)
class Snapshot:
    """A search at one moment.

    Args:
        title: The run's name.
        doing: The phase, or what goes on inside it.
        budget: Trials in all, 0 while unknown.
        remaining: Seconds left as far as anybody can tell.
        note: What is wrong, if anything is.
        team: The processes that evaluate, where several do.
    """

    title: str
    doing: str
    budget: int
    progress: Progress
    elapsed: float
    remaining: float | None = None
    note: str = ""
    team: Sequence[Member] = ()


def volume(trials: Sequence[Trial], objectives: Sequence[Objective]) -> float:
    """Hypervolume of the complete trials."""
    return hypervolume(outcomes([trial for trial in trials if trial.complete], objectives), ref_point(objectives))


def trade_offs(trials: Sequence[Trial], objectives: Sequence[Objective]) -> str:
    """The best quality so far below a few sizes."""
    quality = next(objective for objective in objectives if not objective.known)
    best = max if quality.maximize else min
    notes = []
    for share in TRADE_OFF_SHARES:
        values = [t.values[quality.name] for t in trials if t.counts and t.values["params_share"] <= share]
        if values:
            notes.append(f"≤{share:.0%}: {best(values):.2f}")
    return f"{quality.name} {' '.join(notes)}" if notes else ""


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Dashboard:
    """A rich renderable: `console.print(Dashboard(snapshot))`."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shot, width, height = self._snapshot, options.max_width, options.max_height
        progress = shot.progress
        yield _heading(shot, width)
        if shot.note:
            yield Text(shot.note, "yellow", no_wrap=height < SMALLEST_PLOT[1], overflow="ellipsis")
            height -= len(Text(shot.note).wrap(console, width))
        if shot.budget:
            yield ProgressBar(total=shot.budget, completed=progress.finished, width=width)
            yield Segment.line()  # a bar does not end its line
        if shot.team:
            rows = min(len(shot.team), max(3, height // 4))
            yield team_table(shot.team, rows)
            height -= rows
        if not progress.complete or not progress.objectives or width < SMALLEST_PLOT[0] or height < SMALLEST_PLOT[1]:
            return
        lines = min(14, height - 6)
        if width >= SIDE_BY_SIDE:
            both = Table.grid(padding=(0, 2), expand=False)
            listed = _last_trials(progress, lines)
            both.add_row(FrontPlot(progress, lines, width - 44), listed)
            yield both
        else:
            yield FrontPlot(progress, min(lines, max(6, height - 10)), width)
            if height > 20:
                yield _last_trials(progress, 4)
        yield Text(progress.summary, no_wrap=True, overflow="ellipsis")


def _heading(shot: Snapshot, width: int) -> RenderableType:
    done = shot.progress.finished
    count = f"{done}/{shot.budget} trials" if shot.budget else f"{done} trials"
    left = f", about {clock(shot.remaining)} left" if shot.remaining is not None else ""
    words = Text.assemble(
        (shot.title, "bold"), " · ", count, " · ", (shot.doing, "cyan"), f" · {clock(shot.elapsed)}{left}"
    )
    words.truncate(width, overflow="ellipsis")
    return words


def _last_trials(progress: Progress, rows: int) -> RenderableType:
    """The newest trials last, with who proposed them and what they gain over the family at their size."""
    size, quality, gains = progress.size.name, progress.quality.name, progress.gains
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "left", "right", "right", "right"):
        table.add_column(justify=justify, no_wrap=True, overflow="ellipsis")
    table.add_row(*(Text(name, "dim") for name in ("trial", "origin", size.removeprefix("params_"), quality, "gain")))
    for trial in progress.trials[-max(1, rows - 1) :]:
        origin = Text(trial.origin, progress.styles[trial.origin])
        if not trial.complete:
            table.add_row(str(trial.number), origin, Text(trial.state.value, "dim"), "", "")
            continue
        mark = "*" if trial.number in progress.on_front else " "
        gain = f"{gains[trial.number]:+.3f}" if trial.number in gains else ""
        table.add_row(f"{trial.number}{mark}", origin, *(f"{trial.values[name]:.4g}" for name in (size, quality)), gain)
    return table


class FrontPlot:
    """Quality against size in characters: `●` on the front, `·` behind it, coloured by origin."""

    def __init__(self, progress: Progress, height: int, width: int) -> None:
        self._progress = progress
        self._height = max(5, height)
        self._width = width

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(self._width, self._width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        progress, margin = self._progress, 8
        columns, rows = max(10, min(self._width, options.max_width) - margin), self._height - 2
        front, behind = ("o", ".") if options.ascii_only else ("●", "·")
        on_front = progress.on_front
        (left, right), (low, high) = self._range(progress.size), self._range(progress.quality)
        grid = [[(" ", "")] * columns for _ in range(rows)]
        for trial in sorted(progress.complete, key=lambda trial: trial.number in on_front):  # the front on top
            column = _cell(trial.values[progress.size.name], left, right, columns)
            row = rows - 1 - _cell(trial.values[progress.quality.name], low, high, rows)
            mark = front if trial.number in on_front else behind
            grid[row][column] = (mark, progress.styles[trial.origin])
        bar = "|" if options.ascii_only else "│"
        labels = {0: f"{high:.3g}", rows - 1: f"{low:.3g}"}
        lines = [
            Text.assemble((f"{labels.get(index, ''):>{margin - 2}} {bar}", "dim"), *cells)
            for index, cells in enumerate(grid)
        ]
        names = f"{progress.size.name} ({progress.quality.name} upwards)"
        ends = f"{left:<8.4g}{names[: columns - 17]:^{max(0, columns - 16)}}{right:>8.4g}"
        yield Group(*lines, Text(" " * (margin - 1) + ends, "dim", no_wrap=True, overflow="crop"))

    def _range(self, axis: Objective) -> tuple[float, float]:
        """All that was measured, but nothing beyond the reference point while something is within it."""
        values = [trial.values[axis.name] for trial in self._progress.complete]
        low, high = min(values), max(values)
        if not axis.maximize and low < axis.reference < high:
            high = axis.reference
        if axis.maximize and low < axis.reference < high:
            low = axis.reference
        return low, high


def _cell(value: float, low: float, high: float, count: int) -> int:
    share = (value - low) / (high - low) if high > low else 0.0
    return round(min(1.0, max(0.0, share)) * (count - 1))
