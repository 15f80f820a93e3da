"""`llmbo watch`: follow a run from another terminal, through its database alone."""

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import one_line_errors, say

if TYPE_CHECKING:
    from llmbo.display.dashboard import Snapshot
    from llmbo.run.heartbeat import Heartbeat


def watch(
    run: Annotated[str, typer.Argument(help="Run folder, or its name below runs/.")],
    storage: Annotated[
        str | None, typer.Option(help="Database URL, for a run that was started with --storage.")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 2.0,
) -> None:
    """Show a run as it goes on, wherever it goes on, until it is complete or Ctrl-C is pressed.

    On a terminal this is the same picture that the run itself shows, with a row for each worker; elsewhere each finished trial is one
    line, and each worker that comes or goes.

    Example: llmbo watch runs/llama

    Example: llmbo watch llama --storage postgresql://user@host/trials
    """
    with one_line_errors(interrupted="Stopped watching; the run goes on."):
        from llmbo.config.numbers import Within
        from llmbo.display.console import Console
        from llmbo.report.files import RUNS
        from llmbo.run.heartbeat import Heartbeat

        Within(0.1, 86_400).check("--every", every)
        folder, url, name = (RUNS / Path(run).name, storage, Path(run).name) if storage else own_database(run)
        console = Console()
        show = _picture if console.is_terminal else _lines
        show(console, _snapshots(url, name, every, Heartbeat(folder, url, name)))
        console.print(f"The run '{name}' is complete. Its page: llmbo report {run}", highlight=False)


def own_database(run: str) -> tuple[Path, str, str]:
    """Folder, database and name of a run that keeps its trials in its own folder."""
    from llmbo.errors import StorageError
    from llmbo.report.files import find_run

    folder = find_run(run)
    database = folder / "study.db"
    if not database.exists() and (folder / "report.json").exists():
        raise StorageError(f"'{folder}' has no database of its own: name the run's with --storage URL.")
    return folder, f"sqlite:///{database}", folder.resolve().name


def _snapshots(url: str, name: str, every: float, heartbeat: "Heartbeat") -> Iterator["Snapshot"]:
    """The run at each look, the last one complete. Waits for a run that has not begun to search."""
    from llmbo.config.objectives import parse_limits
    from llmbo.display.dashboard import Progress, Snapshot
    from llmbo.problem.objectives import build_objectives
    from llmbo.run.stored import follow_run, moments_of

    start, at_first = time.monotonic(), -1
    for look in count():
        if look:
            time.sleep(every)
        heartbeat.check()
        found = follow_run(url, name)
        if found is None:
            if not look:
                say(f"There is no run '{name}' there yet: waiting.", err=True)
            continue
        settings, facts, trials, frozen = found
        dense, elapsed = facts["dense"], time.monotonic() - start
        nothing = dict.fromkeys(dense, 0.0)  # what is watched has been accepted: no size is too small
        unfinished = [trial.number for trial in trials if trial.seconds is None]
        team = heartbeat.team(frozen, facts["device"])
        running = [f"trial {trial.number} ({trial.origin})" for trial in trials if trial.seconds is None][:3]
        if there := sum(not member.gone for member in team):
            claims = sum(len(member.claims) for member in team if not member.gone)
            running = [f"{there} processes evaluate {claims} trials"]
        finished, budget = (
            len(trials) - len(unfinished),
            facts.get("budget") or facts.get("run", {}).get("settings", {}).get("budget", 0),
        )
        limits = parse_limits(settings["maximum"])
        objectives = build_objectives(settings["objectives"], dense, nothing, settings["reference_point"], limits)
        at_first = finished if at_first < 0 else at_first
        ours = finished - at_first
        complete = finished >= budget > 0 and _complete(facts, budget)
        stopped = heartbeat.held is False and not complete
        yield Snapshot(
            title=name,
            doing="stopped" if stopped else ", ".join(running) or ("complete" if complete else "proposing"),
            budget=budget,
            progress=Progress(trials, objectives, dense),
            elapsed=elapsed,
            remaining=elapsed / ours * (budget - finished) if ours and not stopped else None,
            note="" if complete else heartbeat.diagnosis(moments_of(frozen), datetime.now()),
            team=team,
        )
        if complete:
            return


def _complete(facts: Mapping[str, Any], budget: int) -> bool:
    """Whether the report of this budget, and not of an earlier one, is written."""
    last = facts.get("run", {})
    return last.get("status") == "complete" and last["settings"]["budget"] >= budget


def _picture(console: Any, snapshots: Iterator["Snapshot"]) -> None:
    from rich.live import Live

    from llmbo.display.dashboard import Dashboard

    last = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for last in snapshots:
            live.update(Dashboard(last), refresh=True)
    if last is not None:
        console.print(Dashboard(last))


def _lines(console: Any, snapshots: Iterator["Snapshot"]) -> None:
    from llmbo.display.results import trial_line

    shown: set[int] = set()
    there: dict[str, bool] = {}
    told = False
    for shot in snapshots:
        for member in shot.team:
            if there.get(member.name) != (not member.gone):
                there[member.name] = not member.gone
                console.print(member.line, highlight=False, markup=False, soft_wrap=True)
        for trial in shot.progress.trials:
            if trial.seconds is None or trial.number in shown:
                continue
            shown.add(trial.number)
            known = [other for other in shot.progress.trials if other.number in shown]
            line = trial_line(trial, known, shot.progress.objectives, shot.budget)
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        if shot.note and not told:  # once for each silence: it goes on counting
            console.print(shot.note, highlight=False, markup=False, soft_wrap=True)
        told = bool(shot.note)
