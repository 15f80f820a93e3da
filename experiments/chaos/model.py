"""A real model's run that is to be harmed: `llmbo optimize` and `llmbo worker`, as anyone types them."""

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

from experiments.chaos.check import SEED, Verdict, judged
from experiments.chaos.processes import NAME, Machine
from experiments.quiet import Quiet
from llmbo.__main__ import main
from llmbo.config import RunConfig
from llmbo.run.assemble import assemble
from llmbo.run.rebuild import read_run
from llmbo.run.store import TrialStore
from llmbo.run.stored import stored_run

# Evaluations of about half a second: else a process that is started again would spend its life on starting.
SMALL = ("--window", "128", "--proxy-tokens", "256", "--calibration-tokens", "1024", "--heldout-tokens", "128",
         "--refit-anchors", "0", "--no-samples", "--heldout-text", "none")  # fmt: skip


@dataclass(frozen=True)
class Searched:
    """A search of a model, which all processes prepare in one place.

    Args:
        folder: Of all machines.
        options: Further words of `llmbo optimize`.
    """

    model: str
    strategy: str
    budget: int
    folder: Path
    options: Sequence[str] = SMALL

    def run(self, machine: Machine, leads: bool) -> NoReturn:
        """The command line, until it ends."""
        machine.enter(machine.folder.with_suffix(".log"))
        os.environ["LLMBO_PREPARED"] = str(self.folder / "prepared")
        sys.argv = ["llmbo", *(self._begins(machine) if leads else ("worker", machine.url, "--name", NAME))]
        code: object = 1
        try:
            main()
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        os._exit(code if isinstance(code, int) else 1)

    def verdict(self, url: str) -> Verdict:
        """By what the stored settings measure in one process, one by one, with a preparation of its own."""
        found = stored_run(url, NAME)
        assert found
        settings, facts, _ = found
        config = RunConfig.from_settings({**settings, **facts["free"]}, name="alone", budget=self.budget)
        own = patch.dict(os.environ, LLMBO_PREPARED=str(self.folder / "prepared-alone"))
        with own, chdir(self.folder), assemble(config, True, Quiet()) as parts:  # type: ignore[arg-type]
            store = TrialStore.open(url, NAME, parts.problem.space)
            measure = parts.problem.proxy.evaluate
            return judged(store, self.budget, lambda points: [measure([x])[0] for x in points], parts.proposer)

    def reports(self) -> list[str]:
        """What the machines' reports say of the run."""
        found = self.folder.glob(f"machine-*/runs/{NAME}/report.json")
        return [read_run(str(path.parent)).run.status for path in found]

    def _begins(self, machine: Machine) -> Sequence[str]:
        own = (
            "--name",
            NAME,
            "--storage",
            machine.url,
            "--strategy",
            self.strategy,
            "--budget",
            str(self.budget),
            "--seed",
            str(SEED),
        )
        return ("optimize", "--model", self.model, *own, *self.options)
