"""A database that is away for a while: whoever needs it waits, says so, and gives up after a bounded time."""

import random
import time
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from llmbo.errors import AwayError
from llmbo.run.database import explained, uninterrupted

LONGEST = 300.0  # seconds that a database may be away
FIRST, LAST = 0.1, 10.0  # seconds between two tries, doubled from the first on
T = TypeVar("T")
P = ParamSpec("P")


class Patience:
    """Repeats what needs the database until that answers. Not thread-safe.

    Whatever is repeated finds what an earlier try of it has stored, should only the answer have been lost.

    Args:
        url: Of the database, for messages.
        tell: Takes a line for the user.
    """

    def __init__(
        self, url: str, tell: Callable[[str], None] = lambda line: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.url, self.tell, self._clock = url, tell, clock
        self._since: float | None = None  # when it was first found away
        self._told = self._inside = False

    def __call__(self, work: Callable[[], T]) -> T:
        """What `work` gives.

        Raises:
            AwayError: The database has been away for `LONGEST` seconds; from then on it is waited for no longer.
            DamagedError: What it holds makes no sense.
        """
        if self._inside:  # a part of something that is repeated as a whole
            return work()
        pause = FIRST
        while True:
            self._inside = True
            try:
                with explained(self.url):
                    found = work()
            except AwayError as error:
                self._inside = False
                self._wait(error, pause)
                pause = min(2 * pause, LAST)
            else:
                self._back()
                return found
            finally:
                self._inside = False

    def _wait(self, error: AwayError, pause: float) -> None:
        if self._since is None:  # its server may just have been started again: then the next try is answered
            self._since = self._clock()
        elif not self._told:
            self._told = True
            self.tell(f"{error} It is tried again, for {LONGEST:.0f} s.")
        waited = self._clock() - self._since
        if waited > LONGEST:
            raise AwayError(f"{error} It was waited for {LONGEST:.0f} s.") from error
        try:
            time.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, LONGEST - waited) + FIRST))
        except BaseException:  # whoever interrupts does not want to wait for what is written at the end either
            self._since -= LONGEST
            raise

    def _back(self) -> None:
        if self._told and self._since is not None:
            self.tell(f"The database answers again, after {self._clock() - self._since:.0f} s.")
        self._since, self._told = None, False


class Patient(Protocol):
    """Who needs a database."""

    patience: Patience


S = TypeVar("S", bound=Patient)


def whole(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """A method in which no signal comes; repeated from its start where the database is away, it finds what it has stored already."""

    @wraps(method)
    def patient(owner: S, /, *args: P.args, **options: P.kwargs) -> T:
        return owner.patience(lambda: uninterrupted()(method)(owner, *args, **options))

    return patient
