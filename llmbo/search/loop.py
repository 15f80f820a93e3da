"""The story of a run: propose, evaluate, store, repeat. Knows roles, not kinds."""

import math
import time
from collections.abc import Callable, Sequence
from itertools import count

from llmbo.errors import EvaluationError, out_of_memory
from llmbo.types import Evaluator, Measurement, Observer, Proposal, Proposer, Store, TrialState

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
        numbered = list(enumerate(rounds[round_number][: budget - first], first))
        trials = store.trials()
        left = [(n, p) for n, p in numbered if n >= len(trials) or trials[n].state is TrialState.RUNNING]
        for place in range(0, len(left), evaluator.at_once):
            _evaluate(evaluator, store, round_number, left[place : place + evaluator.at_once], observer, clock)
        first += len(rounds[round_number])


def _evaluate(
    evaluator: Evaluator,
    store: Store,
    round_number: int,
    batch: Sequence[tuple[int, Proposal]],
    observer: Observer,
    clock: Callable[[], float],
) -> None:
    """Evaluate stored proposals, numbered, together; one by one where memory does not do for all."""
    for number, proposal in batch:
        observer.on_trial_start(proposal, number)
        store.start(number, round_number, proposal)
    start = clock()
    measured: list[Measurement] | None = None
    try:
        measured = evaluator.evaluate([proposal.x for _, proposal in batch])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if measured is None and len(batch) > 1:
        for one in batch:
            _evaluate(evaluator, store, round_number, [one], observer, clock)
        return
    seconds = (clock() - start) / len(batch)
    found: Sequence[Measurement | None] = measured if measured is not None else [None]
    for (number, _), values in zip(batch, found, strict=True):
        _finish(store, number, values, seconds, observer)


def _finish(store: Store, number: int, values: Measurement | None, seconds: float, observer: Observer) -> None:
    """Store what a trial has measured, or that it failed.

    Args:
        values: None when memory did not do.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)] if values else []
    failure = "out of memory" if values is None else f"{bad[0]} is {values[bad[0]]}" if bad else None
    if values is not None and failure is None:
        store.finish(number, values, seconds)
    else:
        store.fail(number, failure or "", seconds)
    trials = store.trials()
    observer.on_trial_end(trials[number], trials)
    last = trials[max(0, number + 1 - MAX_CONSECUTIVE_FAILURES) : number + 1]
    if len(last) == MAX_CONSECUTIVE_FAILURES and all(trial.state is TrialState.FAILED for trial in last):
        remedy = "free memory, use a smaller --window or another --dtype, then run the same command again"
        raise EvaluationError(f"{len(last)} candidates in a row failed ({failure}): {remedy}.")
