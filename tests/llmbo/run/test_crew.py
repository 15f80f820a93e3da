"""What `llmbo watch` says of a team is what the store has; a worker that was killed is shown as gone."""

import io
import os
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
from rich.console import Console

from llmbo.display.team import Member, team_table
from llmbo.run import journal as journal_module
from llmbo.run import lease as lease_module
from llmbo.run.crew import RECENT, crew
from llmbo.run.database import open_storage
from llmbo.run.lease import Pulse, Sight, leased, record
from llmbo.run.lock import locked
from llmbo.run.records import frozen_trials
from llmbo.run.store import TrialStore
from llmbo.run.team import Team, joined
from llmbo.types import Proposal

TIMEOUT = 60.0  # seconds; only a hanging child reaches it
DONE = RECENT + 2  # trials of the worker


class Quiet:
    """Implements `Phases`, as far as it is asked here."""


@pytest.fixture
def short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT", 0.05)
    monkeypatch.setattr(lease_module, "SILENCE", 2.0)
    monkeypatch.setattr(journal_module, "GRACE", 3)  # seconds that a lock outlives who was killed with it


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("url", ["sqlite:///{}/study.db", "journal:{}/study.log"])
def test_a_team_is_told_as_the_store_has_it(
    toy: Any, facts: dict[str, Any], short_beats: None, url: str, tmp_path: Path
) -> None:
    url, folder = url.format(tmp_path), tmp_path / "owner"
    settings = {"objectives": ["kl", "params_share"], "reference_point": None, "maximum": []}
    proposals = [Proposal(x, "random") for x in toy.random_points(DONE + 4, 0)]
    begins, holds = get_context("fork").Event(), get_context("fork").Event()

    def help_out() -> None:
        assert begins.wait(TIMEOUT)
        there = open_storage(url)
        with joined(there, "run", tmp_path / "w", {"device": "cuda:7"}) as team:
            store = TrialStore(optuna.load_study(study_name="run", storage=there), toy.space, team=team)
            for number in range(DONE + 1):
                assert store.start(number, 0, proposals[number])
                if number < DONE:
                    time.sleep(0.01)
                    store.finish(number, toy.evaluate(proposals[number].x), 0.01)
            holds.set()
            time.sleep(TIMEOUT)

    # Forked while nothing is open: SQLite would take locks that a thread of this process holds at that moment for its own.
    process = get_context("fork").Process(target=help_out)
    process.start()
    storage = open_storage(url)
    with locked(folder), leased(Pulse(storage, "run", folder), Quiet(), folder) as lease:  # type: ignore[arg-type]
        store = TrialStore.create(storage, "run", toy.space, toy.objectives, settings, facts, lease)
        store.add_round(proposals)
        pulse, sight = Pulse(open_storage(url), "run"), Sight()

        def look() -> list[Member]:
            pulse.look()
            return crew(pulse, sight, frozen_trials(optuna.load_study(study_name="run", storage=storage)), "cpu")

        assert look() == []  # alone
        for number, proposal in enumerate(proposals):
            store.queue(number, 0, proposal)
        begins.set()
        try:
            assert holds.wait(TIMEOUT)
            last = DONE + 1
            assert store.start(last, 0, proposals[last]) and store.start(last + 1, 0, proposals[last + 1])
            store.finish(last, toy.evaluate(proposals[last].x), 0.5)
            look()
            time.sleep(0.3)
            owner, worker = look()
            trials = frozen_trials(optuna.load_study(study_name="run", storage=storage))
            assert (owner.name, owner.device, owner.claims, owner.done, owner.gone) == (
                "owner",
                "cpu",
                (last + 1,),
                1,
                False,
            )
            assert (worker.name, worker.device, worker.gone) == ("worker 0", "cuda:7", False)
            assert (worker.claims, worker.done) == ((DONE,), DONE)
            recent = trials[DONE - RECENT : DONE]
            spent = recent[-1].datetime_complete - recent[0].datetime_start  # type: ignore[operator]
            assert worker.per_minute == pytest.approx(60 * RECENT / spent.total_seconds())
            for member in (owner, worker):
                assert member.heard is not None and 0 <= member.heard < 2
            mine = [n for n, claim in Team(storage, "run").holders().items() if claim.user_attrs["by"] == "worker 0"]
            assert mine == list(range(DONE + 1))
        finally:
            process.kill()
            process.join()
        worker = look()[1]
        assert worker.gone and worker.heard is None and (worker.claims, worker.done) == ((DONE,), DONE)
        for row in ({}, {"owner": 3, "device": ["x" * 999]}, {"owner": {"folder": 0}, "beat": {}}):
            record(storage, "run/workers", row)
        record(storage, "run/claims", {"place": last + 2, "by": {}, "after": None}, running=False)
        assert len(look()) == 5 and all(len(member.device) < 50 for member in look())
    owner = look()[0]
    assert owner.gone and owner.done == 1


def lines(table: Any, width: int = 90) -> Iterator[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    yield from console.export_text().splitlines()


def test_a_row_for_each_process_and_one_for_the_rest() -> None:
    members = [Member(f"worker {n}", "cuda:0", (n,), 2, 1.25, 3.2, gone=n < 3) for n in range(9)]
    told = list(lines(team_table(members, 5)))
    assert [line.split()[1] for line in told[:4]] == ["3", "4", "5", "6"] and "trial 3" in told[0] and "3 s" in told[0]
    assert told[4].split() == ["5", "more", "2", "there", "10", "done"]
    assert len(list(lines(team_table(members, 9)))) == 9
    assert members[0].line == "worker 0 (cuda:0): 2 done, 1.25/min, trial 0, gone"
    assert members[5].line == "worker 5 (cuda:0): 2 done, 1.25/min, trial 5, last heard 3 s ago"


def test_watching_tells_a_worker_that_works_from_one_that_was_killed(llmbo: Any, forked: Any) -> None:
    run = forked(llmbo.flags(budget=4000, strategy="random", quiet=True), llmbo.folder)
    others = []
    try:
        while not (llmbo.folder / "runs" / "tiny" / "study.db").exists():
            assert run.running
            time.sleep(0.1)
        others.append(forked(["worker", "runs/tiny"], llmbo.folder))
        others.append(forked(["watch", "tiny", "--every", "0.2"], llmbo.folder))
        worker, watcher = others
        watcher.until("worker 0 (cpu)")
        watcher.until("2/4000")
        worker.kill()
        watcher.until("worker 0 (cpu)")
        watcher.until(", gone\n")
        assert "owner (cpu)" in watcher.out.read_text()
    finally:
        for process in (run, *others):
            process.kill()
