"""The processes of a run that is to be harmed: its loop, store, lease and claims over simulated evaluations."""

import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import optuna

from experiments.chaos.check import SEED, Verdict, judged
from llmbo.errors import LlmboError
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.run import journal
from llmbo.run import lease as lease_module
from llmbo.run.database import DATABASE_ERRORS, open_storage
from llmbo.run.lease import Pulse, leased
from llmbo.run.lock import locked
from llmbo.run.patience import Patience
from llmbo.run.store import TrialStore
from llmbo.run.team import Team, serve
from llmbo.search import loop
from llmbo.types import Measurement, Proposer

NAME = "chaos"
BEATS = 6  # in the time after which a silent process is given up
LOCKED = 3  # seconds that a process holds a journal's lock after its death
REFUSED = 2  # exit code: as the command line's for whatever it can say in one line


@dataclass(frozen=True)
class Machine:
    """Where a process runs: none sees another machine's locks, so that signs of life decide.

    Args:
        folder: Its working directory.
        lease: Seconds of silence after which a process is given up.
    """

    number: int
    url: str
    folder: Path
    lease: float

    def enter(self, log: Path) -> None:
        """This process becomes one of this machine, and says what it says in `log`."""
        lease_module.SILENCE, lease_module.BEAT, loop.PAUSE = self.lease, self.lease / BEATS, self.lease / BEATS
        journal.GRACE = LOCKED
        socket.gethostname = lambda: f"machine-{self.number}"
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chdir(self.folder)
        sys.stdout = sys.stderr = log.open("a", buffering=1, encoding="utf-8")
        for number in (1, 2):  # of what does not ask Python
            os.dup2(sys.stdout.fileno(), number)


class Unseen:
    """Implements `llmbo.types.Phases` and `Observer`; notes are printed."""

    def phase(self, name: str, total: int | None = None) -> nullcontext:
        return nullcontext(lambda done: None)

    def note(self, text: str) -> None:
        print(text)

    def on_proposing(self, round: int) -> None: ...
    def on_trial_start(self, *event: object) -> None: ...
    def on_trial_end(self, *event: object) -> None: ...


@dataclass(frozen=True)
class Simulated:
    """A search whose evaluations are looked up, and take a while.

    Args:
        settings, facts: As a run stores them.
        seconds: That an evaluation takes, give or take a half.
        log: Gets a line for each that is begun.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    proposer: Proposer
    measure: Callable[[tuple[int, ...]], Measurement]
    settings: Mapping[str, Any]
    facts: Mapping[str, Any]
    budget: int
    seconds: float
    log: Path
    at_once: int = 1

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        with self.log.open("a") as log:
            log.write(f"{os.getpid()}\n" * len(batch))
        time.sleep(self.seconds * random.uniform(0.5, 1.5))
        return [self.measure(x) for x in batch]

    def run(self, machine: Machine, leads: bool) -> NoReturn:
        """Until the search is done; as the command line would, with its exit codes."""
        machine.enter(machine.folder.with_suffix(".log"))
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler)
        code = 1
        try:
            self._lead(machine) if leads else self._help(machine)
            code = 0
        except KeyboardInterrupt:
            code = 130
        except (LlmboError, *DATABASE_ERRORS, OSError) as error:
            print(f"error: {error}")
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        os._exit(code)

    def _lead(self, machine: Machine) -> None:
        storage, folder, unseen = open_storage(machine.url), machine.folder / "run", Unseen()
        with locked(folder), leased(Pulse(storage, NAME, folder), unseen, folder) as lease:
            patience = Patience(machine.url, unseen.note)
            arguments = (self.space, self.objectives, self.settings, self.facts, lease, patience)
            self._search(TrialStore.create(storage, NAME, *arguments))

    def _help(self, machine: Machine) -> None:
        patience = Patience(machine.url, Unseen().note)

        def work(team: Team) -> None:
            self._search(patience(lambda: TrialStore.open(machine.url, NAME, self.space, team, patience)))

        serve(patience, NAME, machine.folder / f"worker-{os.getpid()}", {"device": "none"}, work)

    def _search(self, store: TrialStore) -> None:
        loop.run_search(self.proposer, self, store, self.budget, 2, SEED, Unseen())

    def verdict(self, url: str) -> Verdict:
        """By what is looked up."""
        store = TrialStore(optuna.load_study(study_name=NAME, storage=open_storage(url)), self.space)
        return judged(store, self.budget, lambda points: [self.measure(x) for x in points], self.proposer)
