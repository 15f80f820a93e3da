"""What a user sees while a comparison runs: one live line on a terminal, plain lines elsewhere. Everything goes to stderr."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from llmbo.comparison.config import Arm
from llmbo.comparison.page import COLUMNS, kl_change
from llmbo.comparison.runner import Outcome
from llmbo.comparison.schema import BandPart, Comparison
from llmbo.display.console import Console, decimals
from llmbo.display.results import result_table


class CompareDisplay:
    """Counts evaluations over all arms and seeds. Implements `types.Phases` and `runner.Watcher`."""

    def __init__(self, console: Console, total: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._console = console
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("comparison", total=total)
        self._finished = 0  # evaluations of finished arms
        self._started = clock()
        self._total = total

    def __enter__(self) -> "CompareDisplay":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        start = self._clock()
        self._progress.update(self._task, description=name)
        yield lambda done: None
        self._console.print(f"{name}: {self._clock() - start:.1f} s", style="dim", highlight=False)

    def note(self, text: str) -> None:
        self._console.print(f"note: {text}", highlight=False, markup=False)

    def on_evaluation(self, arm: Arm, seed: int, done: int) -> None:
        self._progress.update(
            self._task, completed=self._finished + done, description=f"{arm.label}, seed {seed}, evaluation {done}"
        )

    def on_outcome(self, outcome: Outcome) -> None:
        last = outcome.judgements[-1]
        self._finished += last.evaluations  # a strategy with nothing left to propose counts as done
        heldout = "".join(f", held-out by {quality} {decimals(volume)}" for quality, volume in last.heldout.items())
        left = (self._clock() - self._started) / self._finished * (self._total - self._finished)
        self._console.print(
            f"{outcome.arm.label}, seed {outcome.seed}: hypervolume {decimals(last.hypervolume)}{heldout} after {len(outcome.trials)} "
            f"evaluations ({self._finished}/{self._total}, about {_duration(left)} left)",
            highlight=False,
            soft_wrap=True,
        )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def table(result: Comparison) -> Table:
    """Means over seeds, the best strategy first."""
    last = result.checkpoints[-1]
    seeds = f"{len(result.seeds)} seed{'s' * (len(result.seeds) != 1)}"
    shown = result_table(f"{result.name}: hypervolume, mean over {seeds}")
    others = {heading: metric for metric, heading in COLUMNS.items() if metric != "hypervolume"}
    others |= {"gain": "gain", "held-out gain": "heldout_gain"}
    others = {
        heading: metric
        for heading, metric in others.items()
        if heading == "gain" or any(summary.checkpoints[last][metric] for summary in result.summaries)
    }
    compared = _kl_compared(result)
    shown.add_column("strategy")
    kl = [f"KL against {result.method}"] if compared else []
    for heading in (*map(str, result.checkpoints), *others, *kl, "s/batch"):
        shown.add_column(heading, justify="right", overflow="fold")
    for summary in sorted(result.summaries, key=lambda s: -(s.trace[-1].mean if s.comparable else 0.0)):
        proxies = [
            summary.checkpoints[count]["hypervolume"] if summary.comparable else None for count in result.checkpoints
        ]
        cells = [_mean(band) for band in (*proxies, *(summary.checkpoints[last][metric] for metric in others.values()))]
        cells += [compared.get(summary.label, "–")] if compared else []
        shown.add_row(summary.label, *cells, f"{summary.median_proposal_seconds:.2f}")
    return shown


def _kl_compared(result: Comparison) -> dict[str, str]:
    """By how much more or less KL than the method others have at equal size and at the end, on held-out windows where they were judged."""
    last = [test for test in result.tests if test.evaluations == result.checkpoints[-1]]
    return {
        test.label: kl_change(-test.difference.mean)
        for metric in ("log_kl", "heldout_log_kl")
        for test in last
        if test.metric == metric
    }


def _mean(band: BandPart | None) -> str:
    return decimals(band.mean) if band else "–"
