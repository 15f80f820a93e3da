"""SIGKILL at any moment loses at most the running trial: a resumed run is the run that was never stopped."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from llmbo.run.store import TrialStore
from llmbo.run.stored import stored_run
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.loop import run_search
from llmbo.types import Measurement, Proposal, Trial

BUDGET, Q, SEED = 14, 4, 2
SETTINGS = {"seed": SEED, "objectives": ["kl", "params_share"], "reference_point": None, "maximum": []}
TIMEOUT = 120.0  # seconds; only a hanging child reaches it

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


class Start(Protocol):
    def __call__(self, url: str, dies_at: tuple[str, int] | None = None) -> multiprocessing.process.BaseProcess: ...


@dataclass
class Mortal:
    """An observer and evaluator that kills its own process at the n-th event of a kind."""

    toy: Any
    event: str
    countdown: int

    def _happens(self, event: str) -> None:
        if event == self.event:
            self.countdown -= 1
            if self.countdown < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    at_once = 1

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        self._happens("evaluate")  # started, not finished
        return [self.toy.evaluate(x) for x in batch]

    def on_proposing(self, round: int) -> None:
        self._happens("proposing")

    def on_trial_start(self, proposal: Proposal, number: int) -> None:
        self._happens("start")  # the round is stored, the trial is not

    def on_trial_end(self, trial: Trial, trials: Sequence[Trial]) -> None:
        self._happens("end")


@pytest.fixture
def start(toy: Any, facts: dict[str, Any]) -> Start:
    """Run, or continue, the search in a process of its own."""

    def begin(url: str, dies_at: tuple[str, int] | None = None) -> multiprocessing.process.BaseProcess:
        def work() -> None:
            proposer = QNehviProposer(toy.family, toy.objectives, toy.dense, num_initial=6)
            store = TrialStore.create(url, "run", toy.space, toy.objectives, SETTINGS, facts)
            mortal = Mortal(toy, *(dies_at or ("never", 0)))
            run_search(proposer, mortal, store, BUDGET, Q, SEED, mortal)

        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        return process

    return begin


@pytest.fixture
def story(toy: Any) -> Callable[[str], list[tuple[object, ...]]]:
    def read(url: str) -> list[tuple[object, ...]]:
        store = TrialStore.create(url, "run", toy.space, toy.objectives, {}, {})
        return [
            (trial.number, trial.round, trial.x, trial.origin, trial.state, dict(trial.values), trial.windows)
            for trial in store.trials()
        ]

    return read


def finish(process: multiprocessing.process.BaseProcess) -> None:
    process.join(TIMEOUT)
    assert process.exitcode == 0


@pytest.fixture
def uninterrupted(start: Start, tmp_path: Path) -> tuple[str, float]:
    """A whole run and the seconds it took."""
    url, begin = f"sqlite:///{tmp_path / 'whole.db'}", time.perf_counter()
    finish(start(url))
    return url, time.perf_counter() - begin


def test_killed_at_every_kind_of_moment(
    start: Start, story: Callable[[str], list[tuple[object, ...]]], uninterrupted: tuple[str, float], tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'killed.db'}"
    for moment in [
        ("proposing", 0),
        ("start", 0),
        ("evaluate", 2),
        ("end", 1),
        ("evaluate", 0),
        ("evaluate", 0),
        ("proposing", 1),
        ("start", 3),
    ]:
        process = start(url, moment)
        process.join(TIMEOUT)
        assert process.exitcode == -signal.SIGKILL, moment
    finish(start(url))
    assert story(url) == story(uninterrupted[0])
    assert len(story(url)) == BUDGET


def test_killed_at_random_moments(
    start: Start, story: Callable[[str], list[tuple[object, ...]]], uninterrupted: tuple[str, float], tmp_path: Path
) -> None:
    url, rng, kills = f"sqlite:///{tmp_path / 'killed.db'}", random.Random(time.time_ns()), 0
    done = 0
    while kills < 6:
        process = start(url)
        process.join(rng.uniform(0, uninterrupted[1] / 3))
        if process.exitcode is not None:  # it got to the end first
            break
        process.kill()
        process.join(TIMEOUT)
        kills += 1
        found = stored_run(url, "run")
        assert done <= (done := found[2] if found else 0)  # what was finished stays finished
    assert kills >= 3
    finish(start(url))
    assert story(url) == story(uninterrupted[0])


@pytest.mark.parametrize("milliseconds", [2, 10, 20, 40, 80, 120])
def test_killed_while_the_database_is_made(start: Start, tmp_path: Path, milliseconds: int) -> None:
    """Whatever stage the file was left in, the same command neither refuses it nor takes it for damaged."""
    url = f"sqlite:///{tmp_path / 'killed.db'}"
    process = start(url, ("proposing", 0))
    time.sleep(milliseconds / 1000)
    process.kill()
    process.join(TIMEOUT)
    stored_run(url, "run")
    again = start(url, ("proposing", 0))
    again.join(TIMEOUT)
    assert again.exitcode == -signal.SIGKILL  # it came as far as proposing
