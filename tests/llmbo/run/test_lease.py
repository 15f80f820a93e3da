"""One owner at a time, whatever stores the run: real processes race, are killed, fall silent, and come back too late."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import BaseStorage

from llmbo.errors import StorageError
from llmbo.run import lease as lease_module
from llmbo.run.database import open_storage
from llmbo.run.lease import Lease, Pulse, leased
from llmbo.run.lock import locked
from llmbo.run.store import TrialStore
from llmbo.search.loop import run_search
from llmbo.types import Measurement, Proposal, TrialState

TIMEOUT = 60.0  # seconds; only a hanging child reaches it
URLS = {"sqlite": "sqlite:///{}/study.db", "journal": "journal:{}/journal.log", "postgresql": ""}
RACES = 12
BUDGET = 9

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
Open = Callable[[], BaseStorage]


class Quiet:
    """Implements `Phases` and `Observer`; remembers what was shown."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        self.phases.append(name)
        yield lambda done: None

    def on_proposing(self, round: int) -> None: ...
    def on_trial_start(self, proposal: Proposal, number: int) -> None: ...
    def on_trial_end(self, trial: object, trials: object) -> None: ...


class Random:
    """Proposes what the seed says: the same trials and seed give the same round."""

    def __init__(self, toy: Any) -> None:
        self._toy = toy

    def propose(self, trials: object, q: int, seed: int) -> list[Proposal]:
        return [Proposal(x, f"seed {seed}") for x in self._toy.random_points(q, seed)]


@pytest.fixture(params=["sqlite", "journal"])
def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """As another process would: a connection of its own."""
    url = URLS[request.param].format(tmp_path) or request.getfixturevalue("new_postgresql")()
    return lambda: open_storage(url)


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("SILENCE", 0.6), ("POLL", 0.02)):
        monkeypatch.setattr(lease_module, name, seconds)


@contextmanager
def owned(storage: BaseStorage, folder: Path, name: str = "run", phases: Quiet | None = None) -> Iterator[Lease]:
    with locked(folder), leased(Pulse(storage, name, folder), phases or Quiet(), folder) as lease:
        yield lease


def child(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def owner_elsewhere(open_again: Open, folder: Path) -> multiprocessing.process.BaseProcess:
    """A process on another machine, as far as can be seen from here, that owns the run until it is killed."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work() -> None:
        socket.gethostname = lambda: "elsewhere"
        with owned(open_again(), folder):
            ready.set()
            time.sleep(TIMEOUT)

    process = child(work)
    assert ready.wait(TIMEOUT)
    return process


@pytest.mark.parametrize("open_again", URLS, indirect=True)
def test_of_processes_that_start_at_once_one_owns_the_run(open_again: Open, tmp_path: Path, brisk: None) -> None:
    """The database is not there yet either. Every race has one winner, and the others name it."""
    context, processes = multiprocessing.get_context("fork"), 3
    barrier, results = context.Barrier(processes), context.Queue()

    def work(number: int) -> None:
        storage = None
        for race in range(RACES):
            barrier.wait(TIMEOUT)
            with ExitStack() as stack:
                storage = storage or open_again()
                try:
                    stack.enter_context(owned(storage, tmp_path / f"{number}", f"run {race}"))
                    results.put((race, os.getpid(), None))
                except StorageError as error:
                    results.put((race, os.getpid(), str(error)))
                barrier.wait(TIMEOUT)  # the winner holds on until all have tried

    children = [child(lambda number=number: work(number)) for number in range(processes)]
    told = [results.get(timeout=TIMEOUT) for _ in range(processes * RACES)]
    for process in children:
        process.join(TIMEOUT)
        assert process.exitcode == 0
    for race in range(RACES):
        (winner,) = [pid for number, pid, refusal in told if number == race and refusal is None]
        losers = [refusal for number, _, refusal in told if number == race and refusal is not None]
        assert len(losers) == processes - 1
        assert all(f"process {winner} on {socket.gethostname()}, at work since 2" in line for line in losers)


def test_after_a_kill_on_this_machine_the_run_is_free_at_once(open_again: Open, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()

    def work() -> None:
        with owned(open_again(), tmp_path / "a"):
            ready.set()
            time.sleep(TIMEOUT)

    process = child(work)
    assert ready.wait(TIMEOUT)
    storage = open_again()
    with (
        pytest.raises(StorageError, match=f"process {process.pid} on .*--name") as caught,
        owned(storage, tmp_path / "b"),
    ):
        pass
    assert "\n" not in str(caught.value)
    process.kill()
    process.join(TIMEOUT)
    for folder in ("b", "a"):  # a folder of our own, and the one that the killed process had
        shown, begin = Quiet(), time.monotonic()
        with owned(storage, tmp_path / folder, phases=shown):
            assert time.monotonic() - begin < 1 and shown.phases == []


def test_elsewhere_signs_of_life_decide(open_again: Open, tmp_path: Path, brisk: None) -> None:
    process = owner_elsewhere(open_again, tmp_path / "a")
    storage, shown = open_again(), Quiet()
    with pytest.raises(StorageError, match=f"process {process.pid} on elsewhere"), owned(storage, tmp_path / "b"):
        pass
    process.kill()
    process.join(TIMEOUT)
    begin = time.monotonic()
    with owned(storage, tmp_path / "b", phases=shown) as lease:
        assert lease_module.SILENCE <= time.monotonic() - begin and shown.phases == [lease_module.WAITING]
        assert lease.number > 0


def test_no_clock_of_another_machine_counts(
    open_again: Open, tmp_path: Path, brisk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The observer's own clock stands still: however long it looks, silence does not grow."""
    process = owner_elsewhere(open_again, tmp_path / "a")
    now = 1e6
    pulse = Pulse(open_again(), "run", clock=lambda: now)
    process.kill()
    process.join(TIMEOUT)
    pulse.look()
    time.sleep(2 * lease_module.SILENCE)
    assert pulse.look() is None
    now += lease_module.SILENCE + 1
    assert pulse.look() is None  # it may be the observer that was suspended
    now += 2 * lease_module.GRACE * lease_module.BEAT
    assert pulse.look() is False


def test_what_is_let_go_of_is_free(open_again: Open, tmp_path: Path) -> None:
    tokens = []
    for _ in range(3):
        with owned(open_again(), tmp_path / "a") as lease:
            lease.check()
            tokens.append(lease.number)
        with pytest.raises(StorageError):
            lease.check()
    assert tokens == sorted(set(tokens))
    assert Pulse(open_again(), "run").look() is False and Pulse(open_again(), "another").look() is False


@pytest.fixture
def make_store(toy: Any, facts: dict[str, Any]) -> Callable[..., TrialStore]:
    settings = {"objectives": ["kl", "params_share"], "reference_point": None, "maximum": []}
    return lambda storage, lease: TrialStore.create(storage, "run", toy.space, toy.objectives, settings, facts, lease)


def whole(store: TrialStore) -> list[object]:
    return [store.trials(), store.rounds(), store.heldout(), store.facts, store.notes()]


WRITES: dict[str, Callable[[TrialStore, Any], None]] = {
    "round": lambda store, toy: store.add_round([Proposal(x, "late") for x in toy.random_points(2, 98)]),
    "start": lambda store, toy: store.start(3, 1, Proposal(toy.random_points(1, 99)[0], "late")),
    "finish": lambda store, toy: store.finish(2, toy.evaluate(store.trials()[2].x), 9.0),
    "fail": lambda store, toy: store.fail(2, "late", 9.0),
    "held-out": lambda store, toy: store.set_heldout(0, Measurement({"kl": 9.0})),
    "fact": lambda store, toy: store.set_fact("run", "late"),
    "note": lambda store, toy: store.set_note("late", 1),
}


def half_done(store: TrialStore, toy: Any) -> None:
    """Two rounds of two; trial 2 is being measured."""
    for round_number in range(2):
        proposals = [Proposal(x, "threshold") for x in toy.random_points(2, round_number)]
        store.add_round(proposals)
        for number, proposal in enumerate(proposals[: 2 - round_number], 2 * round_number):
            store.start(number, round_number, proposal)
            if number < 2:
                store.finish(number, toy.evaluate(proposal.x), 0.5)


@contextmanager
def silenced(lease: Lease) -> Iterator[None]:
    """Its process is suspended on another machine: no sign of life and no lock to be seen."""
    storage, identity = lease._pulse.storage, lease._id
    owner = storage.get_trial(identity).user_attrs["owner"]
    storage.set_trial_user_attr(identity, "owner", {**owner, "host": "elsewhere"})
    live = storage.set_trial_user_attr
    storage.set_trial_user_attr = lambda *arguments: None  # type: ignore[method-assign]
    time.sleep(4 * lease_module.BEAT)  # for a beat that was on its way
    try:
        yield
    finally:
        storage.set_trial_user_attr = live  # type: ignore[method-assign]


@pytest.fixture
def lost(
    toy: Any, open_again: Open, make_store: Callable[..., TrialStore], tmp_path: Path, brisk: None
) -> Iterator[tuple[TrialStore, TrialStore, Lease]]:
    """A half done run: the store of who lost it, and the store and the lease of who has it now."""
    with ExitStack() as stack:
        late = stack.enter_context(owned(open_again(), tmp_path / "a"))
        stale = make_store(open_again(), late)
        half_done(stale, toy)
        stack.enter_context(silenced(late))
        lease = stack.enter_context(owned(open_again(), tmp_path / "b"))
        yield stale, make_store(open_again(), lease), lease


def test_a_writer_that_lost_the_run_writes_nothing(toy: Any, lost: tuple[TrialStore, TrialStore, Lease]) -> None:
    stale, owner, _ = lost
    before = whole(owner)
    for name, write in WRITES.items():
        with pytest.raises(StorageError, match=rf"process {os.getpid()} on .* is kept") as caught:
            write(stale, toy)
        assert "\n" not in str(caught.value) and whole(owner) == before, name
    owner.finish(2, toy.evaluate(owner.trials()[2].x), 0.5)
    assert owner.trials()[2].complete and stale.trials() == owner.trials()


@pytest.mark.parametrize("kind", ["round", "start", "finish", "fail"])
def test_a_write_on_its_way_when_the_run_was_lost_moves_no_values(
    toy: Any,
    open_again: Open,
    make_store: Callable[..., TrialStore],
    lost: tuple[TrialStore, TrialStore, Lease],
    kind: str,
) -> None:
    """Suspended between the question and the write: no storage can prevent that one, and nothing depends on it."""
    stale, owner, lease = lost
    meanwhile: dict[str, tuple[str, Callable[[], None]]] = {
        "round": (
            "set_user_attr",
            lambda: owner.add_round([Proposal(x, "owner") for x in toy.random_points(2, 2)]),
        ),
        "start": ("add_trial", lambda: owner.start(3, 1, owner.rounds()[1][1])),
    }
    if kind in meanwhile:
        name, work = meanwhile[kind]
        write = getattr(stale._study, name)
        setattr(stale._study, name, lambda *arguments: (work(), write(*arguments)))
    stale.check = lambda place=None: None  # type: ignore[method-assign]
    WRITES[kind](stale, toy)
    again = make_store(open_again(), lease)
    for number, proposal in enumerate(p for proposals in again.rounds() for p in proposals):
        if number >= len(again.trials()) or again.trials()[number].state is TrialState.RUNNING:
            again.start(number, number // 2, proposal)
            again.finish(number, toy.evaluate(proposal.x), 0.5)
    rounds, trials = again.rounds(), again.trials()
    assert [p.origin for p in rounds[-1]] == (["owner"] * 2 if kind == "round" else ["threshold"] * 2)
    assert [trial.x for trial in trials] == [p.x for proposals in rounds for p in proposals]
    assert all(trial.values == toy.evaluate(trial.x) for trial in trials if trial.complete)
    assert [t.number for t in trials if not t.complete] == ([2] if kind == "fail" else [])


def test_a_search_that_was_suspended_ends_and_its_successor_finishes_it(
    toy: Any, open_again: Open, make_store: Callable[..., TrialStore], tmp_path: Path, brisk: None
) -> None:
    """Two real processes: the first is stopped within a trial, the second takes over, then the first wakes up."""
    context = multiprocessing.get_context("fork")
    inside, refusal = context.Event(), context.Queue()

    class Slow:
        at_once = 1

        def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
            if len(store.trials()) == 5:
                lease_module.BEAT = TIMEOUT  # stopped within a beat, it would hold SQLite's lock as long as it sleeps
                time.sleep(0.2)
                inside.set()
                os.kill(os.getpid(), signal.SIGSTOP)
            return [toy.evaluate(x) for x in batch]

    def search(store: TrialStore, evaluator: Any) -> None:
        run_search(Random(toy), evaluator, store, BUDGET, 2, 0, Quiet())

    def work() -> None:
        nonlocal store
        socket.gethostname = lambda: "elsewhere"
        try:
            with owned(open_again(), tmp_path / "a") as lease:
                store = make_store(open_again(), lease)
                search(store, Slow())
        except StorageError as error:
            refusal.put(str(error))

    store: Any = None
    process = child(work)
    assert inside.wait(TIMEOUT)
    with owned(open_again(), tmp_path / "b") as lease:
        store = make_store(open_again(), lease)
        os.kill(process.pid or 0, signal.SIGCONT)
        assert f"taken over by process {os.getpid()} on {socket.gethostname()}" in refusal.get(timeout=TIMEOUT)
        process.join(TIMEOUT)
        assert process.exitcode == 0 and len(store.trials()) == 5
        search(store, toy.evaluator)
        trials = store.trials()
        assert [trial.x for trial in trials] == [p.x for proposals in store.rounds() for p in proposals][:BUDGET]
        assert all(trial.values == toy.evaluate(trial.x) for trial in trials) and len(trials) == BUDGET
