"""The story of a run: propose, evaluate, store, repeat. Knows roles, not kinds."""

import math
import time
from collections.abc import Callable
from itertools import count

from llmbo.errors import EvaluationError, out_of_memory
from llmbo.types import Evaluator, Observer, Proposal, Proposer, Store, TrialState

MAX_CONSECUTIVE_FAILURES = 3
SEEDS_PER_RUN = 1_000_003  # a prime larger than any number of rounds, so that no two runs share a round's seed


def run_search(
    proposer: Proposer,
    evaluator: Evaluator,
    store: Store,
    budget: int,
    q: int,
    seed: int,
    observer: Observer,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Evaluate up to `budget` candidates, `q` proposed at a time, going on from whatever `store` holds.

    Proposals of a round see all earlier rounds and nothing else. They are stored before the first is evaluated.

    Raises:
        EvaluationError: Several candidates in a row could not be evaluated; what was measured stays stored.
    """
    first = 0  # number of the round's first trial
    for round_number in count():
        if first >= budget:
            return
        rounds = store.rounds()
        if round_number == len(rounds):
            observer.on_proposing(round_number)
            proposals = proposer.propose(store.trials(), q, seed * SEEDS_PER_RUN + round_number)
            if not proposals:
                return
            store.add_round(proposals)
            rounds = store.rounds()
        for offset, proposal in enumerate(rounds[round_number][: budget - first]):
            _evaluate(evaluator, store, first + offset, round_number, proposal, observer, clock)
        first += len(rounds[round_number])


def _evaluate(
    evaluator: Evaluator,
    store: Store,
    number: int,
    round_number: int,
    proposal: Proposal,
    observer: Observer,
    clock: Callable[[], float],
) -> None:
    """Evaluate one stored proposal unless an earlier process already has."""
    trials = store.trials()
    if number < len(trials) and trials[number].state is not TrialState.RUNNING:
        return
    observer.on_trial_start(proposal, number)
    store.start(number, round_number, proposal)
    start = clock()
    try:
        values = evaluator.evaluate(proposal.x)
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        failure = f"{bad[0]} is {values[bad[0]]}" if bad else None
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        failure = "out of memory"
    if failure is None:
        store.finish(number, values, clock() - start)
    else:
        store.fail(number, failure, clock() - start)
    trials = store.trials()
    observer.on_trial_end(trials[number], trials)
    last = trials[max(0, number + 1 - MAX_CONSECUTIVE_FAILURES) : number + 1]
    if len(last) == MAX_CONSECUTIVE_FAILURES and all(trial.state is TrialState.FAILED for trial in last):
        remedy = "free memory, use a smaller --window or another --dtype, then run the same command again"
        raise EvaluationError(f"{len(last)} candidates in a row failed ({failure}): {remedy}.")
