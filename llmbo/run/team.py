"""Who evaluates what: the processes of a run and their claims, kept as trials of the side studies `<name>/workers` and `<name>/claims`.

As with the lease, all that is asked of a storage is that trials are appended whole and in one order. A claim names a place among the
run's proposals and, where it supersedes one, the claim it comes after: of several that come after the same one the first counts.
So no two processes hold a place, and what a process measures that has lost its claim is not stored.

Only the run's owner judges whether a worker is gone, and then takes its place itself. An owner needs no claim for a proposal that
it has not queued, since nobody else can know of it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from llmbo.errors import TakenOver
from llmbo.run.database import open_storage
from llmbo.run.lease import SILENCE, Lease, Pulse, Record, Sight, end, owner_in, record, records, won
from llmbo.run.lock import locked
from llmbo.run.patience import Patience


class Team:
    """One process among those that evaluate for a run.

    Args:
        lease: Of the run's owner; None as long as this process is not.
        own: This process's record among the workers; None for one that began as the owner.
        promote: Makes this process the owner where nobody is.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        lease: Lease | None = None,
        own: Record | None = None,
        promote: Callable[[], Lease | None] = lambda: None,
    ) -> None:
        self._storage, self._name = storage, name
        self.lease, self._own, self._promote = lease, own, promote
        self._sight = Sight()

    @property
    def me(self) -> str:
        """As claims name this process."""
        if self._own is not None:
            return f"worker {self._own.number}"
        return f"lease {self.lease.number if self.lease else None}"

    def leads(self) -> bool:
        """Whether this process owns the run, or does so from now on because nobody does.

        Raises:
            TakenOver: It has been given up.
        """
        self.check()
        if self.lease is None:
            self.lease = self._promote()
        return self.lease is not None

    def check(self) -> None:
        """Raises TakenOver if this process has been given up."""
        if self.lease is not None:
            self.lease.check()
        if self._own is not None and not self._own.stands:
            raise TakenOver(f"Nothing was heard of this process for {SILENCE:.0f} s: its trials were given to others.")

    def size(self) -> int:
        """Processes that evaluate now, this one included. Their owner gives up those that are gone."""
        others = [one for one in records(self._storage, f"{self._name}/workers") if not one.state.is_finished()]
        others = [one for one in others if f"worker {one.number}" != self.me]
        if self.lease is None:
            return 1 + len(others)
        gone = [one for one in others if self._sight.lives(one, lock_tells=False) is False]
        for one in gone:
            end(self._storage, one._trial_id)
        return 1 + len(others) - len(gone)

    def may_start(self) -> Callable[[int, bool], bool]:
        """Whether this process may start what has a place: asked with the place, and whether it waits to be started."""
        holders = self.holders()
        workers = records(self._storage, f"{self._name}/workers")
        alive = [self.me, *(f"worker {one.number}" for one in workers if not one.state.is_finished())]

        def told(place: int, waiting: bool) -> bool:
            by = holders[place].user_attrs.get("by") if place in holders else None
            if by == self.me:
                return True
            if self.lease is None:
                return waiting and by is None
            return by not in alive

        return told

    def claim(self, place: int, waiting: bool) -> bool:
        """Whether this process holds the place from now on; `waiting` as in `may_start`."""
        holder = self.holders().get(place)
        if not self.may_start()(place, waiting):
            return False
        if not waiting if holder is None else holder.user_attrs.get("by") == self.me:
            return True  # without a claim: what this owner, or one before it, has begun for itself
        after = holder.number if holder else None
        mine = {"place": place, "by": self.me, "after": after}
        record(self._storage, f"{self._name}/claims", mine, running=False)
        return self.holders()[place].user_attrs["by"] == self.me

    def holds(self, place: int) -> bool:
        """Whether nobody else holds the place."""
        holder = self.holders().get(place)
        return holder is None or holder.user_attrs.get("by") == self.me

    def holders(self) -> dict[int, FrozenTrial]:
        """The claim that counts of every place that has one."""
        found: dict[int, FrozenTrial] = {}
        for claim in records(self._storage, f"{self._name}/claims"):
            place, after = claim.user_attrs.get("place"), claim.user_attrs.get("after")
            if isinstance(place, int) and after == (found[place].number if place in found else None):
                found[place] = claim
        return found


@contextmanager
def joined(storage: BaseStorage, name: str, folder: Path, told: dict[str, Any]) -> Iterator[Team]:
    """This process as one of the run's workers, for as long as the block lasts; it owns the run once nobody does.

    Args:
        folder: This process's own, which is locked meanwhile.
        told: What others are to know of it.
    """
    with locked(folder), ExitStack() as stack:
        pulse = Pulse(storage, name, folder)
        identity = record(storage, f"{name}/workers", {"owner": owner_in(folder), **told})
        own = Record(storage, identity)
        stack.enter_context(own.alive())

        def promote() -> Lease | None:
            lease = won(pulse, folder) if pulse.look(lock_tells=False) is False else None
            return lease and stack.enter_context(lease.alive())

        yield Team(storage, name, own=own, promote=promote)


def serve(patience: Patience, name: str, folder: Path, told: dict[str, Any], work: Callable[[Team], None]) -> None:
    """Do a worker's work, and join the run again should this process be given up: it was suspended, or out of reach.

    Args:
        folder, told: As in `joined`.
    """

    def join() -> Team:
        return stack.enter_context(joined(open_storage(patience.url), name, folder, told))

    while True:
        try:
            with ExitStack() as stack:
                return work(patience(join))
        except TakenOver as error:
            patience.tell(f"{error} This worker joins again.")


def forget_team(storage: BaseStorage, name: str) -> None:
    """Remove what is known of a run's workers and their claims."""
    for study in ("claims", "workers"):
        try:
            storage.delete_study(storage.get_study_id_from_name(f"{name}/{study}"))
        except KeyError:
            continue
