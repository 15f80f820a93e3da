"""Whether somebody still works on a run, seen from outside: by its lease, and by how long nothing has come against what is usual."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from optuna.trial import FrozenTrial

from llmbo.display.team import Member
from llmbo.run.crew import crew
from llmbo.run.database import explained, find_storage
from llmbo.run.lease import Pulse, Sight
from llmbo.run.lock import is_held

PATIENCE = 5.0  # usual pauses after which silence is worth a word
SHORTEST_SILENCE = 30.0  # seconds; below that nothing is said


def usual_pause(moments: Sequence[datetime]) -> float:
    """Seconds between two starts or ends of trials that all but the longest twentieth (a night between two sessions) stay below."""
    pauses = sorted((after - before).total_seconds() for before, after in pairwise(sorted(moments)))
    return pauses[int(0.95 * (len(pauses) - 1))] if pauses else 0.0


@dataclass
class Heartbeat:
    """The signs of life of one run, look after look: call `check`, read what is stored, ask for `diagnosis`.

    Args:
        folder: Its folder on this machine, which a process that gets ready holds already.
        url, name: Where it is stored.
        held: Whether a process is known to work on it; None where that cannot be told yet.
    """

    folder: Path
    url: str
    name: str
    held: bool | None = None
    _pulse: Pulse | None = None
    _sight: Sight = field(default_factory=Sight)
    _moments: int = 0
    _changed: float = 0.0

    def check(self) -> None:
        """Look who owns the run. Before what is stored is read: a run is let go of after its end has been stored.

        Raises:
            StorageError: The database cannot be read.
        """
        if self._pulse is None and (storage := find_storage(self.url)) is not None:
            self._pulse = Pulse(storage, self.name)
        with explained(self.url):
            self.held = is_held(self.folder) or (self._pulse.look() if self._pulse else False)

    def team(self, trials: Sequence[FrozenTrial], device: str) -> list[Member]:
        """As `crew`, at the last look."""
        with explained(self.url):
            return crew(self._pulse, self._sight, trials, device) if self._pulse else []

    def diagnosis(self, moments: Sequence[datetime], now: datetime) -> str:
        """What there is to say about a run that is not complete; empty while all is as usual.

        Args:
            moments: When trials started and ended, by the clocks of those who ran them.
            now: By the clock of whoever looks.
        """
        if self.held is False:
            return "No process works on this run: it has stopped. The command that started it goes on from here."
        if len(moments) != self._moments or not self._changed:
            # At the first look only the stored time tells how long a run has been silent, unless somebody is known to
            # work on it: then it may just have been started again.
            known = self._changed or self.held or not moments
            self._changed = now.timestamp() if known else min(now, max(moments)).timestamp()
            self._moments = len(moments)
        silent, usual = now.timestamp() - self._changed, usual_pause(moments)
        if silent <= max(SHORTEST_SILENCE, PATIENCE * usual):
            return ""
        verdict = "slow, but its process is there" if self.held else "it may have stopped"
        return f"Nothing new for {silent:.0f} s, usually within {usual:.0f} s: {verdict}."
