"""Who may write a run: epochs of a lease, kept as trials of the side study `<name>/lease` beside the run's own study.

What all Optuna storages share is enough: trials are only ever appended, whole and in one order, which their numbers tell. (Setting a
WAITING trial to RUNNING is no basis: on SQLite, two processes at once may both be told that they did it.) An epoch is a trial that
names the epoch it comes after; of several that come after the same one, the first counts and its maker owns the run. It is RUNNING
while its owner may write. Whoever takes over finishes the older ones before anything else: from there on the former owner's
`check`, which stands before every write, fails.

An owner is known to live by its run folder's lock where that file can be seen, which decides at once. Elsewhere by its beat, a
counter that moves every few seconds: the observer times it by its own monotonic clock, and no two machines' clocks are compared.
"""

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from llmbo.errors import StorageError, TakenOver
from llmbo.run.database import ERRORS, uninterrupted
from llmbo.run.lock import LOCK, is_held
from llmbo.types import Phases

BEAT = 5.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which another process may take over
GRACE = 2.0  # beats that a silent process is given after a pause of the observer's own
POLL = 0.25  # seconds between two looks at an owner
WAITING = "waiting for a sign of life from the run's last process"


@dataclass
class _Sign:
    """A process's beat, since when, and whether it has moved; the last look at it, and the first after a pause of the observer's own."""

    beat: int | None
    since: float
    moved: bool
    looked: float
    doubted: float = -math.inf


class Sight:
    """What one process can tell of the life of others, look after look.

    Args:
        ours: Folder whose lock this process holds: whoever held it before is gone.
    """

    def __init__(self, ours: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._ours = ours and ours.resolve()
        self._clock = clock
        self._signs: dict[int, _Sign] = {}  # by record

    def silent(self, record: FrozenTrial) -> float:
        """Seconds since the last sign of life of the process behind a record, as seen from here."""
        return self._clock() - self._signs[record.number].since

    def heard(self, record: FrozenTrial) -> float | None:
        """The same; None while its beat has not been seen to move."""
        sign = self._signs.get(record.number)
        return self.silent(record) if sign is not None and sign.moved else None

    def lives(self, record: FrozenTrial, lock_tells: bool = True) -> bool | None:
        """Whether the process behind a record is there; None while that cannot be told yet.

        Args:
            lock_tells: Whether a process that holds its lock lives, beat or no beat: it may be suspended.
        """
        held = self._by_lock(record.user_attrs.get("owner"))
        if held is False or (held and lock_tells):
            return held
        beat, sign, now = record.user_attrs.get("beat"), self._signs.get(record.number), self._clock()
        beat = beat if isinstance(beat, int) else None
        if sign is None or beat != sign.beat:
            self._signs[record.number] = _Sign(beat, now, sign is not None, now)
            return sign is not None or None
        # After a pause it may be the observer that was suspended, or the database that was away from both.
        if now - sign.looked > GRACE * BEAT and sign.doubted == -math.inf:
            sign.doubted = now
        sign.looked = now
        return False if now - sign.since > SILENCE and now - sign.doubted > GRACE * BEAT else sign.moved or None

    def _by_lock(self, owner: Any) -> bool | None:
        """By the lock of its folder; None where that file cannot be seen from here."""
        try:
            folder = Path(owner["folder"])
            if owner["host"] != socket.gethostname() or os.stat(folder / LOCK).st_ino != owner["inode"]:
                return None
        except (TypeError, KeyError, OSError, ValueError):
            return None
        return False if folder == self._ours else is_held(folder)


class Pulse:
    """What one process can tell of a run's owner, look after look.

    Args:
        ours: As in `Sight`.
    """

    def __init__(
        self, storage: BaseStorage, name: str, ours: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.storage, self.name = storage, name
        self.epoch: FrozenTrial | None = None  # the newest at the last look
        self.sight = Sight(ours, clock)

    @property
    def owner(self) -> str:
        return process_of(self.epoch) if self.epoch else "another process"

    def look(self, lock_tells: bool = True) -> bool | None:
        """Whether somebody owns the run; None while that cannot be told yet."""
        self.epoch = next(reversed(_chain(self.storage, self.name)), None)
        if self.epoch is None or self.epoch.state.is_finished():
            return False
        return self.sight.lives(self.epoch, lock_tells)


class Record:
    """A trial of a side study that is RUNNING for as long as its process may go on."""

    def __init__(self, storage: BaseStorage, trial: int) -> None:
        self._storage, self._id = storage, trial
        self.number = storage.get_trial(trial).number

    @property
    def stands(self) -> bool:
        with suppress(KeyError):  # it has been deleted
            return self._storage.get_trial(self._id).state is TrialState.RUNNING
        return False

    def live(self, stop: threading.Event) -> None:
        """Give signs of life until `stop` is set or the record is ended."""
        beat = 0
        while not stop.wait(BEAT):
            beat += 1
            try:
                self._storage.set_trial_user_attr(self._id, "beat", beat)
            except (KeyError, UpdateFinishedTrialError):
                return
            except ERRORS:  # the next may come through; what is wrong is said where trials are read
                continue

    @contextmanager
    def alive(self) -> Iterator[Self]:
        """Give signs of life until the block ends, and the record with it."""
        stop = threading.Event()
        thread = threading.Thread(target=self.live, args=(stop,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stop.set()
            thread.join()
            with suppress(*ERRORS), uninterrupted():  # whoever is next finds the lock free, or waits
                end(self._storage, self._id)


class Lease(Record):
    """The right to write one run; made by `leased`. Its number, that of the epoch, is larger than any owner's before."""

    def __init__(self, pulse: Pulse, epoch: FrozenTrial) -> None:
        super().__init__(pulse.storage, epoch._trial_id)
        self._pulse = pulse

    def check(self) -> None:
        """Stands before every write.

        Raises:
            TakenOver: Another process has taken over, so that this one may no longer write.
        """
        if self.stands:
            return
        self._pulse.look()
        raise TakenOver(
            f"The run '{self._pulse.name}' was taken over by {self._pulse.owner}, after nothing had been heard of this process "
            f"for {SILENCE:.0f} s. It goes on there; what this process has stored is kept."
        )


def wait_until_free(pulse: Pulse, phases: Phases) -> None:
    """Return when nobody owns the run. A silent owner is given `SILENCE` seconds, and the user is told.

    Raises:
        StorageError: Another process is at work.
    """
    alive = pulse.look()
    if alive is None:
        with phases.phase(WAITING, round(SILENCE)) as advance:
            while (alive := pulse.look()) is None:
                time.sleep(POLL)
                advance(round(pulse.sight.silent(pulse.epoch)) if pulse.epoch else 0)
    if alive:
        raise StorageError(
            f"The run '{pulse.name}' belongs to {pulse.owner}: wait for it, stop it there, or choose another --name."
        )


@contextmanager
def leased(pulse: Pulse, phases: Phases, folder: Path) -> Iterator[Lease]:
    """Own the run until the block ends, and give signs of life all the while.

    Args:
        folder: The run folder, whose lock this process holds.

    Raises:
        StorageError: Another process is at work.
    """
    lease: Lease | None = None
    while lease is None:
        wait_until_free(pulse, phases)
        lease = won(pulse, folder)
    with lease.alive():
        yield lease


def won(pulse: Pulse, folder: Path) -> Lease | None:
    """Append an epoch after the one that `pulse` saw last, whose owner is gone; None if another process was first."""
    after = pulse.epoch.number if pulse.epoch else None
    with uninterrupted():
        mine = record(pulse.storage, f"{pulse.name}/lease", {"after": after, "owner": owner_in(folder)})
        *older, newest = _chain(pulse.storage, pulse.name)
        for epoch in older if newest._trial_id == mine else ():
            if not epoch.state.is_finished():
                end(pulse.storage, epoch._trial_id)
        if newest._trial_id == mine:
            return Lease(pulse, newest)
        end(pulse.storage, mine)
    return None


def owner_in(folder: Path) -> dict[str, Any]:
    """What others are told of this process, which holds the lock of `folder`."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "folder": str(folder.resolve()),
        "inode": os.stat(folder / LOCK).st_ino,
    }


def process_of(record: FrozenTrial) -> str:
    """The process behind a record, in words."""
    found = record.user_attrs.get("owner")
    if not isinstance(found, dict):
        return "another process"
    return f"process {found.get('pid')} on {found.get('host')}, at work since {found.get('since')} by its clock"


def _chain(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """The epochs that count, oldest first: each the first to come after the one before it."""
    chain: list[FrozenTrial] = []
    for epoch in records(storage, f"{name}/lease"):
        if epoch.user_attrs.get("after") == (chain[-1].number if chain else None):
            chain.append(epoch)
    return chain


def records(storage: BaseStorage, study: str) -> list[FrozenTrial]:
    """The trials of a side study in the order in which they were appended; none where there is no such study."""
    try:
        return storage.get_all_trials(storage.get_study_id_from_name(study), deepcopy=False)
    except KeyError:
        return []


def record(storage: BaseStorage, study: str, attributes: dict[str, Any], running: bool = True) -> int:
    """Append a trial to a side study, which is made where there is none; Optuna's id of it."""
    try:
        identity = storage.create_new_study([StudyDirection.MINIMIZE], study)
    except DuplicatedStudyError:
        identity = storage.get_study_id_from_name(study)
    state, value = (TrialState.RUNNING, None) if running else (TrialState.COMPLETE, 0.0)
    return storage.create_new_trial(identity, create_trial(state=state, value=value, user_attrs=attributes))


def end(storage: BaseStorage, trial: int) -> None:
    """Let a record stand no longer."""
    with suppress(KeyError, UpdateFinishedTrialError):  # another process has ended or forgotten it
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.0])
