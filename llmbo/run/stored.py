"""Looking at a stored run from outside: whether it is there, how it was set up, how far it has come. Writes nothing."""

from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from llmbo.config import EARLIER, RESTATED, RunConfig, restated
from llmbo.errors import StorageError
from llmbo.run.database import explained, find_storage, shown_url
from llmbo.run.records import check_settings, digest_elsewhere, frozen_trials, heldout_of, rounds_of, trial_of
from llmbo.types import Trial


def follow_run(url: str, name: str) -> tuple[dict[str, Any], dict[str, Any], list[Trial], list[FrozenTrial]] | None:
    """Settings, facts and trials of a stored run without its model, hence trials without `x`; None if there is no run yet.

    The last part is trials as Optuna has them, by number. Only reads, so that any number of watchers may follow a run that goes on.

    Raises:
        StorageError: The database is there but cannot be read.
    """
    storage = find_storage(url)
    if storage is None:
        return None
    with explained(url):
        try:
            study = optuna.load_study(study_name=name, storage=storage)
        except KeyError:
            return None
        attributes, frozen = study.user_attrs, frozen_trials(study)
        if "settings" not in attributes or "facts" not in attributes:
            if not frozen:  # killed while the study was made
                return None
            raise StorageError(
                f"The study '{name}' in {shown_url(url)} was not written by llmbo: choose another --name."
            )
        settings, facts = attributes["settings"], attributes["facts"]
        check_settings(settings, facts)
        rounds_of(attributes), heldout_of(attributes), heldout_of(attributes, digest_elsewhere(facts))
        trials = [trial_of(trial, number, (), settings) for number, trial in enumerate(frozen)]
        return settings, facts, trials, frozen


def moments_of(frozen: Sequence[FrozenTrial]) -> list[datetime]:
    """When trials started and ended, by the clocks of those who ran them."""
    return [moment for trial in frozen for moment in (trial.datetime_start, trial.datetime_complete) if moment]


def run_in(url: str) -> str:
    """The name of the one run in a database.

    Raises:
        StorageError: There is none, or several.
    """
    storage = find_storage(url)
    with explained(url):
        names = (
            []
            if storage is None
            else sorted(one.study_name for one in storage.get_all_studies() if "settings" in one.user_attrs)
        )
    if len(names) != 1:
        there = f"the runs {', '.join(names)}" if names else "no run yet"
        raise StorageError(f"{shown_url(url)} holds {there}: say which with --name.")
    return names[0]


def stored_run(url: str, name: str) -> tuple[dict[str, Any], dict[str, Any], int] | None:
    """Settings, facts and number of finished trials of a stored run, or None if there is none.

    Raises:
        StorageError: The database is there but cannot be read.
    """
    found = follow_run(url, name)
    return found and (found[0], found[1], sum(trial.seconds is not None for trial in found[2]))


def as_started(config: RunConfig, url: str) -> RunConfig:
    """The config of a stored run where this one leaves it open: in settings that the run is older than, and in its number of tokens."""
    found = stored_run(url, config.name)
    if found is None:
        return config
    default = {item.name: item.default for item in fields(RunConfig)}
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in found[0].items()}
    before = restated(stored)
    names = [name for name in EARLIER if name not in stored]
    names += RESTATED if "advisor_warm_start" not in stored else ()
    names += ["quantize"] if stored.get("quantize") == "" else ()
    older = {
        name: before[name]
        for name in names
        if name in before and getattr(config, name) in (default[name], stored.get(name))  # left open, or typed as then
    }
    if not config.calibration_tokens:
        older["calibration_tokens"] = found[0].get("calibration_tokens", 0)
    if config.refit_anchors is None:
        older["refit_anchors"] = before["refit_anchors"]
    return replace(config, **older)
