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

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from llmbo.errors import StorageError
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.run.database import explained, open_storage, uninterrupted
from llmbo.run.lease import Lease
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
from llmbo.types import Measurement, Proposal, Trial
from pruning.architecture import Architecture

_ADVICE = "advice:"
P = ParamSpec("P")
R = TypeVar("R")


def _provenance(proposal: Proposal) -> dict[str, Any]:
    found: dict[str, Any] = {"origin": proposal.origin, "why": proposal.why, "source": proposal.source}
    found |= {"recipe": dict(proposal.recipe)} if proposal.recipe else {}
    return found | ({"predicted": list(proposal.predicted)} if proposal.predicted else {})


def _writes(
    method: Callable[Concatenate["TrialStore", P], R],
) -> Callable[Concatenate["TrialStore", P], R]:
    """Only by the run's owner, and whole."""

    @wraps(method)
    def checked(store: "TrialStore", /, *args: P.args, **options: P.kwargs) -> R:
        with uninterrupted():
            store.check()
            return method(store, *args, **options)

    return checked


class TrialStore:
    """One study. Not thread-safe.

    Args:
        lease: The right to write it; None where no other process can know of it.
    """

    def __init__(self, study: optuna.Study, space: SearchSpace, lease: Lease | None = None) -> None:
        self._study = study
        self._space = space
        self._lease = lease
        self._settings = study.user_attrs["settings"]
        self._names = list(space.names)
        if space.query_heads:
            self._names += [f"layer_{layer:02d}.fewer_queries" for layer in range(space.num_layers)]

    @classmethod
    def open(cls, url: str, name: str, space: SearchSpace) -> Self:
        """A stored run, to be read.

        Raises:
            StorageError: It is not there or is damaged.
        """
        storage = open_storage(url)
        with explained(url):
            return cls(optuna.load_study(study_name=name, storage=storage), space)._checked()

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
    ) -> Self:
        """Start a study, or open the one that is there.

        Args:
            storage: Itself, or its URL.
            settings: What the user chose; compared by `differences` before a run is continued.
            facts: What was found out (resolved dtype, digests of model and text).

        Raises:
            StorageError: The database cannot be written or is damaged.
        """
        url = storage if isinstance(storage, str) else "of the run"
        storage = open_storage(storage) if isinstance(storage, str) else storage
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
            return cls(study, space, lease)._checked()

    def check(self) -> None:
        """Stands before every write.

        Raises:
            StorageError: Another process has taken over the run.
        """
        if self._lease is not None:
            self._lease.check()

    @uninterrupted()
    def trials(self) -> list[Trial]:
        """All trials by number."""
        return [self._trial(frozen, number) for number, frozen in enumerate(frozen_trials(self._study))]

    @uninterrupted()
    def rounds(self) -> list[list[Proposal]]:
        """The stored proposals of every round."""
        return rounds_of(self._study.user_attrs)

    @_writes
    def add_round(self, proposals: Sequence[Proposal]) -> None:
        """Store a round's proposals; they will be evaluated in this order."""
        plan = [{"x": list(p.x), **_provenance(p)} for p in proposals]
        key = round_key(len(self.rounds()), self._lease.token if self._lease else None)
        self._study.set_user_attr(key, plan)

    @_writes
    def start(self, number: int, round_number: int, proposal: Proposal) -> None:
        """Mark trial `number` as RUNNING; does nothing if a killed run had started it already."""
        if number < len(frozen_trials(self._study)):
            return
        architecture = self._space.decode(proposal.x)
        fewer = architecture.fewer_queries or (0,) * self._space.num_layers
        units = (*architecture.kv_groups, *architecture.neurons, *(fewer if self._space.query_heads else ()))
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=dict(zip(self._names, units, strict=True)),
                distributions=self._distributions(),
                user_attrs={"place": number, "round": round_number, **_provenance(proposal)},
            )
        )

    @_writes
    def finish(self, number: int, found: Measurement, seconds: float) -> None:
        """Store the measurements of a RUNNING trial and mark it COMPLETE."""
        trial = self._annotated(number, {"values": {**found, "seconds": seconds}, "windows": found.windows})
        self._study.tell(trial, [found[name] for name in self._study.metric_names or []])

    @_writes
    def fail(self, number: int, reason: str, seconds: float) -> None:
        """Mark a RUNNING trial as FAILED."""
        trial = self._annotated(number, {"values": {"seconds": seconds}, "failure": reason})
        self._study.tell(trial, state=optuna.trial.TrialState.FAIL)

    @_writes
    def set_heldout(self, number: int | None, found: Measurement, digest: str = "") -> None:
        """Keep held-out measurements of a trial, or of the dense model (None), on windows of another text where there is a digest."""
        kept = {
            "values": dict(found),
            "windows": found.windows,
        }  # a finished trial is closed for good, the study is not
        self._study.set_user_attr(judgement_key(heldout_kind(digest), number), kept)

    @uninterrupted()
    def heldout(self, digest: str = "") -> dict[int | None, Measurement]:
        """Held-out measurements by trial number, the dense model's (None) with those of their windows."""
        return heldout_of(self._study.user_attrs, digest)

    @_writes
    def set_judgement(self, kind: str, number: int | None, found: Mapping[str, Any]) -> None:
        """Keep what a row of `records.JUDGEMENTS` says of a trial, or of the dense model (None)."""
        self._study.set_user_attr(judgement_key(kind, number), dict(found))

    @uninterrupted()
    def judgements(self, kind: str) -> dict[int | None, dict[str, Any]]:
        """The same, by trial number."""
        return judgements_of(self._study.user_attrs, kind)

    @_writes
    def set_fact(self, key: str, value: Any) -> None:
        """Add one fact about the run, e.g. seconds by phase."""
        self._study.set_user_attr("facts", {**self.facts, key: value})

    @uninterrupted()
    def notes(self) -> dict[str, Any]:
        """What an advisor was asked and what it answered, by key."""
        return {
            key.removeprefix(_ADVICE): value for key, value in self._study.user_attrs.items() if key.startswith(_ADVICE)
        }

    @_writes
    def set_note(self, key: str, value: Any) -> None:
        """Keep one note for the advisor."""
        self._study.set_user_attr(f"{_ADVICE}{key}", value)

    @property
    def facts(self) -> dict[str, Any]:
        return self._study.user_attrs["facts"]

    def _checked(self) -> Self:
        """Whatever it holds can be read: better said now than in the middle of a search."""
        self.trials(), self.rounds(), self.heldout(), self.heldout(digest_elsewhere(self.facts))
        for kind in JUDGEMENTS:
            self.judgements(kind)
        return self

    def _annotated(self, number: int, attributes: Mapping[str, Any]) -> int:
        """Optuna's number of a RUNNING trial, given further attributes."""
        frozen = frozen_trials(self._study)[number]
        if frozen.state.is_finished():
            raise StorageError(
                f"Trial {number} is finished already: run the same command again, it goes on from there."
            )
        trial = optuna.trial.Trial(self._study, frozen._trial_id)
        for key, value in attributes.items():
            trial.set_user_attr(key, value)
        return frozen.number

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
