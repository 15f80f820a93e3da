"""What a proposal stems from is a field that both stores keep; its origin is a text that decides nothing."""

import json
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from llmbo.comparison.store import EvaluationStore, Round
from llmbo.run.store import TrialStore
from llmbo.types import Proposal, Source

ROUND = "round:00000"
FIRST_VERSION = {
    "threshold": Source.PATH,
    "advisor:warm_start": Source.WARM_START,
    "advisor:propose": Source.ADVICE,
    "advisor:directions": Source.DIRECTION,
    "qnehvi": Source.SEARCH,
}
Keep = Callable[..., list[Sequence[Any]]]


def in_study(toy: Any, folder: Path, proposals: Sequence[Proposal], with_source: bool) -> list[Sequence[Any]]:
    """Proposals and trials of a run, by another process than the one that stored them."""
    url = f"sqlite:///{folder / 'study.db'}"
    store = TrialStore.create(url, "run", toy.space, toy.objectives, {}, {})
    store.add_round(proposals)
    for number, proposal in enumerate(proposals):
        store.start(number, 0, proposal)
    if not with_source:
        study = optuna.load_study(study_name="run", storage=url)
        rounds = [{name: value for name, value in item.items() if name != "source"} for item in study.user_attrs[ROUND]]
        study.set_user_attr(ROUND, rounds)
        with sqlite3.connect(folder / "study.db") as connection:
            connection.execute("delete from trial_user_attributes where key = 'source'")
        connection.close()
    again = TrialStore.create(url, "run", toy.space, toy.objectives, {}, {})
    return [*again.rounds(), again.trials()]


def in_comparison(toy: Any, folder: Path, proposals: Sequence[Proposal], with_source: bool) -> list[Sequence[Any]]:
    """Proposals of an arm, by another process than the one that stored them."""
    with EvaluationStore.open(folder / "cache.db") as store:
        store.add_round("name", "arm", 0, Round(tuple(proposals), 1.0))
    if not with_source:
        with sqlite3.connect(folder / "cache.db") as connection:
            (stored,) = connection.execute("select proposals from rounds").fetchone()
            connection.execute(
                "update rounds set proposals = ?", (json.dumps([row[:2] for row in json.loads(stored)]),)
            )
        connection.close()
    with EvaluationStore.open(folder / "cache.db") as store:
        return [made.proposals for made in store.rounds("name", "arm")]


@pytest.mark.parametrize("keep", [in_study, in_comparison])
def test_a_source_is_stored_whatever_the_origin_says(toy: Any, tmp_path: Path, keep: Keep) -> None:
    pairs = [(origin, source) for origin in FIRST_VERSION for source in Source]
    points = toy.random_points(len(pairs), 0)
    proposals = [Proposal(x, origin, source=source) for x, (origin, source) in zip(points, pairs, strict=True)]
    for found in keep(toy, tmp_path, proposals, with_source=True):
        assert [(item.x, item.origin, item.source) for item in found] == [(p.x, p.origin, p.source) for p in proposals]


@pytest.mark.parametrize("keep", [in_study, in_comparison])
def test_a_record_of_the_first_version_gets_its_source_from_its_origin(toy: Any, tmp_path: Path, keep: Keep) -> None:
    points = toy.random_points(len(FIRST_VERSION), 0)
    proposals = [Proposal(x, origin) for x, origin in zip(points, FIRST_VERSION, strict=True)]
    for found in keep(toy, tmp_path, proposals, with_source=False):
        assert {item.origin: item.source for item in found} == FIRST_VERSION
