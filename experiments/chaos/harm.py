"""Processes that are killed, suspended, sent away and started again until what they do together is done."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing import get_context
from multiprocessing.process import BaseProcess

from optuna.storages import BaseStorage

from experiments.chaos.processes import NAME, REFUSED, Machine
from experiments.chaos.servers import PostgreSQL
from llmbo.errors import LlmboError
from llmbo.run.database import ERRORS, open_storage
from llmbo.run.lease import Pulse, records

Start = Callable[[Machine, bool], object]  # a process's work, and whether it begins as the run's owner
LOOK = 0.05  # seconds between two looks at the processes


@dataclass
class Harm:
    """Keeps one process on each machine, and harms them at random.

    Args:
        machines: The first starts the run; where it is refused since another process owns it, it joins as a worker.
        server: Of the database; None for files.
        budget: Trials after which the run is done.
        kills: That many faults, each when the run has come as far as its share of the budget.
        wait: Seconds until a fault, at most, once its share is reached.
        random: Which and when.
    """

    machines: list[Machine]
    start: Start
    server: PostgreSQL | None
    budget: int
    kills: int
    wait: float
    random: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    crashes: int = 0
    starts: int = 0
    _processes: dict[int, BaseProcess] = field(default_factory=dict)
    _asleep: dict[int, float] = field(default_factory=dict)  # pid -> when it wakes up
    _joins: bool = False

    def until_done(self, longest: float) -> bool:
        """Whether all processes came to an end by themselves within so many seconds."""
        begin = time.monotonic()
        done: set[int] = set()
        fault = begin
        try:
            while len(done) < len(self.machines):
                if time.monotonic() - begin > longest:
                    return False
                self._wake()
                for machine in self.machines:
                    if machine.number not in done and self._ended(machine):
                        done.add(machine.number)
                count = sum(self.faults.values())
                due = count < self.kills and self._progress() >= count * (self.budget - 1) // self.kills
                if not due:
                    fault = time.monotonic() + self.random.uniform(0, self.wait)
                elif time.monotonic() > fault:
                    self._harm()
                    fault = time.monotonic() + self.random.uniform(0, self.wait)
                time.sleep(LOOK)
            return True
        finally:
            for process in self._processes.values():
                process.kill()

    def _ended(self, machine: Machine) -> bool:
        """Whether this machine's process is done; started again where it was killed or refused."""
        process = self._processes.get(machine.number)
        if process is not None and process.exitcode is None:
            return False
        if process is not None and process.exitcode == 0:
            return True
        first = machine.number == self.machines[0].number
        if process is not None:
            self.crashes += process.exitcode == 1
            if first:  # whoever started the run types the same once more, and joins it where another owns it by now
                self._joins = process.exitcode == REFUSED and not self._joins
        leads = first and not self._joins
        if process is None and not leads and self._progress() < 0:
            return False  # there is no run to join yet
        self._processes[machine.number] = get_context("fork").Process(target=self.start, args=(machine, leads))
        self._processes[machine.number].start()
        self.starts += 1
        return False

    def _harm(self) -> None:
        awake = [process for process in self._alive() if process.pid not in self._asleep]
        kinds = ["kill", "kill", "stop", "leave"] if awake else []
        kinds += ["database"] if self.server else []
        last = sum(self.faults.values()) + 1 == self.kills
        if self.server and last and not self.faults["database killed"]:  # chance may have spared it
            kinds = ["database"]
        if not kinds:
            return
        kind = self.random.choice(kinds)
        if kind == "database":
            assert self.server is not None
            self.server.kill()
            time.sleep(self.random.uniform(0, 2 * self.machines[0].lease))
            self.server.start()
            self.faults["database killed"] += 1
            return
        process = self.random.choice(awake)
        who = "owner" if process.pid == self._owner() else "worker"
        assert process.pid is not None
        if kind == "stop":
            os.kill(process.pid, signal.SIGSTOP)
            self._asleep[process.pid] = time.monotonic() + self.machines[0].lease * self.random.uniform(0.5, 4)
            self.faults[f"{who} suspended"] += 1
        else:
            os.kill(process.pid, signal.SIGKILL if kind == "kill" else signal.SIGTERM)
            self.faults[f"{who} killed" if kind == "kill" else f"{who} sent away"] += 1

    def _wake(self) -> None:
        for pid in [pid for pid, due in self._asleep.items() if time.monotonic() > due]:
            del self._asleep[pid]
            os.kill(pid, signal.SIGCONT)

    def _alive(self) -> list[BaseProcess]:
        return [process for process in self._processes.values() if process.exitcode is None]

    def _progress(self) -> int:
        """Finished trials, -1 before the run is there."""
        with suppress(*ERRORS, LlmboError):
            study = self._storage.get_study_id_from_name(NAME)
            if "facts" in self._storage.get_study_user_attrs(study):
                return sum(trial.state.is_finished() for trial in records(self._storage, NAME))
        return -1

    def _owner(self) -> int | None:
        with suppress(*ERRORS, LlmboError):
            pulse = Pulse(self._storage, NAME)
            if pulse.look() is not False and pulse.epoch is not None:
                return int(pulse.epoch.user_attrs["owner"]["pid"])
        return None

    @cached_property
    def _storage(self) -> BaseStorage:
        return open_storage(self.machines[0].url)
