"""The story of a run: propose, evaluate, store, repeat. Knows roles, not kinds."""

import math
import time
from collections.abc import Callable, Sequence

from llmbo.errors import EvaluationError, out_of_memory
from llmbo.types import Evaluator, Measurement, Observer, Proposal, Proposer, Store, TrialState

MAX_CONSECUTIVE_FAILURES = 3
PAUSE = 0.5  # seconds between two looks for something to do
CROWD = 8  # processes that all evaluate; of more, the one that leads only proposes
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
    """Evaluate up to `budget` candidates, going on from whatever `store` holds, beside other processes that do so.

    The one that leads proposes `q` at a time, alone when all before are finished. In company it proposes as soon as fewer candidates wait
    than there are processes, and what is not finished is pending. In a crowd it evaluates nothing as long as there is something to propose:
    it is always there to do so when none waits, hence each knows more of those before it. Only trials of processes that are gone are left
    to it. Proposals are stored before the first is evaluated.

    Raises:
        EvaluationError: Several candidates in a row could not be evaluated; what was measured stays stored.
    """
    exhausted = False
    while True:
        leads, size, rounds = store.leads(), store.size(), store.rounds()
        numbered = list(enumerate((number, proposal) for number, made in enumerate(rounds) for proposal in made))
        planned = {place: made for place, made in numbered if place < budget}
        trials = store.trials()
        if leads and size > 1 and len(trials) < len(planned):
            for place in range(len(trials), len(planned)):
                store.queue(place, *planned[place])
            trials = store.trials()
        left = [place for place in planned if place >= len(trials) or trials[place].state is TrialState.RUNNING]
        free = store.free(left)
        proposes = leads and len(numbered) < budget and not exhausted
        crowd = proposes and size > CROWD
        own, wanted = (store.lost(free), 1) if crowd else (free, size)
        waiting = len(free) - len(own) if crowd else len(free)
        if proposes and waiting < wanted:
            observer.on_proposing(len(rounds))
            proposals = proposer.propose(trials, max(q, wanted) - waiting, seed * SEEDS_PER_RUN + len(rounds))
            exhausted = not proposals
            if proposals:
                store.add_round(proposals, [trial.number for trial in trials if trial.state is TrialState.RUNNING])
        elif own:
            together = min(evaluator.at_once, math.ceil(len(own) / size))
            _evaluate(evaluator, store, [(place, *planned[place]) for place in own[:together]], observer, clock)
        elif left or not (leads or len(numbered) >= budget):
            time.sleep(PAUSE)
        else:
            return


def _evaluate(
    evaluator: Evaluator,
    store: Store,
    batch: Sequence[tuple[int, int, Proposal]],
    observer: Observer,
    clock: Callable[[], float],
) -> None:
    """Evaluate stored proposals, each with its number and its round's, together; one by one where memory does not do for all."""
    batch = [each for each in batch if store.start(*each)]
    for number, _, proposal in batch:
        observer.on_trial_start(proposal, number)
    start = clock()
    measured: list[Measurement] | None = None
    try:
        measured = evaluator.evaluate([proposal.x for *_, proposal in batch] if batch else [])
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    if measured is None and len(batch) > 1:
        for one in batch:
            _evaluate(evaluator, store, [one], observer, clock)
        return
    seconds = (clock() - start) / max(1, len(batch))
    found: Sequence[Measurement | None] = measured if measured is not None else [None]
    for (number, *_), values in zip(batch, found, strict=True):
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
