"""Trials in an Optuna study: SQLite in the run folder by default, any database by URL.

What a reader of the study sees: one integer parameter per layer and part (KV groups, neurons, in units kept), objective
values in the user's direction, and user attributes for the rest.

Why nothing is lost: a round's proposals are stored as one attribute in one transaction *before* any is evaluated, and
trial k is the k-th stored proposal. Whenever the process dies, the stored rounds say what to do next; a trial left
RUNNING is simply evaluated again. Proposals depend on stored trials and the seed alone, so a resumed run goes on as if
it had never stopped.
"""

import json
import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from llmbo.config.objectives import feasible, measured_limits, parse_limits
from llmbo.errors import StorageError, first_line
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.types import Proposal, Source, Trial, TrialState
from pruning.architecture import Architecture

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.ERROR)

_ROUND = "round:"
_ADVICE = "advice:"
DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError)
_OPENING_ERRORS = (*DATABASE_ERRORS, ImportError, OSError, ValueError)  # no driver; what is stored makes no sense


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the database is done.

    KeyboardInterrupt raised inside SQLAlchemy leaves the transaction open, and its lock then keeps the report from being written.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread only
        yield
        return
    arrived: list[int] = []
    former = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in former:
        signal.signal(signum, lambda signum, frame: arrived.append(signum))
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
    if arrived:
        signal.raise_signal(arrived[0])


class TrialStore:
    """One study. Not thread-safe; the run folder's lock keeps a second process out (see `assemble`)."""

    def __init__(self, study: optuna.Study, space: SearchSpace) -> None:
        self._study = study
        self._space = space
        self._limits = _limits(study.user_attrs["settings"])
        self._names = list(space.names)

    @classmethod
    def create(
        cls,
        url: str,
        name: str,
        space: SearchSpace,
        objectives: Sequence[Objective],
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
    ) -> Self:
        """Start a study, or open the one that is there.

        Args:
            settings: What the user chose; compared by `settings_of` before a run is continued.
            facts: What was found out (resolved dtype, digests of model and text).

        Raises:
            StorageError: The database cannot be written or is damaged.
        """
        try:
            study = optuna.create_study(
                storage=url,
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
        except _OPENING_ERRORS as error:
            raise _unusable(url, error) from error
        return cls(study, space)

    @_uninterrupted()
    def trials(self) -> list[Trial]:
        """All trials by number."""
        return [self._trial(frozen) for frozen in self._study.get_trials(deepcopy=False)]

    @_uninterrupted()
    def rounds(self) -> list[list[Proposal]]:
        """The stored proposals of every round."""
        return _rounds(self._study)

    @_uninterrupted()
    def add_round(self, proposals: Sequence[Proposal]) -> None:
        """Store a round's proposals; they will be evaluated in this order."""
        plan = [{"x": list(p.x), "origin": p.origin, "why": p.why, "source": p.source} for p in proposals]
        self._study.set_user_attr(f"{_ROUND}{len(self.rounds()):05d}", plan)

    @_uninterrupted()
    def start(self, number: int, round_number: int, proposal: Proposal) -> None:
        """Mark trial `number` as RUNNING; does nothing if a killed run had started it already."""
        if number < len(self._study.get_trials(deepcopy=False)):
            return
        architecture = self._space.decode(proposal.x)
        units = (*architecture.kv_groups, *architecture.neurons)
        self._study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.RUNNING,
                params=dict(zip(self._names, units, strict=True)),
                distributions=self._distributions(),
                user_attrs={
                    "origin": proposal.origin,
                    "round": round_number,
                    "why": proposal.why,
                    "source": proposal.source,
                },
            )
        )

    @_uninterrupted()
    def finish(self, number: int, values: Mapping[str, float], seconds: float) -> None:
        """Store the measurements of a RUNNING trial and mark it COMPLETE."""
        self._annotate(number, "values", {**values, "seconds": seconds})
        self._study.tell(number, [values[name] for name in self._metric_names()])

    @_uninterrupted()
    def fail(self, number: int, reason: str, seconds: float) -> None:
        """Mark a RUNNING trial as FAILED."""
        self._annotate(number, "values", {"seconds": seconds})
        self._annotate(number, "failure", reason)
        self._study.tell(number, state=optuna.trial.TrialState.FAIL)

    @_uninterrupted()
    def set_heldout(self, number: int, values: Mapping[str, float]) -> None:
        """Keep a trial's held-out measurements."""
        measured = self._study.user_attrs.get("heldout", {})  # a finished trial is closed for good, the study is not
        self._study.set_user_attr("heldout", {**measured, str(number): dict(values)})

    @_uninterrupted()
    def heldout(self) -> dict[int, dict[str, float]]:
        """Held-out measurements by trial number."""
        return {int(number): values for number, values in self._study.user_attrs.get("heldout", {}).items()}

    @_uninterrupted()
    def set_fact(self, key: str, value: Any) -> None:
        """Add one fact about the run, e.g. seconds by phase."""
        self._study.set_user_attr("facts", {**self.facts, key: value})

    @_uninterrupted()
    def notes(self) -> dict[str, Any]:
        """What an advisor was asked and what it answered, by key."""
        return {
            key.removeprefix(_ADVICE): value for key, value in self._study.user_attrs.items() if key.startswith(_ADVICE)
        }

    @_uninterrupted()
    def set_note(self, key: str, value: Any) -> None:
        """Keep one note for the advisor."""
        self._study.set_user_attr(f"{_ADVICE}{key}", value)

    @property
    def facts(self) -> dict[str, Any]:
        return self._study.user_attrs["facts"]

    def _metric_names(self) -> list[str]:
        return self._study.metric_names or []

    def _annotate(self, number: int, key: str, value: Any) -> None:
        trial_id = self._study.get_trials(deepcopy=False)[number]._trial_id
        optuna.trial.Trial(self._study, trial_id).set_user_attr(key, value)

    def _distributions(self) -> dict[str, BaseDistribution]:
        anatomy, step = self._space.anatomy, self._space.neuron_step
        even = step if anatomy.intermediate_size % step == 0 else 1
        attention = IntDistribution(0, anatomy.num_key_value_heads)
        mlp = IntDistribution(0, anatomy.intermediate_size, step=even)
        return {name: attention if name.endswith("kv_groups") else mlp for name in self._names}

    def _trial(self, frozen: FrozenTrial) -> Trial:
        units = [frozen.params[name] for name in self._names]
        layers = self._space.num_layers
        x = self._space.encode(Architecture(tuple(units[:layers]), tuple(units[layers:])))
        return _trial(frozen, x, self._limits)


def follow_run(url: str, name: str) -> tuple[dict[str, Any], dict[str, Any], list[Trial], list[datetime]] | None:
    """Settings, facts and trials of a stored run without its model, hence trials without `x`; None if there is no run yet.

    The last part is when trials started and ended, by the clocks of those who ran them. Only reads, so that any number of watchers
    may follow a run that goes on.

    Raises:
        StorageError: The database is there but cannot be read.
    """
    found = stored_run(url, name)
    if found is None:
        return None
    try:
        frozen = optuna.load_study(study_name=name, storage=url).get_trials(deepcopy=False)
    except _OPENING_ERRORS as error:
        raise _unusable(url, error) from error
    moments = [moment for trial in frozen for moment in (trial.datetime_start, trial.datetime_complete) if moment]
    return found[0], found[1], [_trial(trial, (), _limits(found[0])) for trial in frozen], moments


def stored_run(url: str, name: str) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """Settings, facts and finished trials of a stored run, or None if there is none. Writes nothing.

    Raises:
        StorageError: The database is there but cannot be read.
    """
    try:
        path = _sqlite_path(url)
        if path is not None and (not path.exists() or path.stat().st_size == 0):
            return None
        study = optuna.load_study(study_name=name, storage=url)
        finished = sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
        if "settings" not in study.user_attrs or "facts" not in study.user_attrs:
            if not study.get_trials(deepcopy=False):  # killed while the study was made
                return None
            raise StorageError(
                f"The study '{name}' in {shown_url(url)} was not written by llmbo: choose another --name."
            )
        _rounds(study)
        return study.user_attrs["settings"], study.user_attrs["facts"], finished
    except KeyError:
        return None
    except _OPENING_ERRORS as error:
        raise _unusable(url, error) from error


def delete_run(url: str, name: str, own_file: Path | None = None) -> None:
    """Forget a stored run.

    Args:
        own_file: The run's own SQLite file, if it has one: removed as a whole, so that a damaged one can be left behind.
    """
    if own_file is not None:
        for file in (
            own_file,
            *own_file.parent.glob(f"{own_file.name}-*"),
        ):  # the database, its journal and write-ahead log
            file.unlink(missing_ok=True)
        return
    try:
        optuna.delete_study(study_name=name, storage=url)
    except KeyError:
        pass
    except _OPENING_ERRORS as error:
        raise _unusable(url, error) from error


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two settings, one line each. Compared as JSON, as they are stored."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def _limits(settings: Mapping[str, Any]) -> dict[str, float]:
    """Limits on what is measured; every candidate keeps the others."""
    return measured_limits(parse_limits(settings.get("maximum", ())))


def _trial(frozen: FrozenTrial, x: tuple[int, ...], limits: Mapping[str, float]) -> Trial:
    values = dict(frozen.user_attrs.get("values", {}))
    state = {"COMPLETE": TrialState.COMPLETE, "FAIL": TrialState.FAILED}.get(frozen.state.name, TrialState.RUNNING)
    return Trial(
        number=frozen.number,
        round=frozen.user_attrs["round"],
        x=x,
        origin=frozen.user_attrs["origin"],
        state=state,
        seconds=values.pop("seconds", None),
        values=values,
        failure=frozen.user_attrs.get("failure"),
        feasible=state is not TrialState.COMPLETE or feasible(values, limits),
        why=frozen.user_attrs.get("why", ""),
        source=_source(frozen.user_attrs),
    )


def _rounds(study: optuna.Study) -> list[list[Proposal]]:
    keys = sorted(key for key in study.user_attrs if key.startswith(_ROUND))
    return [
        [
            Proposal(tuple(item["x"]), item["origin"], item.get("why", ""), _source(item))
            for item in study.user_attrs[key]
        ]
        for key in keys
    ]


def _source(record: Mapping[str, Any]) -> Source:
    return Source.restored(record.get("source"), record["origin"])


def _sqlite_path(url: str) -> Path | None:
    """The file behind a SQLite URL, whatever driver and options it names; None for other databases."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        return None
    return Path(str(parsed.database).removeprefix("file:"))


def shown_url(url: str) -> str:
    """A database URL without its password, which may stand before the host or among the options."""
    head, at, tail = url.partition("?")[0].rpartition("@")
    return f"{head.split('//')[0]}//…@{tail}" if at else tail


def _unusable(url: str, error: Exception) -> StorageError:
    reason = first_line(getattr(error, "orig", None) or error.__cause__ or error)
    remedy = "restore it, choose another --name or --storage, or start over with --fresh"
    return StorageError(f"The database {shown_url(url)} cannot be used ({reason}): {remedy}.")
