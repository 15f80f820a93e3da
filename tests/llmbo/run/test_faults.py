"""A run's real processes are killed, out of disk, at odds with their clocks or without their database. Nothing is lost or doubled."""

import os
import random
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from experiments.chaos.harm import Harm
from experiments.chaos.model import Searched
from experiments.chaos.processes import NAME, REFUSED, Machine, Simulated
from experiments.chaos.servers import PostgreSQL
from llmbo.errors import StorageError
from llmbo.run import patience as patience_module
from llmbo.run.database import open_storage
from llmbo.run.lease import records
from llmbo.run.patience import Patience
from llmbo.search.baselines import RandomProposer
from llmbo.types import Measurement, Proposal, Trial

TIMEOUT = 60.0  # seconds; only a hanging child reaches it
LEASE = 1.0

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
Simulate = Callable[..., Simulated]


class Fresh:
    """Proposes what the seed says and nobody has proposed."""

    def __init__(self, toy: Any) -> None:
        self._toy = toy

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        known = {trial.x for trial in trials}
        return [Proposal(x, "seed") for x in self._toy.random_points(q + len(known), seed) if x not in known][:q]


@pytest.fixture
def simulate(toy: Any, facts: dict[str, Any], tmp_path: Path) -> Simulate:
    settings = {"objectives": ["kl", "params_share"], "reference_point": None, "maximum": []}

    def make(budget: int, seconds: float) -> Simulated:
        log = tmp_path / "evaluations"
        return Simulated(toy.space, toy.objectives, Fresh(toy), toy.evaluate, settings, facts, budget, seconds, log)

    return make


def machine(number: int, url: str, folder: Path) -> Machine:
    return Machine(number, url, folder / f"machine-{number}", LEASE)


def said(place: Machine) -> list[str]:
    return place.folder.with_suffix(".log").read_text().splitlines()


def started(work: Simulated, place: Machine, leads: bool, before: Callable[[], None] = lambda: None) -> BaseProcess:
    process = get_context("fork").Process(target=lambda: (before(), work.run(place, leads)))
    process.start()
    return process


def wait(until: Callable[[], Any]) -> None:
    begin = time.monotonic()
    while not until():
        assert time.monotonic() - begin < TIMEOUT
        time.sleep(0.02)


def finished(url: str) -> int:
    """Nothing stays open: a process that is forked would have it too."""
    return sum(trial.state.is_finished() for trial in records(open_storage(url), NAME))


def check(work: Simulated, url: str, suspended: bool = False) -> None:
    """Whoever was suspended between looking whether it may write and writing has left a row that counts for nothing."""
    verdict = work.verdict(url)
    assert verdict.whole and (suspended or verdict.rows == 0), verdict


def test_random_kills_lose_and_double_nothing(toy: Any, simulate: Simulate, server: PostgreSQL, tmp_path: Path) -> None:
    """Of the owner, the workers and the database; `python -m experiments.chaos` does fifty."""
    url, work = server.database(), simulate(15, 0.3)
    harm = Harm([machine(n, url, tmp_path) for n in range(3)], work.run, server, work.budget, 5, 0.3, random.Random(3))
    assert harm.until_done(TIMEOUT) and not harm.crashes
    assert sum(harm.faults.values()) == 5 and harm.faults["database killed"], harm.faults
    check(work, url, suspended=any(fault.endswith("suspended") for fault in harm.faults))
    late = replace(work, measure=lambda x: Measurement({**toy.evaluate(x), "kl": 99.0}))
    assert late.verdict(url).others == work.budget  # it would be seen
    assert replace(work, proposer=RandomProposer(toy.space)).verdict(url).strayed > 0


def test_processes_with_a_model_lose_and_double_nothing(model_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """`llmbo optimize` and a worker, one of which is killed; what each trial has is what its candidate has alone."""
    small = ("--text", f"text:{text_file}", "--window", "16", "--calibration-tokens", "128", "--proxy-tokens", "64")
    quick = (
        "--heldout-tokens",
        "64",
        "--heldout-text",
        "none",
        "--no-samples",
        "--dtype",
        "float32",
        "--device",
        "cpu",
    )
    url, work = f"journal:{tmp_path}/trials", Searched(str(model_folder), "random", 8, tmp_path, (*small, *quick))
    harm = Harm([machine(n, url, tmp_path) for n in range(2)], work.run, None, work.budget, 2, 0.1, random.Random(0))
    assert harm.until_done(TIMEOUT) and not harm.crashes and sum(harm.faults.values()) == 2
    verdict = work.verdict(url)
    assert verdict.whole, verdict
    assert "complete" in work.reports()


def test_a_database_that_is_away_is_waited_for(
    toy: Any, simulate: Simulate, server: PostgreSQL, tmp_path: Path
) -> None:
    """For longer than the lease: nobody is given up for it, and both are told."""
    url, work = server.database(), simulate(14, 1.0)  # long after the database has gone
    places = [machine(n, url, tmp_path) for n in range(2)]
    processes = [started(work, places[0], leads=True)]
    wait(lambda: finished(url) > 0)
    processes.append(started(work, places[1], leads=False))
    wait(lambda: records(open_storage(url), f"{NAME}/workers") and finished(url) > 3)
    server.stop()
    time.sleep(2 * LEASE)
    server.start()
    for process, place in zip(processes, places, strict=True):
        process.join(TIMEOUT)
        lines = said(place)
        assert process.exitcode == 0 and len(lines) == 2, lines
        assert "cannot be used" in lines[0] and "for 300 s" in lines[0] and "answers again, after" in lines[1]
    check(work, url)
    assert len((tmp_path / "evaluations").read_text().split()) == work.budget  # what was measured meanwhile was kept


def test_a_database_that_stays_away_is_given_up_in_one_line(
    toy: Any, simulate: Simulate, server: PostgreSQL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience_module, "LONGEST", 0.5)
    url, work = server.database(), simulate(6, 0.1)
    place = machine(0, url, tmp_path)
    process = started(work, place, leads=True)
    wait(lambda: finished(url) > 1)
    server.stop()
    process.join(TIMEOUT)
    last = said(place)[-1]
    assert process.exitcode == REFUSED and last.startswith("error: ") and "It was waited for 0 s" in last, said(place)
    assert "run the same command again" in last and not any("Traceback" in line for line in said(place))
    server.start()
    process = started(work, place, leads=True)
    process.join(TIMEOUT)
    assert process.exitcode == 0
    check(work, url)


def test_whoever_interrupts_does_not_wait_for_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written at the end is not waited for either."""
    told: list[str] = []
    patience = Patience("postgresql://host/db", told.append)
    tries = []

    def away() -> None:
        tries.append(len(tries))
        raise ConnectionError("gone")

    def interrupt(seconds: float) -> None:
        if len(tries) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        patience(away)
    with pytest.raises(StorageError, match="gone"):
        patience(away)
    assert len(tries) == 4 and len(told) == 1


def test_clocks_at_odds_by_minutes_give_nobody_up(
    toy: Any, simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner's is ahead, the worker's behind. Nobody takes over until the owner is killed, then within a few leases."""
    url, work = f"journal:{tmp_path}/trials", simulate(12, 0.2)
    places, real = [machine(n, url, tmp_path) for n in range(2)], time.time

    def shifted(minutes: float) -> Callable[[], None]:
        return lambda: setattr(time, "time", lambda: real() + 60 * minutes)

    owner = started(work, places[0], True, shifted(7))
    wait(lambda: Path(url.removeprefix("journal:")).exists() and finished(url) > 0)
    worker = started(work, places[1], False, shifted(-7))
    wait(lambda: finished(url) > 6)
    assert len(records(open_storage(url), f"{NAME}/lease")) == 1 and said(places[0]) == said(places[1]) == []
    owner.kill()
    begin = time.monotonic()
    worker.join(TIMEOUT)
    assert worker.exitcode == 0 and time.monotonic() - begin < 20 * LEASE
    assert len(records(open_storage(url), f"{NAME}/lease")) == 2
    check(work, url)


def test_a_full_disk_stops_one_worker_alone(
    toy: Any, simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a line of the journal, which stays readable; its trial is evaluated by the owner."""
    monkeypatch.setattr(patience_module, "LONGEST", 0.5)
    url, work = f"journal:{tmp_path}/trials", simulate(12, 0.2)
    places = [machine(n, url, tmp_path) for n in range(2)]
    owner = started(work, places[0], leads=True)
    wait(lambda: (tmp_path / "trials").exists() and finished(url) > 1)

    def little_space() -> None:
        size = (tmp_path / "trials").stat().st_size + 3000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    worker = started(work, places[1], False, little_space)
    worker.join(TIMEOUT)
    lines = said(places[1])
    assert worker.exitcode == REFUSED and lines[-1].startswith("error: ") and "free space on the disk" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    owner.join(TIMEOUT)
    assert owner.exitcode == 0, said(places[0])
    check(work, url)
