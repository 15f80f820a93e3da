"""A run by three processes, harmed at random until it is done: is every trial there, once, and right?

    python -m experiments.chaos --storage postgresql --kills 50 --budget 60
    python -m experiments.chaos --storage journal --kills 50 --budget 60 --model llama --lease 3

The processes run the loop, the store, the lease and the claims of a run over a recorded problem, whose evaluations are simulated, each as
if on a machine of its own; with `--model` they are `llmbo optimize` and `llmbo worker`, whose preparation is kept. Killed are (SIGKILL)
the run's owner, its workers and PostgreSQL's server; suspended (SIGSTOP), for up to four leases, and sent away (SIGTERM) are the owner
and the workers. What was killed is started again. What a candidate has alone is measured in one process when all are done.

    lost      trials without values     doubled  candidates measured for two trials
    unplanned trials of another candidate than was proposed for them       others  with other values than alone
    strayed   rounds that are not what the trials and pendings stored with them propose
    crashes   processes that ended with a traceback     starts  of processes: three where none is harmed
    evaluations  that were begun, by all together    reports  of the run that processes with a model have left
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.chaos.harm import Harm
from experiments.chaos.model import Searched
from experiments.chaos.processes import Machine, Simulated
from experiments.chaos.servers import PostgreSQL, postgresql
from llmbo.comparison.config import ProblemConfig
from llmbo.comparison.recorded import open_recorded
from llmbo.comparison.strategies import strategy_of
from llmbo.config import RunConfig
from llmbo.models.silence import silence_libraries
from llmbo.types import Measurement

MACHINES = 3
LONGEST = 1800.0  # seconds after which a run hangs


def recorded(name: str, strategy: str, budget: int, seconds: float, log: Path) -> Simulated:
    """A recorded benchmark."""
    problem = open_recorded(ProblemConfig(RunConfig("recorded"), recorded=name), 1.0, heldout=False)
    names = [objective.name for objective in problem.objectives]
    settings = {"objectives": names, "reference_point": None, "maximum": []}
    proposer = strategy_of(strategy).build(problem.search, problem.objectives, {})

    def measure(x: tuple[int, ...]) -> Measurement:
        return Measurement(problem.measure(x, "").values)

    measure(problem.space.max_levels)  # here, and not in every process: the first takes seconds
    return Simulated(
        problem.space, problem.objectives, proposer, measure, settings, {"budget": budget}, budget, seconds, log
    )


@contextmanager
def database(kind: str, folder: Path) -> Iterator[tuple[str, PostgreSQL | None]]:
    if kind == "postgresql":
        with postgresql() as server:
            yield server.database(), server
    else:
        yield f"{'journal:' if kind == 'journal' else 'sqlite:///'}{folder}/trials", None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", default="problem-r-surrogate")
    parser.add_argument("--model", help="search it in place of a recorded problem")
    parser.add_argument("--strategy", default="random")
    parser.add_argument("--storage", default="postgresql", choices=("postgresql", "journal", "sqlite"))
    parser.add_argument("--kills", type=int, default=50, help="faults of all kinds")
    parser.add_argument("--budget", type=int, default=60)
    parser.add_argument("--lease", type=float, default=1.0, help="seconds of silence")
    parser.add_argument("--seconds", type=float, default=1.0, help="that a simulated evaluation takes")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds until a fault, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--keep", type=Path, help="folder for what the processes leave behind")
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    args = parser.parse_args()
    silence_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        with database(args.storage, folder) as (url, server):
            found = chaos(args, folder, url, server)
    for kind, count in sorted(found["faults"].items()):
        print(f"{kind:20} {count:4}")
    print(" ".join(f"{name} {value}" for name, value in found.items() if name != "faults"))
    if args.out:
        args.out.write_text(json.dumps({**found, "options": vars(args)}, default=str, indent=1), encoding="utf-8")
    sys.exit(0 if found["whole"] else 1)


def chaos(args: argparse.Namespace, folder: Path, url: str, server: PostgreSQL | None) -> dict[str, Any]:
    machines = [Machine(number, url, folder / f"machine-{number}", args.lease) for number in range(MACHINES)]
    log = folder / "evaluations.log"
    work: Simulated | Searched = (
        Searched(args.model, args.strategy, args.budget, folder)
        if args.model
        else recorded(args.recorded, args.strategy, args.budget, args.seconds, log)
    )
    harm = Harm(machines, work.run, server, args.budget, args.kills, args.wait, random.Random(args.seed))
    begin = time.monotonic()
    done = harm.until_done(LONGEST)
    spent = time.monotonic() - begin
    verdict = work.verdict(url)
    more: dict[str, Any]
    if isinstance(work, Searched):
        more = {"reports": work.reports()}
        done = done and "complete" in more["reports"]
    else:
        more = {"evaluations": len(log.read_text().splitlines())}
    return {
        "faults": dict(harm.faults), "trials": args.budget, **asdict(verdict), "crashes": harm.crashes, "starts": harm.starts, **more,
        "seconds": round(spent), "whole": done and verdict.whole and not harm.crashes,
    }  # fmt: skip


if __name__ == "__main__":
    main()
