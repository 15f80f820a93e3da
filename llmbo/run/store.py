"""Trials in an Optuna study: SQLite in the run folder by default, any database by URL.

What a reader of the study sees: one integer parameter per layer and part (KV groups and neurons kept, query heads that groups lack),
objective values in the user's direction, and user attributes for the rest.

Why nothing is lost: a round's proposals are stored as one attribute in one transaction *before* any is evaluated, and
trial k is the k-th stored proposal. Whenever the process dies, the stored rounds say what to do next; a trial left
RUNNING is simply evaluated again. Proposals depend on stored trials and the seed alone, so a resumed run goes on as if
it had never stopped.

Why no two processes mix: every write asks the lease first. A write that was already on its way when the lease was lost
is harmless: rounds carry their writer's token, and a place among the proposals belongs to the first trial made for it.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from llmbo.errors import StorageError, TakenOver
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.run.database import explained, open_storage
from llmbo.run.lease import Lease
from llmbo.run.patience import Patience, whole
from llmbo.run.records import (
    JUDGEMENTS,
    digest_elsewhere,
    frozen_trials,
    heldout_kind,
    heldout_of,
    judgement_key,
    judgements_of,
    round_key,
    rounds_of,
    trial_of,
)
from llmbo.run.team import Team
from llmbo.types import Measurement, Proposal, Trial
from pruning.architecture import Architecture

_ADVICE = "advice:"
_UNNAMED = "of the run"  # a database, in messages
P = ParamSpec("P")
R = TypeVar("R")


def _provenance(proposal: Proposal) -> dict[str, Any]:
    found: dict[str, Any] = {"origin": proposal.origin, "why": proposal.why, "source": proposal.source}
    found |= {"recipe": dict(proposal.recipe)} if proposal.recipe else {}
    return found | ({"predicted": list(proposal.predicted)} if proposal.predicted else {})


def _waits(frozen: FrozenTrial) -> bool:
    return frozen.state is TrialState.WAITING


def _writes(method: Callable[Concatenate["TrialStore", P], R]) -> Callable[Concatenate["TrialStore", P], R]:
    """Only by the run's owner, and whole."""

    @wraps(method)
    def checked(store: "TrialStore", /, *args: P.args, **options: P.kwargs) -> R:
        store.check()
        return method(store, *args, **options)

    return whole(checked)


class TrialStore:
    """One study. Not thread-safe.

    Args:
        lease: The right to write it; None where no other process can know of it.
        team: Of a process that joins it as a worker, in place of a lease.
        patience: With a database that is away.
    """

    def __init__(
        self,
        study: optuna.Study,
        space: SearchSpace,
        lease: Lease | None = None,
        team: Team | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.patience = patience or Patience(_UNNAMED)
        self._study = study
        self._space = space
        self._team = team or (Team(study._storage, study.study_name, lease) if lease else None)
        self._settings = study.user_attrs["settings"]
        self._names = list(space.names)
        if space.query_heads:
            self._names += [f"layer_{layer:02d}.fewer_queries" for layer in range(space.num_layers)]

    @classmethod
    def open(
        cls, url: str, name: str, space: SearchSpace, team: Team | None = None, patience: Patience | None = None
    ) -> Self:
        """A stored run, to be read, or for a worker to write its trials.

        Raises:
            StorageError: It is not there or is damaged.
        """
        storage = open_storage(url)
        with explained(url):
            return cls(optuna.load_study(study_name=name, storage=storage), space, None, team, patience)._checked()

    @classmethod
    def create(
        cls,
        storage: str | BaseStorage,
        name: str,
        space: SearchSpace,
        objectives: Sequence[Objective],
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        lease: Lease | None = None,
        patience: Patience | None = None,
    ) -> Self:
        """Start a study, or open the one that is there.

        Args:
            storage: Itself, or its URL.
            settings: What the user chose; compared by `differences` before a run is continued.
            facts: What was found out (resolved dtype, digests of model and text).

        Raises:
            StorageError: The database cannot be written or is damaged.
        """
        url = storage if isinstance(storage, str) else _UNNAMED
        storage = storage if isinstance(storage, BaseStorage) else open_storage(storage)
        with explained(url):
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                load_if_exists=True,
                directions=["maximize" if objective.maximize else "minimize" for objective in objectives],
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.set_metric_names([objective.name for objective in objectives])
            for key, value in (("settings", settings), ("facts", facts)):
                if key not in study.user_attrs:
                    study.set_user_attr(key, dict(value))
            return cls(study, space, lease, patience=patience)._checked()

    def check(self, place: int | None = None) -> None:
        """Stands before every write: of what a trial has measured, or of anything else, which is the owner's to write.

        Raises:
            StorageError: Another process owns the run, or has this trial now.
        """
        if self._team is None or (place is None and self._team.leads()):  # which looks whether it still does
            return
        if place is None:
            raise StorageError(f"The run '{self._study.study_name}' is another process's: a worker writes only trials.")
        self._team.check()
        if not self._team.holds(place):
            raise TakenOver(f"Trial {place} was given to another process: what this one has measured is not stored.")

    @whole
    def trials(self) -> list[Trial]:
        """All trials by number."""
        return [self._trial(frozen, number) for number, frozen in enumerate(frozen_trials(self._study))]

    @whole
    def rounds(self) -> list[list[Proposal]]:
        """The stored proposals of every round."""
        return rounds_of(self._study.user_attrs, self._space.max_levels)

    @whole
    def leads(self) -> bool:
        """Whether this process is the one that proposes; a worker becomes it where nobody is.

        Raises:
            TakenOver: Another process has taken over.
        """
        return self._team is None or self._team.leads()

    @whole
    def size(self) -> int:
        """How many processes evaluate, this one included."""
        return self._team.size() if self._team else 1

    @whole
    def free(self, numbers: Sequence[int]) -> list[int]:
        """Those of some unfinished trials that this process may start."""
        if self._team is None:
            return list(numbers)
        frozen, may, leads = frozen_trials(self._study), self._team.may_start(), self._team.lease is not None
        return [n for n in numbers if (leads if n >= len(frozen) else may(n, _waits(frozen[n])))]

    @whole
    def lost(self, numbers: Sequence[int]) -> list[int]:
        """Those of some free trials that a process has begun, or claimed, which is gone: no worker will take them."""
        if self._team is None:
            return list(numbers)
        holders, frozen = self._team.holders(), frozen_trials(self._study)
        may_start = self._team.may_start()  # looked up last: what has been claimed meanwhile is not lost
        begun = [n for n in numbers if n in holders or (n < len(frozen) and not _waits(frozen[n]))]
        return [n for n in begun if n < len(frozen) and may_start(n, _waits(frozen[n]))]

    @_writes
    def add_round(self, proposals: Sequence[Proposal], pending: Sequence[int] = ()) -> None:
        """Store a round's proposals, in the order they will be evaluated in, and the trials that were pending when they were made."""
        shown = {"pending": list(pending)} if pending else {}
        plan = [{"x": list(p.x), **_provenance(p), **shown} for p in proposals]
        lease = self._team.lease if self._team else None
        token, made = lease.number if lease else None, len(self.rounds())
        if self._study.user_attrs.get(round_key(made - 1, token)) != json.loads(json.dumps(plan)):
            self._study.set_user_attr(round_key(made, token), plan)

    @_writes
    def queue(self, number: int, round_number: int, proposal: Proposal) -> None:
        """Let workers start trial `number`, if it is not known to them yet."""
        if number >= len(frozen_trials(self._study)):
            self._add(number, round_number, proposal, TrialState.WAITING)

    @whole
    def start(self, number: int, round_number: int, proposal: Proposal) -> bool:
        """Mark trial `number` as RUNNING, if it is not; False where another process has it."""
        frozen = frozen_trials(self._study)
        if number >= len(frozen):
            self.check()
            self._add(number, round_number, proposal, TrialState.RUNNING)
            return True
        if self._trial(frozen[number], number).x != proposal.x:
            raise ValueError(f"trial {number} is another candidate than was proposed for it")
        if self._team is None or frozen[number].state.is_finished():
            return not frozen[number].state.is_finished()
        self._team.check()
        if not self._team.claim(number, _waits(frozen[number])):
            return False
        if _waits(frozen[number]):
            with suppress(UpdateFinishedTrialError):
                self._study._storage.set_trial_state_values(frozen[number]._trial_id, TrialState.RUNNING)
        return True

    def _add(self, number: int, round_number: int, proposal: Proposal, state: TrialState) -> None:
        architecture = self._space.decode(proposal.x)
        fewer = architecture.fewer_queries or (0,) * self._space.num_layers
        units = (*architecture.kv_groups, *architecture.neurons, *(fewer if self._space.query_heads else ()))
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state,
                params=dict(zip(self._names, units, strict=True)),
                distributions=self._distributions(),
                user_attrs={"place": number, "round": round_number, **_provenance(proposal)},
            )
        )

    @whole
    def finish(self, number: int, found: Measurement, seconds: float) -> None:
        """Store the measurements of a RUNNING trial and mark it COMPLETE."""
        attributes = {"values": {**found, "seconds": seconds}, "windows": found.windows}
        self._end(number, TrialState.COMPLETE, attributes, [found[name] for name in self._study.metric_names or []])

    @whole
    def fail(self, number: int, reason: str, seconds: float) -> None:
        """Mark a RUNNING trial as FAILED."""
        self._end(number, TrialState.FAIL, {"values": {"seconds": seconds}, "failure": reason})

    @_writes
    def set_heldout(self, number: int | None, found: Measurement, digest: str = "") -> None:
        """Keep held-out measurements of a trial, or of the dense model (None), on windows of another text where there is a digest."""
        kept = {"values": dict(found), "windows": found.windows}
        # A finished trial is closed for good, the study is not.
        self._study.set_user_attr(judgement_key(heldout_kind(digest), number), kept)

    @whole
    def heldout(self, digest: str = "") -> dict[int | None, Measurement]:
        """Held-out measurements by trial number, the dense model's (None) with those of their windows."""
        return heldout_of(self._study.user_attrs, digest)

    @_writes
    def set_judgement(self, kind: str, number: int | None, found: Mapping[str, Any]) -> None:
        """Keep what a row of `records.JUDGEMENTS` says of a trial, or of the dense model (None)."""
        self._study.set_user_attr(judgement_key(kind, number), dict(found))

    @whole
    def judgements(self, kind: str) -> dict[int | None, dict[str, Any]]:
        """The same, by trial number."""
        return judgements_of(self._study.user_attrs, kind)

    @_writes
    def set_fact(self, key: str, value: Any) -> None:
        """Add one fact about the run, e.g. seconds by phase."""
        self._study.set_user_attr("facts", {**self.facts, key: value})

    @whole
    def notes(self) -> dict[str, Any]:
        """What an advisor was asked and what it answered, by key."""
        found = self._study.user_attrs
        return {key.removeprefix(_ADVICE): found[key] for key in found if key.startswith(_ADVICE)}

    @_writes
    def set_note(self, key: str, value: Any) -> None:
        """Keep one note for the advisor."""
        self._study.set_user_attr(f"{_ADVICE}{key}", value)

    @property
    @whole
    def facts(self) -> dict[str, Any]:
        return self._study.user_attrs["facts"]

    def _checked(self) -> Self:
        """Whatever it holds can be read: better said now than in the middle of a search."""
        self.trials(), self.rounds(), self.heldout(), self.heldout(digest_elsewhere(self.facts))
        for kind in JUDGEMENTS:
            self.judgements(kind)
        return self

    def _end(
        self, number: int, state: TrialState, attributes: Mapping[str, Any], values: Sequence[float] | None = None
    ) -> None:
        self.check(number)
        storage, trial = self._study._storage, frozen_trials(self._study)[number]._trial_id
        # What is finished stays as it is: the answer to our first try was lost, or a process that lost the trial was writing it already.
        with suppress(UpdateFinishedTrialError):
            for key, value in attributes.items():
                storage.set_trial_user_attr(trial, key, value)
            storage.set_trial_state_values(trial, state, values)

    def _distributions(self) -> dict[str, BaseDistribution]:
        anatomy, step = self._space.anatomy, self._space.neuron_step
        even = step if anatomy.intermediate_size % step == 0 else 1
        each = {
            "kv_groups": IntDistribution(0, anatomy.num_key_value_heads),
            "neurons": IntDistribution(0, anatomy.intermediate_size, step=even),
            "fewer_queries": IntDistribution(0, anatomy.attention.queries - 1),
        }
        return {name: each[name.partition(".")[2]] for name in self._names}

    def _trial(self, frozen: FrozenTrial, number: int) -> Trial:
        if missing := [name for name in self._names if name not in frozen.params]:
            raise ValueError(f"trial {number} has no {missing[0]}")
        units = [frozen.params[name] for name in self._names]
        layers = self._space.num_layers
        parts = [tuple(units[first : first + layers]) for first in range(0, len(units), layers)]
        x = self._space.encode(Architecture(*parts))
        return trial_of(frozen, number, x, self._settings)
