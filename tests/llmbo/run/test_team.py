"""Several processes evaluate for one run: real ones, which are killed, fall silent and come back too late. No value is lost or doubled."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import BaseStorage

from llmbo.errors import ModelError, StorageError, TakenOver
from llmbo.run import database
from llmbo.run import journal as journal_module
from llmbo.run import lease as lease_module
from llmbo.run.database import open_storage
from llmbo.run.lease import Pulse, leased, record
from llmbo.run.lock import locked
from llmbo.run.records import round_key
from llmbo.run.store import TrialStore
from llmbo.run.stored import run_in
from llmbo.run.team import Team, joined
from llmbo.run.worker import check_agrees, check_versions
from llmbo.search import loop
from llmbo.search.strategies import strategy_of
from llmbo.types import Measurement, Proposal, Trial, TrialState

TIMEOUT = 60.0  # seconds; only a hanging child reaches it
BUDGET = 18
FOREVER = 1e6

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


class Quiet:
    """Implements `Observer`."""

    def on_proposing(self, round: int) -> None: ...
    def on_trial_start(self, proposal: Proposal, number: int) -> None: ...
    def on_trial_end(self, trial: object, trials: object) -> None: ...


class Telling:
    """Proposes what the seed says, and says what it was shown; `ahead` is set once trials were pending."""

    def __init__(self, toy: Any, ahead: Any = None) -> None:
        self._toy, self._ahead = toy, ahead or threading.Event()

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        pending = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
        if pending:
            self._ahead.set()
        return [Proposal(x, f"{len(trials)} {pending}") for x in self._toy.random_points(q, seed)]


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:{}/study.log", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for module, name, seconds in (
        (lease_module, "BEAT", 0.05), (lease_module, "SILENCE", 2.0), (lease_module, "POLL", 0.02), (loop, "PAUSE", 0.05),
        (journal_module, "GRACE", 3),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, seconds)
    if str(request.param).startswith("journal"):
        monkeypatch.setattr(loop, "CROWD", 1)  # the owner proposes, and evaluates only what is lost
    if request.param == "postgresql":
        return str(request.getfixturevalue("new_postgresql")())
    return str(request.param).format(tmp_path)


@pytest.fixture
def own(toy: Any, facts: dict[str, Any]) -> Callable[..., TrialStore]:
    settings = {"objectives": ["kl", "params_share"], "reference_point": None, "maximum": []}
    return lambda storage, lease: TrialStore.create(storage, "run", toy.space, toy.objectives, settings, facts, lease)


def worker(toy: Any, storage: BaseStorage, team: Team) -> TrialStore:
    return TrialStore(optuna.load_study(study_name="run", storage=storage), toy.space, team=team)


def test_every_trial_of_a_shared_run_is_measured_once_whoever_is_killed_or_falls_silent(
    toy: Any, own: Callable[..., TrialStore], url: str, tmp_path: Path
) -> None:
    """The owner is killed, a worker too, another is stopped until its trial is another's; one of the rest finishes the run."""
    context = get_context("fork")
    inside = {who: context.Event() for who in ("owner", "killed", "stopped")}
    late, ahead = context.Queue(), context.Event()

    class Slow:
        """Holds on within the trial that is to be its last, or spoils it after a sleep of which it does not know."""

        at_once = 1

        def __init__(self, who: str) -> None:
            self.who, self.calls = who, 0

        def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
            self.calls += 1
            time.sleep(0.05)
            found = [toy.evaluate(x) for x in batch]
            others = inside["killed"].is_set() and inside["stopped"].is_set()
            if self.who == "good" or (self.who == "owner" and not others) or (self.who == "stopped" and self.calls > 1):
                return found
            # Whatever holds the storage up: a round was proposed while this trial was under way.
            assert ahead.wait(TIMEOUT)
            lease_module.BEAT = FOREVER  # stopped within a beat, it would hold the storage's lock as long as it sleeps
            time.sleep(0.2)
            inside[self.who].set()
            if self.who == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
                lease_module.BEAT = 0.05
            else:
                time.sleep(TIMEOUT)
            return [Measurement({**each, "kl": 99.0}) for each in found]

    def lead() -> None:
        storage, folder = open_storage(url), tmp_path / "owner"
        pulse = Pulse(storage, "run", folder)
        with locked(folder), leased(pulse, Quiet(), folder) as lease:  # type: ignore[arg-type]
            store = own(storage, lease)
            while store.size() < 3:  # before both workers are there
                time.sleep(0.02)
            loop.run_search(Telling(toy, ahead), Slow("owner"), store, BUDGET, 2, 0, Quiet())

    def help_out(who: str) -> None:
        evaluator, storage = Slow(who), open_storage(url)
        while True:
            try:
                with joined(storage, "run", tmp_path / who, {"device": who}) as team:
                    loop.run_search(Telling(toy, ahead), evaluator, worker(toy, storage, team), BUDGET, 2, 0, Quiet())
                    return
            except TakenOver as error:
                late.put((who, str(error)))

    processes = {"owner": context.Process(target=lead)}
    processes["owner"].start()
    while not _begun(url):
        time.sleep(0.02)
    for who in ("killed", "stopped"):
        processes[who] = context.Process(target=help_out, args=(who,))
        processes[who].start()
    for who in inside:
        assert inside[who].wait(TIMEOUT), who
    for who in ("killed", "owner"):
        processes[who].kill()
    processes["good"] = context.Process(target=help_out, args=("good",))
    processes["good"].start()
    processes["good"].join(TIMEOUT)
    assert processes["good"].exitcode == 0  # it has finished the run, the stopped one's trial among it
    os.kill(processes["stopped"].pid or 0, signal.SIGCONT)
    processes["stopped"].join(TIMEOUT)
    assert processes["stopped"].exitcode == 0 and late.get(timeout=TIMEOUT)[0] == "stopped"

    store = own(open_storage(url), None)
    trials, rounds = store.trials(), store.rounds()
    assert [trial.number for trial in trials] == list(range(BUDGET)) and all(trial.complete for trial in trials)
    assert all(trial.values == toy.evaluate(trial.x) for trial in trials)
    assert [trial.x for trial in trials] == [p.x for proposals in rounds for p in proposals][:BUDGET]
    study = optuna.load_study(study_name="run", storage=open_storage(url))
    assert len(study.trials) == BUDGET  # what Optuna shows has the same numbers
    first, pendings = 0, []
    for key in sorted(key for key in study.user_attrs if key.startswith("round:")):
        made = study.user_attrs[key]
        pendings.append(made[0].get("pending", []))
        assert {each["origin"] for each in made} == {f"{first} {pendings[-1]}"}
        first += len(made)
    assert any(pendings)


def test_a_proposal_follows_from_the_trials_and_pendings_stored_with_it(
    toy: Any, own: Callable[..., TrialStore], tmp_path: Path
) -> None:
    """The default search with two candidates always under way, and each of its rounds once more from what the database holds."""
    build, url = strategy_of("qnehvi").build, f"sqlite:///{tmp_path}/study.db"
    store, proposer = own(open_storage(url), None), build(toy, toy.objectives, {"num_initial": 4})
    begun: list[tuple[int, Proposal]] = []
    for number in range(5):
        trials = store.trials()
        running = [trial.number for trial in trials if trial.state is TrialState.RUNNING]
        store.add_round(proposer.propose(trials, 2, number), running)
        for proposal in store.rounds()[number]:
            begun.append((number, proposal))
            store.start(len(begun) - 1, number, proposal)
            if len(begun) > 2:
                done = len(begun) - 3
                store.finish(done, toy.evaluate(begun[done][1].x), 1.0)
    again, first = own(open_storage(url), None), 0
    made = optuna.load_study(study_name="run", storage=open_storage(url)).user_attrs
    for number, proposals in enumerate(again.rounds()):
        pending = made[round_key(number, None)][0].get("pending", [])
        assert pending == list(range(max(0, first - 2), first))
        shown = [
            replace(trial, state=TrialState.RUNNING, values={}) if trial.number in pending else trial
            for trial in again.trials()[:first]
        ]
        anew = build(toy, toy.objectives, {"num_initial": 4}).propose(shown, 2, number)
        assert [proposal.x for proposal in anew] == [proposal.x for proposal in proposals]
        first += len(proposals)


def _begun(url: str) -> bool:
    return any(one.study_name == "run" and "facts" in one.user_attrs for one in open_storage(url).get_all_studies())


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_what_others_have_written_into_the_store_is_no_claim(
    toy: Any, own: Callable[..., TrialStore], url: str, tmp_path: Path
) -> None:
    """Rows that make no sense hold no place and count for no process that lives; the run goes on."""
    storage, folder = open_storage(url), tmp_path / "owner"
    for row in (
        {},
        {"place": "0"},
        {"place": 1, "after": 77, "by": "worker 0"},
        {"place": [2]},
        {"place": 2, "by": {}},
        {"place": 3, "by": 7},
    ):
        record(storage, "run/claims", row, running=False)
    with locked(folder), leased(Pulse(storage, "run", folder), Quiet(), folder) as lease:  # type: ignore[arg-type]
        store = own(storage, lease)
        for row in ({}, {"owner": 3}, {"owner": {"folder": 0}, "beat": []}):
            record(storage, "run/workers", row)
        assert store.size() == 4
        loop.run_search(Telling(toy), toy.evaluator, store, 6, 2, 0, Quiet())
        assert all(trial.values == toy.evaluate(trial.x) for trial in store.trials()) and len(store.trials()) == 6
        with (
            joined(storage, "run", tmp_path / "w", {}) as team,
            pytest.raises(StorageError, match="is another process's"),
        ):
            worker(toy, storage, team).set_fact("late", 1)
    assert run_in(url) == "run"


def test_a_machine_that_computes_otherwise_is_named(toy: Any) -> None:
    found = toy.evaluate(toy.random_points(1, 0)[0])
    check_agrees("trial 3", found, found, "cpu on here")
    with pytest.raises(ModelError, match=r"cuda:1 on there .* kl of trial 3 .*noise allows"):
        check_agrees("trial 3", {**found, "kl": 1.5 * found["kl"]}, found, "cuda:1 on there")
    check_versions("run", {"torch": "2.13.0+cpu", "python": "3.11"}, {"torch": "2.13.0+cu126", "python": "3.12"})
    with pytest.raises(ModelError, match=r"torch: 2\.12\.0 -> 2\.13\.0"):
        check_versions("run", {"torch": "2.12.0"}, {"torch": "2.13.0"})


def test_sqlite_is_refused_where_machines_share_it(llmbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner alone may go on there, and is told; several processes are refused before anything is loaded."""
    part = type("Part", (), {"mountpoint": "/", "fstype": "nfs4"})
    monkeypatch.setattr(database.psutil, "disk_partitions", lambda all: [part])
    with pytest.raises(StorageError, match=r"nfs4.*journal:"):
        database.check_shared("sqlite:////shared/study.db")
    database.check_shared("journal:/shared/study.log")
    database.check_shared("postgresql://host/db")
    refused = llmbo(devices="cpu,cpu", device=None)
    assert refused.exit_code == 2 and "nfs4" in refused.stderr and not (llmbo.folder / "runs").exists()
    alone = llmbo(budget=2)
    assert alone.exit_code == 0 and "on a network file system (nfs4)" in alone.stderr


def test_a_proxy_on_loopback_serves_an_owner_and_a_worker(
    toy: Any, own: Callable[..., TrialStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc")
    from optuna.storages._grpc.server import make_server

    monkeypatch.setattr(loop, "PAUSE", 0.02)
    monkeypatch.setattr(database, "SECONDS", 0.2)
    with closing(socket.create_server(("localhost", 0))) as found:
        port = found.getsockname()[1]
    url = f"grpc://localhost:{port}"
    with pytest.raises(StorageError, match="start its server"):
        open_storage(url)
    server = make_server(open_storage(f"sqlite:///{tmp_path / 'study.db'}"), "localhost", port)
    server.start()
    monkeypatch.setattr(database, "SECONDS", TIMEOUT)

    class Slow:
        at_once = 1

        def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
            time.sleep(0.05)
            return [toy.evaluate(x) for x in batch]

    def help_out() -> None:
        there = open_storage(url)
        with joined(there, "run", tmp_path / "w", {}) as team:
            loop.run_search(Telling(toy), Slow(), worker(toy, there, team), 8, 2, 0, Quiet())

    try:
        storage, folder = open_storage(url), tmp_path / "owner"
        with locked(folder), leased(Pulse(storage, "run", folder), Quiet(), folder) as lease:  # type: ignore[arg-type]
            store, thread = own(storage, lease), threading.Thread(target=help_out)
            thread.start()
            while store.size() == 1:
                time.sleep(0.02)
            loop.run_search(Telling(toy), Slow(), store, 8, 2, 0, Quiet())
            thread.join(TIMEOUT)
            assert [trial.values == toy.evaluate(trial.x) for trial in store.trials()] == [True] * 8
            assert {claim.user_attrs["by"] for claim in Team(storage, "run").holders().values()} == {
                "worker 0",
                f"lease {lease.number}",
            }
    finally:
        server.stop(None)
