"""What a second worker is worth on this machine: two processes with a thread each against one, on the same candidates of a real model.

    python -m experiments.worker_scaling.real --model llama --budget 24 --repeats 2 --dtype bfloat16

Needs a machine that does nothing else. All candidates are random and proposed at once, so that both runs have the same, and each is timed
alone in the first run. Counted is the time from the second process's first candidate until one of the two finds none left: what they do
then, in seconds of one process alone, over twice that time, is the efficiency. Claims, stores and looks at the database are in it; loading,
and the one candidate that a worker evaluates to be admitted, are not.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from llmbo.run.database import open_storage
from llmbo.run.records import frozen_trials
from llmbo.run.team import Team

SMALL = [
    "--calibration-tokens",
    "2048",
    "--refit-anchors",
    "0",
    "--heldout-text",
    "none",
    "--heldout-tokens",
    "256",
    "--no-samples",
]


@dataclass(frozen=True)
class Timed:
    """A trial: who evaluated it, and from when to when, in seconds by this machine's clock."""

    by: str
    start: float
    end: float

    @classmethod
    def of(cls, trial: FrozenTrial, by: str) -> "Timed":
        assert trial.datetime_start and trial.datetime_complete
        return cls(by, trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())

    def within(self, first: float, last: float) -> float:
        """The part of it that lies between two moments."""
        return max(0.0, min(last, self.end) - max(first, self.start)) / (self.end - self.start)


def efficiency(alone: Sequence[Timed], team: Sequence[Timed]) -> tuple[float, float, int]:
    """Of a team, by the same trials alone, each from the last one's end to its own; and over how many seconds and about how many trials."""
    names, order = {one.by for one in team}, sorted(alone, key=lambda one: one.end)
    before = dict(zip([one.end for one in order], [order[0].start, *(one.end for one in order)], strict=False))
    first = max(min(one.start for one in team if one.by == name) for name in names)
    last = min(max(one.end for one in team if one.by == name) for name in names)
    parts = [one.within(first, last) for one in team]
    worth = sum(part * (one.end - before[one.end]) for part, one in zip(parts, alone, strict=True))
    return worth / (len(names) * (last - first)), last - first, round(sum(parts))


def timed(folder: Path, name: str, words: Sequence[str]) -> list[Timed]:
    """The trials of a run of the command line, by number."""
    command = [sys.executable, "-m", "llmbo", "optimize", "--name", name, "--quiet", *SMALL, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LLMBO_PREPARED": str(folder / "prepared")}
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL)
    storage = open_storage(f"sqlite:///{folder}/runs/{name}/study.db")
    holders = Team(storage, name).holders()
    trials = frozen_trials(optuna.load_study(study_name=name, storage=storage))
    by = [str(holders[number].user_attrs["by"]) if number in holders else "owner" for number in range(len(trials))]
    return [Timed.of(trial, one.replace("lease 0", "owner")) for trial, one in zip(trials, by, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--budget", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    words = [
        "--model",
        str(Path(args.model).absolute()) if Path(args.model).exists() else args.model,
        "--dtype",
        args.dtype,
    ]
    words += ["--strategy", "random", "--budget", str(args.budget), "--batch", str(args.budget)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            alone = timed(Path(folder), f"alone{repeat}", [*words, "--device", "cpu"])
            team = timed(Path(folder), f"team{repeat}", [*words, "--devices", "cpu,cpu"])
            share, seconds, trials = efficiency(alone, team)
            found.append(share)
            mean = statistics.mean(one.end - one.start for one in alone)
            both = statistics.mean(one.end - one.start for one in team)
            print(f"efficiency {share:.3f} of two, over {seconds:.0f} s and {trials} candidates", end=": ")
            print(f"{mean:.2f} s each alone, {both:.2f} s in company", flush=True)
    print(f"median of {args.repeats}: {statistics.median(found):.3f}")


if __name__ == "__main__":
    main()
