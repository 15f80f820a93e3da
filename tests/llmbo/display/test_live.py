"""What is seen of a run while it goes on: in any terminal, without colour, in pipes, by machines, from another terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, nullcontext
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.display.console import Console
from llmbo.display.dashboard import Dashboard, FrontPlot, Progress, Snapshot
from llmbo.run.heartbeat import PATIENCE, SHORTEST_SILENCE, Heartbeat, usual_pause
from llmbo.run.lock import LOCK
from llmbo.types import Trial, TrialState

COLOR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
TIMEOUT = 300.0  # seconds until a subprocess has shown enough, on a busy machine


@pytest.fixture
def snapshot(toy: Any) -> Snapshot:
    family = [toy.family.at(share) for share in (0.4, 0.5, 0.6, 0.8)]
    trials = [*toy.trials(family), *toy.trials(toy.random_points(20, 0), "qnehvi")]
    trials = [Trial(n, n // 4, t.x, t.origin, t.state, t.values, 1.0, source=t.source) for n, t in enumerate(trials)]
    trials += [
        Trial(len(trials), 9, trials[0].x, "qnehvi", TrialState.FAILED, seconds=1.0, failure="out of memory"),
        Trial(len(trials) + 1, 9, trials[0].x, "[bold]x", TrialState.RUNNING),
    ]
    return Snapshot("llama", "trial 25 (qnehvi)", 60, Progress(trials, toy.objectives, toy.dense), 65.0, 3700.0)


def drawn(snapshot: Snapshot, width: int, height: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, **options)
    console.print(Dashboard(snapshot), height=height)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [10, 24, 36, 60, 83, 84, 120, 200])
@pytest.mark.parametrize("height", [5, 14, 24, 60])
def test_the_picture_fits_any_terminal(snapshot: Snapshot, width: int, height: int) -> None:
    lines = drawn(snapshot, width, height, no_color=True, color_system=None).splitlines()
    assert all(len(line) <= width for line in lines) and len(lines) <= height
    assert lines[0].startswith("llama")


def test_the_picture_says_what_matters(snapshot: Snapshot) -> None:
    text = drawn(snapshot, 120, 30, color_system=None)
    assert "25/60 trials" in text and "1:05, about 1:01:40 left" in text and "hypervolume" in text
    lines = text.splitlines()
    worst = snapshot.progress.quality.reference  # nothing beyond it is shown
    assert set(lines[1]) <= {"━", "╸", "╺", " "} and "origin" in lines[2] and f"{worst:.3g}" in lines[2]
    assert "●" in text and "·" in text and "[bold]x" in text and "running" in text and "failed" in text
    assert not COLOR.search(text)
    assert COLOR.search(drawn(snapshot, 120, 30, color_system="standard"))


def test_a_picture_without_trials_or_budget_is_one(snapshot: Snapshot) -> None:
    empty = Snapshot("llama", "proposing", 0, Progress([], snapshot.progress.objectives, {}), 0.0)
    assert drawn(empty, 80, 24, color_system=None).startswith("llama · 0 trials · proposing")


def test_a_plain_terminal_gets_plain_characters(snapshot: Snapshot) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=ascii_only, width=100, height=30, force_terminal=True, color_system=None)
    plot = "".join(segment.text for segment in console.render(FrontPlot(snapshot.progress, 12, 60)))
    assert plot.isascii() and "o" in plot and "." in plot


def test_quiet_says_nothing_but_the_path(llmbo: Any) -> None:
    result = llmbo(budget=2, strategy="random", quiet=True)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == ["Report: runs/tiny/report.json   Page: runs/tiny/report.html"]


def test_json_logs_are_one_object_per_line(llmbo: Any) -> None:
    result = llmbo(budget=3, strategy="random", json_logs=True)
    assert result.exit_code == 0
    events = [json.loads(line) for line in result.stderr.splitlines()]
    ended = [event for event in events if event["event"] == "trial_ended"]
    trials = llmbo.report()["trials"]
    assert [event["trial"] for event in ended] == [0, 1, 2]
    assert [event["values"]["kl"] for event in ended] == [trial["objectives"]["kl"] for trial in trials]
    assert ended[-1]["hypervolume"] == llmbo.report()["hypervolume"]["final"] and ended[-1]["budget"] == 3
    phases = {event["phase"] for event in events if event["event"] == "phase_ended"}
    assert phases == set(llmbo.report()["run"]["seconds"]) >= {"importance and refits", "search", "held-out windows"}
    assert llmbo(budget=4, strategy="random", json_logs=True, quiet=True).exit_code == 2


def test_watching_a_finished_run_lists_its_trials(finished: Any) -> None:
    with chdir(finished.folder):
        for run in ("tiny", "runs/tiny"):
            result = CliRunner().invoke(app, ["watch", run])
            assert result.exit_code == 0, result.output
            lines = result.stdout.splitlines()
            assert [line.split()[1] for line in lines[:-1]] == [f"{number + 1}/18" for number in range(18)]
            final = finished.report()["hypervolume"]["final"]
            assert lines[-2].endswith(f"hypervolume {final:.4f}") and "complete" in lines[-1]
        unknown = CliRunner().invoke(app, ["watch", "tiny2"])
        assert unknown.exit_code == 2 and "Did you mean 'tiny'?" in unknown.stderr


def on_a_terminal(
    forked: Any, words: Sequence[str], folder: Path, until: Callable[[str], bool], **environment: str
) -> str:
    """What a command writes to a terminal of 100 x 30 characters, until it ends or has shown enough."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    process = forked(words, folder, (terminal,) * 3, TERM="xterm-256color", **environment)
    os.close(terminal)
    seen, deadline = b"", time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and not until(seen.decode(errors="replace")):
        if select.select([screen], [], [], 0.2)[0]:
            try:
                seen += os.read(screen, 65536)
            except OSError:  # the command has ended
                break
    process.kill()
    os.close(screen)
    return seen.decode(errors="replace")


def test_a_run_on_a_terminal_is_drawn_live_and_can_be_watched(llmbo: Any, forked: Any) -> None:
    flags = llmbo.flags(budget=3, strategy="random")
    seen = on_a_terminal(forked, flags, llmbo.folder, lambda text: "Report:" in text, NO_COLOR="1")
    assert "/3 trials" in seen and "●" in seen and "hypervolume" in seen and "Report:" in seen
    assert "\x1b[2A" in seen or "\x1b[1A" in seen  # redrawn in place
    assert not COLOR.search(seen)
    watched = on_a_terminal(forked, ["watch", "tiny"], llmbo.folder, lambda text: "is complete" in text)
    assert "3/3 trials" in watched and "●" in watched and "\x1b[?1049h" in watched and "\x1b[?1049l" in watched


def test_watching_tells_a_killed_run_from_one_that_works(llmbo: Any, forked: Any) -> None:
    """A real process, killed in the middle: its watcher says so, and takes it back once somebody goes on with it."""
    words = llmbo.flags(budget=400, strategy="random", quiet=True)
    run = forked(words, llmbo.folder)
    watcher = None
    try:
        while not (llmbo.folder / "runs" / "tiny" / "study.db").exists():
            assert run.running
            time.sleep(0.1)
        watcher = forked(["watch", "tiny", "--every", "0.2"], llmbo.folder)
        watcher.until("4/400")
        run.kill()
        watcher.until("No process works on this run")
        run = forked(words, llmbo.folder)
        watcher.until("/400")  # trials come again
    finally:
        for process in filter(None, (run, watcher)):
            process.kill()


NOON = datetime(2026, 1, 1, 12)


def every(seconds: float, count: int = 40) -> list[datetime]:
    """Starts and ends of trials, the last one at noon."""
    return [NOON - timedelta(seconds=seconds * back) for back in range(count)]


def test_silence_is_judged_by_what_is_usual(tmp_path: Path) -> None:
    for seconds in (1, 10, 600):
        usual = every(seconds)
        last = max(SHORTEST_SILENCE, PATIENCE * seconds)
        fresh = Heartbeat(tmp_path, "sqlite:///nothing.db", "run")  # before it can be told whether its process lives
        assert fresh.diagnosis(usual, NOON + timedelta(seconds=last)) == ""
        assert "may have stopped" in fresh.diagnosis(usual, NOON + timedelta(seconds=last + 1))
        assert fresh.diagnosis([*usual, NOON + timedelta(seconds=last + 1)], NOON + timedelta(seconds=last + 1)) == ""
    night = [moment - timedelta(hours=9) for moment in every(1)] + every(1)
    assert usual_pause(night) == 1.0  # a pause between two sessions is not what is usual
    # a machine whose clock is wrong by hours does not count for more than we saw
    ahead = Heartbeat(tmp_path, "sqlite:///nothing.db", "run")
    assert ahead.diagnosis([NOON + timedelta(hours=3)], NOON) == ""
    assert "may have stopped" in ahead.diagnosis([NOON + timedelta(hours=3)], NOON + timedelta(minutes=5))


def test_the_lock_says_who_works_on_a_run(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, f"sqlite:///{tmp_path / 'study.db'}", "run")
    for locked in (False, True, False):
        with FileLock(tmp_path / LOCK) if locked else nullcontext():
            heartbeat.check()
            assert heartbeat.held is locked
            night = NOON + timedelta(hours=9)
            assert bool(heartbeat.diagnosis(every(1), night)) is not locked  # started again a moment ago, or stopped
            if locked:
                assert "slow, but its process is there" in heartbeat.diagnosis(every(1), night + timedelta(hours=1))


def test_a_picture_with_a_note_fits_too(snapshot: Snapshot) -> None:
    noted = replace(snapshot, note="No process works on this run: it has stopped. " * 2)
    for width in (24, 60, 120):
        for height in (5, 14, 24):
            lines = drawn(noted, width, height, no_color=True, color_system=None).splitlines()
            assert all(len(line) <= width for line in lines) and len(lines) <= height and "No process" in lines[1]
