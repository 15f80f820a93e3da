"""What a run asks of its database: statements and writes of a trial, and the trials per second that it holds.

    python -m experiments.database_load --workers 2 --budget 400
    python -m experiments.database_load --storage postgresql+psycopg://user@host/empty --shape "80 layers"

Without `--storage` it is a PostgreSQL of its own on this machine, which writes to the disk what it commits.
The loop, the store, leases and claims are those of a run, and every worker is a process of its own. Candidates are random and an
evaluation takes no time, so all that is left is the database and its clients: on one machine both share its cores. Statements are counted
by SQLAlchemy in every process, as they are sent: one may hold several rows. Quarters of the budget tell whether a trial becomes dearer
the more there are. Processor time tells what a core holds where other programs slow all of it down.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy import Engine, create_engine, event, text

from experiments.chaos.servers import PostgreSQL, postgresql
from experiments.proposal_time.__main__ import SHAPES, search_space
from experiments.quiet import Quiet
from experiments.worker_scaling.__main__ import Unwatched
from llmbo.problem.objectives import build_objectives
from llmbo.problem.proxy import known_values
from llmbo.problem.space import SearchSpace
from llmbo.run.database import open_storage
from llmbo.run.lease import Pulse, leased
from llmbo.run.lock import locked
from llmbo.run.records import frozen_trials
from llmbo.run.store import TrialStore
from llmbo.run.team import joined
from llmbo.search import loop
from llmbo.search.baselines import RandomProposer
from llmbo.types import Measurement

NAME = "load"
NAMES = ("kl", "params_share")
WINDOWS = 12  # values that a trial keeps for each quality, as with the default proxy
WRITES = ("INSERT", "UPDATE", "DELETE")


class Counted:
    """Implements `llmbo.types.Evaluator`; counts statements from its making on."""

    at_once = 1

    def __init__(self, space: SearchSpace) -> None:
        self._space, self.counts = space, Counter[str]()
        event.listen(Engine, "before_cursor_execute", self._statement)
        event.listen(Engine, "commit", lambda connection: self.counts.update(["COMMIT"]))

    def _statement(self, connection: object, cursor: object, statement: str, *rest: object) -> None:
        self.counts[statement.split(None, 1)[0].upper()] += 1

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        return [self._measured(x) for x in batch]

    def _measured(self, x: tuple[int, ...]) -> Measurement:
        found = {**known_values(self._space, x), "kl": 0.1, "loss": 3.1, "perplexity": 22.2}
        return Measurement(found, {name: [found[name]] * WINDOWS for name in ("kl", "loss")})


def own(url: str, space: SearchSpace, workers: int, budget: int, folder: Path, said: Any) -> None:
    """Be the run's owner, beside so many workers."""
    storage = open_storage(url)
    dense, smallest = {"kl": 0.0, "params_share": 1.0}, {"params_share": 0.4}
    objectives = build_objectives(NAMES, dense, smallest, (1.0, 1.0), {})
    settings = {"objectives": NAMES, "reference_point": None, "maximum": []}
    with locked(folder), leased(Pulse(storage, NAME, folder), Quiet(), folder) as lease:  # type: ignore[arg-type]
        store = TrialStore.create(storage, NAME, space, objectives, settings, {"dense": dense}, lease)
        said.put("begun")
        while store.size() < workers:
            time.sleep(0.05)
        evaluator = Counted(space)
        loop.run_search(RandomProposer(space), evaluator, store, budget, 4, 0, Unwatched())
    said.put((evaluator.counts, "owner", time.process_time()))


def help_out(url: str, space: SearchSpace, budget: int, folder: Path, said: Any) -> None:
    """Be a worker."""
    storage = open_storage(url)
    with joined(storage, NAME, folder, {"device": "none"}) as team:
        store = TrialStore(optuna.load_study(study_name=NAME, storage=storage), space, team=team)
        evaluator = Counted(space)
        loop.run_search(RandomProposer(space), evaluator, store, budget, 4, 0, Unwatched())
    said.put((evaluator.counts, "workers", time.process_time()))


def size_of(url: str) -> int:
    """Bytes of a database of PostgreSQL's; 0 of others."""
    if not url.startswith("postgresql"):
        return 0
    with create_engine(url).connect() as connection:
        return int(connection.execute(text("select pg_database_size(current_database())")).scalar_one())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", help="URL of an empty database, as `llmbo optimize` takes it")
    parser.add_argument("--shape", default="SmolLM2-135M", choices=SHAPES)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--budget", type=int, default=400)
    args = parser.parse_args()
    if args.storage:
        return load(args.storage, args.shape, args.workers, args.budget)
    with postgresql(synced=True) as server:
        load(server.database(), args.shape, args.workers, args.budget, server)


def load(url: str, shape: str, workers: int, budget: int, server: PostgreSQL | None = None) -> None:
    """Fill a database, and print what that took."""
    space, _ = search_space(SHAPES[shape])
    open_storage(url)  # makes its tables
    before, idle = size_of(url), server.seconds() if server else 0.0
    context = get_context("fork")
    said, counts = context.Queue(), Counter[str]()
    seconds = {"owner": 0.0, "workers": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        owner = context.Process(target=own, args=(url, space, workers, budget, at / "owner", said))
        owner.start()
        assert said.get() == "begun"
        others = [
            context.Process(target=help_out, args=(url, space, budget, at / f"{number}", said))
            for number in range(1, workers)
        ]
        for other in others:
            other.start()
        for _ in range(workers):
            found, who, taken = said.get()
            counts += found
            seconds[who] += taken
        for process in (owner, *others):
            process.join()
    if server:
        seconds["server"] = server.seconds() - idle
    trials = frozen_trials(optuna.load_study(study_name=NAME, storage=open_storage(url)))
    ends = sorted(trial.datetime_complete for trial in trials if trial.datetime_complete)
    assert len(ends) == budget
    quarter = len(ends) // 4
    rates = [
        quarter / (ends[n * quarter + quarter - 1] - ends[max(0, n * quarter - 1)]).total_seconds() for n in range(4)
    ]
    reads, writes = counts["SELECT"], sum(counts[kind] for kind in WRITES)
    print(f"{shape}, {space.d} parameters a trial, {workers} processes, {os.cpu_count()} cores, {budget} trials")
    print(f"trials/s by quarters of the budget: {' '.join(f'{rate:.1f}' for rate in rates)}")
    each = {"SELECT": reads, "writes": writes, **{kind: counts[kind] for kind in WRITES}, "COMMIT": counts["COMMIT"]}
    print(f"statements a trial: {', '.join(f'{count / budget:.1f} {kind}' for kind, count in each.items())}")
    print(f"kB a trial, indices among them: {(size_of(url) - before) / budget / 1e3:.1f}")
    shares = ", ".join(f"{1e3 * taken / budget:.0f} {who}" for who, taken in seconds.items())
    print(f"ms of a processor a trial: {shares}")


if __name__ == "__main__":
    main()
