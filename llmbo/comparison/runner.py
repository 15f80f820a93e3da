"""Runs the arms: every strategy gets the same problem, the same initial design, the same number of evaluations."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from llmbo.comparison.config import Arm, CompareConfig
from llmbo.comparison.problems import OpenProblem
from llmbo.comparison.store import EvaluationStore, Round
from llmbo.comparison.strategies import strategy_of
from llmbo.config.objectives import feasible
from llmbo.errors import StrategyError
from llmbo.problem.objectives import outcomes, ref_point, to_maximize
from llmbo.report import front_of
from llmbo.search.contract import broken_rule
from llmbo.search.loop import SEEDS_PER_RUN
from llmbo.search.pareto import hypervolume, hypervolume_trace
from llmbo.types import Proposal, Source, Trial, TrialState


@dataclass(frozen=True)
class Judgement:
    """The front of an arm's first `evaluations` trials.

    Args:
        hypervolume: On the proxy values.
        heldout: Hypervolume of `points` by their held-out values, for each quality of `OpenProblem.judged`.
        points: Numbers of the trials measured on held-out windows.
    """

    evaluations: int
    hypervolume: float
    heldout: Mapping[str, float]
    points: tuple[int, ...]


@dataclass(frozen=True)
class Outcome:
    """One arm under one seed, finished.

    Args:
        trace: Hypervolume after each trial; shorter than the budget where the strategy had nothing left to propose.
        seconds: Proposing and evaluating, summed up to each trial. Evaluations count with the time of their first measurement.
        proposal_seconds: Of every round.
    """

    arm: Arm
    seed: int
    trials: tuple[Trial, ...]
    trace: tuple[float, ...]
    seconds: tuple[float, ...]
    proposal_seconds: tuple[float, ...]
    judgements: tuple[Judgement, ...]


class Watcher(Protocol):
    """Is told how far a comparison is."""

    def on_evaluation(self, arm: Arm, seed: int, done: int) -> None: ...

    def on_outcome(self, outcome: Outcome) -> None: ...

    def note(self, text: str) -> None:
        """What the user should know, in one line."""


def run_arm(
    arm: Arm,
    seed: int,
    key: str,
    config: CompareConfig,
    problem: OpenProblem,
    store: EvaluationStore,
    watcher: Watcher,
    clock: Callable[[], float] = time.perf_counter,
) -> Outcome:
    """Run one arm under one seed, going on from whatever `store` holds under `key`.

    Raises:
        StrategyError: The strategy proposes too many candidates, illegal ones, or the same again.
    """
    options = {
        key: value.replace("{seed}", str(seed)) if isinstance(value, str) else value
        for key, value in arm.options.items()
    }
    proposer = strategy_of(arm.strategy).build(
        problem.search, problem.objectives, options, lambda line: watcher.note(f"{arm.label}, seed {seed}: {line}")
    )
    stored = store.rounds(config.name, key)
    trials: list[Trial] = []
    seconds: list[float] = []
    rounds: list[Round] = []
    spent = 0.0
    for number in count():
        if len(trials) >= config.budget:
            break
        if number == len(stored):
            start = clock()
            proposals = proposer.propose(trials, config.batch, seed * SEEDS_PER_RUN + number)
            made = Round(tuple(proposals), clock() - start)
            _check_proposals(arm, made.proposals, trials, config.batch, problem)
            store.add_round(config.name, key, number, made)
            stored.append(made)
        rounds.append(stored[number])
        spent += stored[number].seconds
        if not stored[number].proposals:
            break
        for proposal in stored[number].proposals[: config.budget - len(trials)]:
            trials.append(_evaluated(proposal, len(trials), number, problem))
            spent += trials[-1].seconds or 0.0
            seconds.append(spent)
            watcher.on_evaluation(arm, seed, len(trials))
    complete = [trial for trial in trials if trial.complete]
    trace = iter(hypervolume_trace(outcomes(complete, problem.objectives), ref_point(problem.objectives)))
    last, full = 0.0, list[float]()
    for trial in trials:
        last = next(trace) if trial.complete else last
        full.append(last)
    judgements = tuple(_judged(trials, full, evaluations, problem, config) for evaluations in config.checkpoints)
    outcome = Outcome(
        arm, seed, tuple(trials), tuple(full), tuple(seconds), tuple(made.seconds for made in rounds), judgements
    )
    watcher.on_outcome(outcome)
    return outcome


def check_designs(outcomes: Sequence[Outcome]) -> None:
    """Refuse a comparison whose strategies did not start alike.

    Raises:
        StrategyError: Two arms with the same initial design and seed began with different trials.
    """
    first: dict[tuple[str, object, int], Outcome] = {}
    for outcome in outcomes:
        strategy = strategy_of(outcome.arm.strategy)
        if strategy.design is None:
            continue
        other = first.setdefault((strategy.design, outcome.arm.problem, outcome.seed), outcome)
        shared = min(_num_initial(outcome), _num_initial(other), len(outcome.trials), len(other.trials))
        if [trial.x for trial in outcome.trials[:shared]] != [trial.x for trial in other.trials[:shared]]:
            raise StrategyError(
                f"The strategies {outcome.arm.label} and {other.arm.label} (seed {outcome.seed}) did not start with the same "
                f"{shared} {strategy.design} trials."
            )


def judged_numbers(front: Sequence[Trial], points: int) -> list[Trial]:
    """Equally many of every front, spread evenly: a longer list of points alone would raise hypervolume."""
    if len(front) <= points:
        return list(front)
    return [front[round(index * (len(front) - 1) / (points - 1))] for index in range(points)]


def _num_initial(outcome: Outcome) -> int:
    """Trials of the initial design before those that an advisor may fill: what it does with them is what is compared."""
    size = int({**strategy_of(outcome.arm.strategy).options, **outcome.arm.options}["num_initial"])
    own = [trial.source for trial in outcome.trials[:size]]
    return own.index(Source.WARM_START) if Source.WARM_START in own else size


def _check_proposals(
    arm: Arm, proposals: Sequence[Proposal], trials: Sequence[Trial], q: int, problem: OpenProblem
) -> None:
    if fault := broken_rule(proposals, trials, q, problem.space):
        raise StrategyError(f"The strategy {arm.label} proposed {fault}, after {len(trials)} evaluations.")


def _evaluated(proposal: Proposal, number: int, round_number: int, problem: OpenProblem) -> Trial:
    evaluation = problem.measure(proposal.x, proposal.origin)
    complete = all(math.isfinite(value) for value in evaluation.values.values())
    return Trial(
        number,
        round_number,
        proposal.x,
        proposal.origin,
        TrialState.COMPLETE if complete else TrialState.FAILED,
        evaluation.values if complete else {},
        evaluation.seconds,
        feasible=complete and feasible(evaluation.values, problem.search.limits),
        source=proposal.source,
        recipe=proposal.recipe,
        predicted=proposal.predicted,
    )


def _judged(
    trials: Sequence[Trial], trace: Sequence[float], evaluations: int, problem: OpenProblem, config: CompareConfig
) -> Judgement:
    volume = trace[min(evaluations, len(trials)) - 1] if trials else 0.0
    if problem.judge is None:
        return Judgement(evaluations, volume, {}, ())
    chosen = judged_numbers(front_of(trials[:evaluations], problem.objectives), config.judged_points)
    values = [problem.judge(trial.x, trial.origin).values for trial in chosen]
    heldout = {
        quality: hypervolume(to_maximize(values, objectives), ref_point(objectives))
        for quality, objectives in problem.judged.items()
    }
    return Judgement(evaluations, volume, heldout, tuple(trial.number for trial in chosen))
