"""What workers are worth: hypervolume against wall-clock with 1, 2, 4, .. workers on a recorded benchmark, in simulated time.

    python -m experiments.worker_scaling --budget 120 --seeds 0 1

The loop and the proposer are those of a run. Only the store is simulated: an evaluation takes as long as the candidate has parameters
(1 for the dense model), proposing takes no time, and whoever is free starts the next candidate at once. Beside it, the same with
rounds of max(batch, workers) candidates that all wait for (`rounds`), and one worker's curve, run so many times as fast (`perfect`).

    efficiency    one worker's time to the hypervolume that both reach, over this one's and the number of workers
    against one   hypervolume after all evaluations, over one worker's after as many

Both are means over seeds, with half the width of Student's 95 % interval.
"""

import argparse
import heapq
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llmbo.comparison.config import ProblemConfig
from llmbo.comparison.recorded import open_recorded
from llmbo.comparison.statistics import Band, band
from llmbo.comparison.strategies import strategy_of
from llmbo.config import RunConfig
from llmbo.problem.objectives import Objective, outcomes, ref_point
from llmbo.search import loop
from llmbo.search.loop import run_search
from llmbo.search.pareto import hypervolume_trace
from llmbo.types import Measurement, Proposal, Proposer, Trial, TrialState

Measure = Callable[[tuple[int, ...]], Mapping[str, float]]
WATCHES = (1, 2, 4, 8, 16, 32, 64, 128)


class Unwatched:
    """Implements `llmbo.types.Observer`."""

    def on_trial_start(self, *event: object) -> None: ...

    def on_trial_end(self, *event: object) -> None: ...

    def on_proposing(self, *event: object) -> None: ...


@dataclass
class SimulatedStore:
    """The store and the evaluator of a run's owner, whose evaluations alone move the clock; the other workers evaluate meanwhile.

    Args:
        seconds: That a candidate takes.
        ended: When each trial was finished, by number.
    """

    measure: Measure
    seconds: Callable[[tuple[int, ...]], float]
    workers: int = 1
    at_once: int = 1
    clock: float = 0.0
    ended: dict[int, float] = field(default_factory=dict)
    _made: list[list[Proposal]] = field(default_factory=list)
    _trials: list[Trial] = field(default_factory=list)
    _waiting: list[int] = field(default_factory=list)
    _busy: list[tuple[float, int]] = field(default_factory=list)
    _stuck: bool = False

    def leads(self) -> bool:
        """Asked once a turn: where the last one brought nothing to do, the owner waits until another worker is done."""
        if self._stuck and self._busy:
            self._pass(self._busy[0][0])
        self._stuck = True
        return True

    def size(self) -> int:
        return self.workers

    def trials(self) -> list[Trial]:
        return list(self._trials)

    def rounds(self) -> list[list[Proposal]]:
        return self._made

    def free(self, numbers: Sequence[int]) -> list[int]:
        return [number for number in numbers if number >= len(self._trials) or number in self._waiting]

    def lost(self, numbers: Sequence[int]) -> list[int]:
        return []

    def add_round(self, proposals: Sequence[Proposal], pending: Sequence[int] = ()) -> None:
        self._stuck = False
        self._made.append(list(proposals))

    def queue(self, number: int, round_number: int, proposal: Proposal) -> None:
        if number == len(self._trials):
            self._trials.append(
                Trial(number, round_number, proposal.x, proposal.origin, TrialState.RUNNING, source=proposal.source)
            )
            self._waiting.append(number)
            self._deal()

    def start(self, number: int, round_number: int, proposal: Proposal) -> bool:
        self._stuck = False
        own = number == len(self._trials) or number in self._waiting
        if number == len(self._trials):
            self._trials.append(
                Trial(number, round_number, proposal.x, proposal.origin, TrialState.RUNNING, source=proposal.source)
            )
        elif own:
            self._waiting.remove(number)
        return own

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        self._pass(self.clock + sum(map(self.seconds, batch)))
        return [Measurement(self.measure(x)) for x in batch]

    def finish(self, number: int, found: Mapping[str, float], seconds: float) -> None:
        self._trials[number] = replace(self._trials[number], state=TrialState.COMPLETE, values=found)
        self.ended[number] = self.clock

    def fail(self, number: int, reason: str, seconds: float) -> None:
        raise AssertionError(f"trial {number}: {reason}")

    def _deal(self) -> None:
        while self._waiting and len(self._busy) < self.workers - 1:
            number = self._waiting.pop(0)
            heapq.heappush(self._busy, (self.clock + self.seconds(self._trials[number].x), number))

    def _pass(self, until: float) -> None:
        while self._busy and self._busy[0][0] <= until:
            self.clock, number = heapq.heappop(self._busy)
            self.finish(number, self.measure(self._trials[number].x), 0.0)
            self._deal()
        self.clock = until


def simulated(
    proposer: Proposer, store: SimulatedStore, budget: int, q: int, seed: int
) -> tuple[list[Trial], list[float]]:
    """The trials of a run by number, and when each was finished."""
    run_search(proposer, store, store, budget, q, seed, Unwatched())
    return store.trials(), [store.ended[trial.number] for trial in store.trials()]


def in_rounds(trials: Sequence[Trial], seconds: Callable[[tuple[int, ...]], float], workers: int) -> list[float]:
    """When each trial would be finished if every round waited for the one before it."""
    ended: list[float] = []
    free, current = [0.0] * workers, 0
    for trial in trials:
        if trial.round != current:
            free, current = [max(free)] * workers, trial.round
        ended.append(heapq.heappop(free) + seconds(trial.x))
        heapq.heappush(free, ended[-1])
    return ended


@dataclass(frozen=True)
class Curve:
    """Hypervolume after each finished trial, and when that was."""

    times: list[float]
    volumes: list[float]

    @classmethod
    def of(cls, trials: Sequence[Trial], ended: Sequence[float], objectives: Sequence[Objective]) -> "Curve":
        order = sorted(range(len(trials)), key=lambda number: (ended[number], number))
        Y = outcomes([trials[number] for number in order], objectives)
        return cls([ended[number] for number in order], hypervolume_trace(Y, ref_point(objectives)))

    def at(self, time: float) -> float:
        return max((volume for end, volume in zip(self.times, self.volumes, strict=True) if end <= time), default=0.0)

    def reaches(self, volume: float) -> float:
        """When."""
        return next(end for end, found in zip(self.times, self.volumes, strict=True) if found >= volume)


def speed_up(curve: Curve, one: Curve) -> float:
    shared = min(curve.volumes[-1], one.volumes[-1])
    return one.reaches(shared) / curve.reaches(shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", default="problem-r-surrogate")
    parser.add_argument("--strategy", default="qnehvi")
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 16, 64])
    parser.add_argument("--out", type=Path, help="JSON file for every curve")
    args = parser.parse_args()
    loop.PAUSE = 0.0  # the clock is simulated
    problem = open_recorded(ProblemConfig(RunConfig("recorded"), recorded=args.recorded), 1.0, heldout=False)
    proposer = strategy_of(args.strategy).build(problem.search, problem.objectives, {})

    def measure(x: tuple[int, ...]) -> Mapping[str, float]:
        return problem.measure(x, "").values

    def seconds(x: tuple[int, ...]) -> float:
        return measure(x)["params_share"]

    curves: dict[str, list[Curve]] = {}

    def keep(label: str, trials: Sequence[Trial], ended: Sequence[float]) -> None:
        curves.setdefault(label, []).append(Curve.of(trials, ended, problem.objectives))

    for seed in args.seeds:
        one, ended = simulated(proposer, SimulatedStore(measure, seconds), args.budget, args.batch, seed)
        keep("1", one, ended)
        for workers in args.workers:
            keep(
                f"{workers}",
                *simulated(proposer, SimulatedStore(measure, seconds, workers), args.budget, args.batch, seed),
            )
            trials = one
            if workers > args.batch:
                trials, _ = simulated(proposer, SimulatedStore(measure, seconds), args.budget, workers, seed)
            keep(f"{workers} rounds", trials, in_rounds(trials, seconds, workers))
            last = curves["1"][-1]
            curves.setdefault(f"{workers} perfect", []).append(
                Curve([time / workers for time in last.times], last.volumes)
            )
            print(f"seed {seed}, {workers} workers: done", flush=True)
        if args.out:
            rows = {label: [vars(curve) for curve in found] for label, found in curves.items()}
            args.out.write_text(json.dumps(rows), encoding="utf-8")
    end = statistics.mean(curve.times[-1] for curve in curves["1"])
    watches = [time for time in WATCHES if time < end]
    print(f"{args.budget} evaluations, seeds {', '.join(map(str, args.seeds))}; hypervolume at that time")
    print(
        f"{'workers':12} {'time':>6} {'efficiency':>15} {'against one':>17}  ",
        *(f"t={time:<5}" for time in watches),
    )
    for label, found in curves.items():
        pairs = list(zip(found, curves["1"], strict=True))
        efficiency = band([speed_up(curve, one) / int(label.split()[0]) for curve, one in pairs])
        against = band([curve.volumes[-1] / one.volumes[-1] for curve, one in pairs])
        time = statistics.mean(curve.times[-1] for curve in found)
        print(
            f"{label:12} {time:6.1f} {said(efficiency, 2):>15} {said(against, 4):>17}  ",
            *(f"{statistics.mean(curve.at(time) for curve in found):<7.4f}" for time in watches),
        )


def said(band: Band, digits: int) -> str:
    """A mean with half its interval's width, where it has one."""
    half = "" if band.high is None else f" ±{band.high - band.mean:.{digits}f}"
    return f"{band.mean:.{digits}f}{half}"


if __name__ == "__main__":
    main()
