"""Who may write a run: epochs of a lease, kept as trials of the side study `<name>/lease` beside the run's own study.

What all Optuna storages share is enough: trials are only ever appended, whole and in one order, which their numbers tell. (Setting a
WAITING trial to RUNNING is no basis: on SQLite, two processes at once may both be told that they did it.) An epoch is a trial that
names the epoch it comes after; of several that come after the same one, the first counts and its maker owns the run. It is RUNNING
while its owner may write. Whoever takes over finishes the older ones before anything else: from there on the former owner's
`check`, which stands before every write, fails.

An owner is known to live by its run folder's lock where that file can be seen, which decides at once. Elsewhere by its beat, a
counter that moves every few seconds: the observer times it by its own monotonic clock, and no two machines' clocks are compared.
"""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from llmbo.errors import StorageError
from llmbo.run.database import DATABASE_ERRORS, uninterrupted
from llmbo.run.lock import LOCK, is_held
from llmbo.types import Phases

BEAT = 5.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which another process may take over
POLL = 0.25  # seconds between two looks at an owner
WAITING = "waiting for a sign of life from the run's last process"


class Pulse:
    """What one process can tell of a run's owner, look after look.

    Args:
        ours: Run folder whose lock this process holds: an owner that held it before is gone.
    """

    def __init__(
        self, storage: BaseStorage, name: str, ours: Path | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.storage, self.name = storage, name
        self.epoch: FrozenTrial | None = None  # the newest at the last look
        self._ours = ours and ours.resolve()
        self._clock = clock
        self._sign: tuple[int, object] | None = None
        self._changed = 0.0
        self._moved = False

    @property
    def silent(self) -> float:
        """Seconds since the owner's last sign of life, as seen from here."""
        return self._clock() - self._changed

    @property
    def owner(self) -> str:
        found = self.epoch.user_attrs.get("owner") if self.epoch else None
        if not isinstance(found, dict):
            return "another process"
        return f"process {found.get('pid')} on {found.get('host')}, at work since {found.get('since')} by its clock"

    def look(self) -> bool | None:
        """Whether somebody owns the run; None while that cannot be told yet."""
        self.epoch = next(reversed(_chain(self.storage, self.name)), None)
        if self.epoch is None or self.epoch.state.is_finished():
            return False
        held = self._by_lock(self.epoch.user_attrs.get("owner"))
        if held is not None:
            return held
        sign = self.epoch.number, self.epoch.user_attrs.get("beat")
        if sign != self._sign:
            self._moved = self._sign is not None and self._sign[0] == sign[0]
            self._sign, self._changed = sign, self._clock()
        return False if self.silent > SILENCE else self._moved or None

    def _by_lock(self, owner: Any) -> bool | None:
        """By the lock of the owner's run folder; None where that file cannot be seen from here."""
        try:
            folder = Path(owner["folder"])
            if owner["host"] != socket.gethostname() or os.stat(folder / LOCK).st_ino != owner["inode"]:
                return None
        except (TypeError, KeyError, OSError, ValueError):
            return None
        return False if folder == self._ours else is_held(folder)


class Lease:
    """The right to write one run; made by `leased`.

    Args:
        token: Number of the epoch, larger than any owner's before.
    """

    def __init__(self, pulse: Pulse, epoch: FrozenTrial) -> None:
        self.token = epoch.number
        self._pulse = pulse
        self._id = epoch._trial_id

    def check(self) -> None:
        """Stands before every write.

        Raises:
            StorageError: Another process has taken over, so that this one may no longer write.
        """
        with suppress(KeyError):  # the lease has been deleted
            if self._pulse.storage.get_trial(self._id).state is TrialState.RUNNING:
                return
            self._pulse.look()
        raise StorageError(
            f"The run '{self._pulse.name}' was taken over by {self._pulse.owner}, after nothing had been heard of this process "
            f"for {SILENCE:.0f} s. It goes on there; what this process has stored is kept."
        )

    def live(self, stop: threading.Event) -> None:
        """Give signs of life until `stop` is set or the lease is lost."""
        beat = 0
        while not stop.wait(BEAT):
            beat += 1
            try:
                self._pulse.storage.set_trial_user_attr(self._id, "beat", beat)
            except DATABASE_ERRORS:  # the next may come through
                continue
            except (KeyError, UpdateFinishedTrialError):
                return

    def end(self) -> None:
        """Let go of the run."""
        with suppress(*DATABASE_ERRORS), uninterrupted():  # whoever is next finds the lock free, or waits
            _end(self._pulse.storage, self._id)


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
                advance(round(pulse.silent))
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
    lease, stop = _won(pulse, phases, folder), threading.Event()
    thread = threading.Thread(target=lease.live, args=(stop,), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        stop.set()
        thread.join()
        lease.end()


def _won(pulse: Pulse, phases: Phases, folder: Path) -> Lease:
    """Append an epoch after one whose owner is gone; once more if another process was first."""
    owner = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        "folder": str(folder.resolve()),
        "inode": os.stat(folder / LOCK).st_ino,
    }
    while True:
        wait_until_free(pulse, phases)
        after = pulse.epoch.number if pulse.epoch else None
        with uninterrupted():
            study = _study(pulse.storage, pulse.name)
            mine = pulse.storage.create_new_trial(
                study, create_trial(state=TrialState.RUNNING, user_attrs={"after": after, "owner": owner})
            )
            *older, newest = _chain(pulse.storage, pulse.name)
            for epoch in older if newest._trial_id == mine else ():
                if not epoch.state.is_finished():
                    _end(pulse.storage, epoch._trial_id)
            if newest._trial_id == mine:
                return Lease(pulse, newest)
            _end(pulse.storage, mine)


def _chain(storage: BaseStorage, name: str) -> list[FrozenTrial]:
    """The epochs that count, oldest first: each the first to come after the one before it."""
    chain: list[FrozenTrial] = []
    try:
        epochs = storage.get_all_trials(storage.get_study_id_from_name(f"{name}/lease"), deepcopy=False)
    except KeyError:  # nobody has ever owned the run
        return chain
    for epoch in epochs:
        if epoch.user_attrs.get("after") == (chain[-1].number if chain else None):
            chain.append(epoch)
    return chain


def _study(storage: BaseStorage, name: str) -> int:
    try:
        return storage.create_new_study([StudyDirection.MINIMIZE], f"{name}/lease")
    except DuplicatedStudyError:
        return storage.get_study_id_from_name(f"{name}/lease")


def _end(storage: BaseStorage, trial: int) -> None:
    with suppress(KeyError, UpdateFinishedTrialError):  # another process has ended or forgotten it
        storage.set_trial_state_values(trial, TrialState.COMPLETE, [0.0])
