"""The records that flow through a run, and the roles that pass them on. Knows neither torch nor storage."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol


class TrialState(StrEnum):
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"


class Source(StrEnum):
    """What a proposal stems from. Programs ask this; `origin` is for people to read."""

    PATH = "path"  # a member of the allocation path, evaluated for its own sake: gains are measured against these
    WARM_START = "warm_start"  # an advisor's place in the initial design
    ADVICE = "advice"  # an advisor's candidate that won its place by acquisition value
    DIRECTION = "direction"  # likewise, found along a direction of the advisor's
    SEARCH = "search"  # everything else

    @property
    def advised(self) -> bool:
        """Whether an advisor is behind it."""
        return self in (Source.WARM_START, Source.ADVICE, Source.DIRECTION)

    @classmethod
    def restored(cls, stored: str | None, origin: str) -> "Source":
        """From a record, which holds its source unless the first version wrote it."""
        return cls(stored) if stored else cls.of_origin(origin)

    @classmethod
    def of_origin(cls, origin: str) -> "Source":
        """For records of the first version, which kept nothing but the origin."""
        known = {
            "threshold": cls.PATH,
            "advisor:warm_start": cls.WARM_START,
            "advisor:propose": cls.ADVICE,
            "advisor:directions": cls.DIRECTION,
        }
        return known.get(origin, cls.SEARCH)


@dataclass(frozen=True)
class Proposal:
    """A candidate somebody wants evaluated.

    Args:
        x: One grid level per dimension of the search space.
        origin: Who proposed it, e.g. "threshold" or "qnehvi", for people.
        why: In an advisor's words; empty where nobody said.
        recipe: The numbers whose path it lies on or near, as `AllocationRecipe.to_dict` has them; empty where it stems from none.
        predicted: Mean and standard deviation of what the surrogate expected it to gain over the path at equal share, in the quality's
            unit; None where no surrogate chose.
    """

    x: tuple[int, ...]
    origin: str
    why: str = ""
    source: Source = Source.SEARCH
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False)
    predicted: tuple[float, float] | None = None


class Measurement(dict[str, float]):
    """Every quantity that is known or measured about a candidate, by objective name.

    Args:
        windows: `kl` and `loss` of each window that was seen, in an order that all candidates of an evaluator share; their means are the
            values, unless a race was lost, whose values are estimates.
    """

    def __init__(self, values: Mapping[str, float], windows: Mapping[str, Sequence[float]] = {}) -> None:
        super().__init__(values)
        self.windows = windows


def counts(state: str, feasible: bool, values: Mapping[str, float | None]) -> bool:
    """Whether a trial may stand on the front: measured to the end, without losing a race, and within the limits."""
    return state == TrialState.COMPLETE and feasible and values.get("error") is None


@dataclass(frozen=True)
class Trial:
    """One evaluation. `values` holds every measured and counted quantity in the user's direction and unit.

    `windows`: as in `Measurement`; empty in runs of earlier versions. `predicted`: as in `Proposal`, from before it was measured.
    `feasible`: within the limits on what is measured; known limits are kept by every candidate.
    """

    number: int
    round: int
    x: tuple[int, ...]
    origin: str
    state: TrialState
    values: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None
    failure: str | None = None
    feasible: bool = True
    why: str = ""
    source: Source = Source.SEARCH
    recipe: Mapping[str, Any] = field(default_factory=dict)
    windows: Mapping[str, Sequence[float]] = field(default_factory=dict)
    predicted: tuple[float, float] | None = None

    @property
    def on_path(self) -> bool:
        """Whether it is a member of the allocation path, evaluated as such."""
        return self.source is Source.PATH

    @property
    def stopped(self) -> bool:
        """Whether it lost a race: its values are estimates, of which `error` tells the standard error."""
        return "error" in self.values

    @property
    def complete(self) -> bool:
        return self.state is TrialState.COMPLETE

    @property
    def counts(self) -> bool:
        """Whether it may stand on the front."""
        return counts(self.state, self.feasible, self.values)


@dataclass(frozen=True)
class Direction:
    """A contrast between blocks that somebody thinks worth following, whatever its step and size.

    Args:
        levels: Change per dimension of the search space, in grid levels; empty where prices change.
        profile: Change of every block's log price (`AllocationRecipe.profile`); empty where levels do.
        at: Shares at which it is to be followed; empty for all.
    """

    name: str
    levels: tuple[float, ...] = ()
    why: str = ""
    profile: tuple[float, ...] = ()
    at: tuple[float, ...] = ()


@dataclass(frozen=True)
class Advice:
    """What an advisor adds to a round: candidates for the pool, which the surrogate may veto, and directions.

    Args:
        places: Most candidates of the round that may stem from `rows`.
    """

    rows: tuple[Proposal, ...] = ()
    directions: tuple[Direction, ...] = ()
    places: int = 0


@dataclass(frozen=True)
class Outlook:
    """What the optimiser thinks before it chooses.

    Args:
        picks: What it would evaluate next without advice, with its predictions.
        improvements: What each of them is expected to add to the front's hypervolume when it is chosen, in the objectives' units.
        reach: How many levels one block alone must change for the surrogate to hold two models for little alike (correlation 0.61), `d`.
        predict: What it expects of any points, as `Proposal.predicted`.
    """

    picks: tuple[Proposal, ...]
    improvements: tuple[float, ...]
    reach: tuple[float, ...]
    predict: Callable[[Sequence[tuple[int, ...]]], list[tuple[float, float]]]


class AdviceSource(Protocol):
    """Is asked once in every round in which the surrogate chooses."""

    def advise(self, trials: Sequence[Trial], q: int, seed: int, outlook: Callable[[], Outlook]) -> Advice:
        """`outlook` takes about as long as proposing."""
        ...


class Proposer(Protocol):
    """Suggests what to evaluate next. Advisor, surrogate and baselines all are proposers."""

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        """Return at most `q` distinct legal candidates, none of them among `trials`.

        A pure function of its arguments: the same trials and seed give the same proposals, which is what makes a
        resumed run equal to an uninterrupted one. Trials still RUNNING are pending: neither proposed again nor ignored.
        An empty list says that there is nothing left to propose.
        """
        ...


class Evaluator(Protocol):
    """Measures candidates."""

    @property
    def at_once(self) -> int:
        """How many candidates it likes to be given together: more than one where that is cheaper."""
        ...

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        """What each candidate measures."""
        ...


class Store(Protocol):
    """Where a run's rounds and trials are kept, each in one transaction, so that a search goes on from whatever is there."""

    def trials(self) -> list[Trial]:
        """All trials by number."""
        ...

    def rounds(self) -> list[list[Proposal]]:
        """The stored proposals of every round."""
        ...

    def leads(self) -> bool:
        """Whether this process is the one that proposes."""
        ...

    def size(self) -> int:
        """How many processes evaluate, this one included."""
        ...

    def free(self, numbers: Sequence[int]) -> list[int]:
        """Those of some unfinished trials that this process may start."""
        ...

    def lost(self, numbers: Sequence[int]) -> list[int]:
        """Those of some free trials that somebody has begun, so that no other process will."""
        ...

    def add_round(self, proposals: Sequence[Proposal], pending: Sequence[int] = ()) -> None:
        """Store a round's proposals, in the order they will be evaluated in, and the trials that were pending when they were made."""
        ...

    def queue(self, number: int, round_number: int, proposal: Proposal) -> None:
        """Let other processes start trial `number`."""
        ...

    def start(self, number: int, round_number: int, proposal: Proposal) -> bool:
        """Mark trial `number` as RUNNING, if it is not; False where another process has it."""
        ...

    def finish(self, number: int, found: Measurement, seconds: float) -> None:
        """Store the measurements of a RUNNING trial and mark it COMPLETE."""
        ...

    def fail(self, number: int, reason: str, seconds: float) -> None:
        """Mark a RUNNING trial as FAILED."""
        ...


class Observer(Protocol):
    """Is told what happens while a run goes on."""

    def on_trial_start(self, proposal: Proposal, number: int) -> None: ...

    def on_trial_end(self, trial: Trial, trials: Sequence[Trial]) -> None: ...

    def on_proposing(self, round: int) -> None: ...


FITTING = "importance and refits"  # the phase that reads the calibration text
WRITING = "dense model writes"  # that which samples it (`self`)


class Phases(Protocol):
    """Is told which part of a run goes on, and keeps the seconds of each."""

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Callable[[int], None]]:
        """A context for one phase; what it gives is called with the number of steps done, out of `total`."""
        ...

    def note(self, text: str) -> None:
        """Something in a line that the user should know, and that stops nothing."""
        ...
