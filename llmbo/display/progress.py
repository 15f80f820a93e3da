"""What a user sees while a run works: a live picture on a terminal, plain lines elsewhere, JSON for machines, or nothing.

Everything goes to stderr; stdout is for results.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from rich.console import RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from llmbo.display.console import Console
from llmbo.display.dashboard import Dashboard, Snapshot, volume
from llmbo.display.dashboard import Progress as SearchProgress
from llmbo.display.notebook import NotebookLive, notebook_console
from llmbo.display.results import trial_line
from llmbo.errors import ConfigError, unknown
from llmbo.problem.objectives import Objective
from llmbo.types import Proposal, Trial

PICTURES_PER_SECOND = 4
SEARCH = "search"

Show = Literal["auto", "json", "nothing"]


class View(Protocol):
    """Shows what `Display` is told. `objectives` are set once they are known."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def phase_started(self, name: str, total: int | None) -> None: ...
    def phase_moved(self, done: int) -> None: ...
    def phase_ended(self, name: str, seconds: float) -> None: ...
    def noted(self, text: str) -> None: ...
    def proposing(self, round: int) -> None: ...
    def trial_started(self, number: int, origin: str) -> None: ...
    def trial_ended(self, trial: Trial, trials: Sequence[Trial], display: "Display") -> None: ...
    def warned(self, text: str) -> None: ...


class Display:
    """Phases, then trials. Implements `types.Phases` and `types.Observer`; keeps the seconds of each phase.

    Args:
        view: Where it is shown; by default a live picture on a terminal and plain lines elsewhere.
    """

    def __init__(
        self,
        console: Console,
        budget: int,
        clock: Callable[[], float] = time.perf_counter,
        view: View | None = None,
        title: str = "",
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.objectives: Sequence[Objective] = ()
        self.dense: Mapping[str, float] = {}
        self.budget = budget
        self.title = title
        self._clock = clock
        self._view = view or _suitable(console, self, clock)

    def __enter__(self) -> "Display":
        self._view.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._view.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = self._clock()
        self._view.phase_started(name, total)
        try:
            yield self._view.phase_moved
        finally:
            spent = self._clock() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
            self._view.phase_ended(name, spent)

    def note(self, text: str) -> None:
        self._view.noted(text)

    def on_proposing(self, round: int) -> None:
        self._view.proposing(round)

    def on_trial_start(self, proposal: Proposal, number: int) -> None:
        self._view.trial_started(number, proposal.origin)

    def on_trial_end(self, trial: Trial, trials: Sequence[Trial]) -> None:
        self._view.trial_ended(trial, trials, self)

    def warn(self, text: str) -> None:
        self._view.warned(text)


def _suitable(console: Console, display: Display, clock: Callable[[], float]) -> View:
    if console.is_jupyter:
        return LivePicture(notebook_console(), display, clock, NotebookLive)
    return LivePicture(console, display, clock) if console.is_terminal else Lines(console)


class Silence:
    """Shows nothing."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def phase_started(self, name: str, total: int | None) -> None: ...
    def phase_moved(self, done: int) -> None: ...
    def phase_ended(self, name: str, seconds: float) -> None: ...
    def noted(self, text: str) -> None: ...
    def proposing(self, round: int) -> None: ...
    def trial_started(self, number: int, origin: str) -> None: ...
    def trial_ended(self, trial: Trial, trials: Sequence[Trial], display: Display) -> None: ...
    def warned(self, text: str) -> None: ...


class Lines(Silence):
    """One line for each phase and trial: for pipes, files and CI."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase_started(self, name: str, total: int | None) -> None:
        self._say(f"{name} …")

    def phase_ended(self, name: str, seconds: float) -> None:
        self._say(f"{name}: {seconds:.1f} s")

    def noted(self, text: str) -> None:
        self._say(f"note: {text}")

    def trial_ended(self, trial: Trial, trials: Sequence[Trial], display: Display) -> None:
        self._say(trial_line(trial, trials, display.objectives, display.budget))

    def warned(self, text: str) -> None:
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class JsonLines(Silence):
    """One JSON object for each event, with its time in seconds since the epoch."""

    def __init__(self, write: Callable[[str], None], now: Callable[[], float] = time.time) -> None:
        self._write = write
        self._now = now

    def phase_started(self, name: str, total: int | None) -> None:
        self._say("phase_started", phase=name, total=total)

    def phase_ended(self, name: str, seconds: float) -> None:
        self._say("phase_ended", phase=name, seconds=round(seconds, 3))

    def noted(self, text: str) -> None:
        self._say("note", text=text)

    def proposing(self, round: int) -> None:
        self._say("proposing", round=round)

    def trial_started(self, number: int, origin: str) -> None:
        self._say("trial_started", trial=number, origin=origin)

    def trial_ended(self, trial: Trial, trials: Sequence[Trial], display: Display) -> None:
        self._say(
            "trial_ended",
            trial=trial.number,
            origin=trial.origin,
            state=trial.state.value,
            values=dict(trial.values),
            seconds=trial.seconds,
            failure=trial.failure,
            hypervolume=volume(trials, display.objectives),
            budget=display.budget,
        )

    def warned(self, text: str) -> None:
        self._say("warning", text=text)

    def _say(self, event: str, **fields: Any) -> None:
        self._write(json.dumps({"time": round(self._now(), 3), "event": event, **fields}))


def _terminal_live(console: Console, picture: Callable[[], RenderableType]) -> Live:
    return Live(
        console=console,
        get_renderable=picture,
        refresh_per_second=PICTURES_PER_SECOND,
        transient=True,
        vertical_overflow="crop",
    )


class LivePicture(Silence):
    """A bar for each phase of the preparation, then the dashboard of the search, redrawn in place.

    Args:
        live: What redraws it, made from the console and what gives the picture.
    """

    def __init__(
        self,
        console: Console,
        display: Display,
        clock: Callable[[], float],
        live: Callable[[Console, Callable[[], RenderableType]], Live | NotebookLive] = _terminal_live,
    ) -> None:
        self._console = console
        self._display = display
        self._clock = clock
        self._width = console.width
        self._doing = ""
        self._found = SearchProgress((), (), {})
        self._search_start: float | None = None
        self._stored_before = 0  # trials that earlier processes have finished: they say nothing about our speed
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            console=console,
        )
        self._live = live(console, self._picture)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()

    def phase_started(self, name: str, total: int | None) -> None:
        self._doing = name
        if name == SEARCH:
            self._search_start = self._clock()
        else:
            self._progress.add_task(name, total=total, count="")
        self._live.refresh()

    def phase_moved(self, done: int) -> None:
        for task in self._progress.tasks:
            self._progress.update(task.id, completed=done, count=f"{done}/{task.total:.0f}" if task.total else "")
        self._live.refresh()

    def phase_ended(self, name: str, seconds: float) -> None:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        if name == SEARCH:
            self._search_start = None
        self._console.print(f"{name}: {seconds:.1f} s", style="dim", highlight=False, markup=False)

    def noted(self, text: str) -> None:
        self._console.print(f"note: {text}", highlight=False, markup=False)

    def proposing(self, round: int) -> None:
        self._doing = "proposing"

    def trial_started(self, number: int, origin: str) -> None:
        if not self._found.trials:
            self._stored_before = number
        self._doing = f"trial {number} ({origin})"

    def trial_ended(self, trial: Trial, trials: Sequence[Trial], display: Display) -> None:
        self._found = SearchProgress(trials, display.objectives, display.dense)
        self._live.refresh()  # at once: the next picture may come after the end of a quick search

    def warned(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="bold yellow", highlight=False, markup=False)

    def _picture(self) -> RenderableType:
        if self._console.width != self._width:  # the terminal has reflowed what we drew: start from a clean screen
            self._width = self._console.width
            self._console.file.write("\x1b[2J\x1b[H")
        return self._progress if self._search_start is None else Dashboard(self._snapshot(self._search_start))

    def _snapshot(self, start: float) -> Snapshot:
        display, elapsed = self._display, self._clock() - start
        finished = self._found.finished
        ours = finished - self._stored_before
        left = elapsed / ours * (display.budget - finished) if ours > 0 else None
        return Snapshot(display.title or "llmbo", self._doing, display.budget, self._found, elapsed, left)


def build_display(show: Show, budget: int, title: str) -> Display:
    """A display on stderr: "auto" suits whatever that is, a notebook included, "json" writes events, "nothing" nothing."""
    console = Console(stderr=True)
    views: dict[Show, Callable[[], View | None]] = {
        "auto": lambda: None,
        "json": lambda: JsonLines(lambda line: print(line, file=sys.stderr, flush=True)),
        "nothing": Silence,
    }
    if show not in views:
        raise ConfigError(unknown("way to show progress", show, views))
    return Display(console, budget, view=views[show](), title=title)
