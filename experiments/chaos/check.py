"""Whether a run that was harmed is what it would have been alone: every trial measured once that counts, as planned, and right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmbo.run.records import ROUND
from llmbo.run.store import TrialStore
from llmbo.search.loop import SEEDS_PER_RUN
from llmbo.types import Proposer, TrialState

SEED = 0  # of every run here


@dataclass(frozen=True)
class Verdict:
    """What is wrong with a finished run; all 0 where nothing is.

    Args:
        lost: Trials of the budget that have no values.
        doubled: Candidates that were measured for two trials.
        unplanned: Trials of another candidate than was proposed for them.
        strayed: Rounds that are not what the trials before them propose, those aside that were pending.
        others: Trials with other values than alone.
        largest: Difference of a value from what it is alone.
        rows: Of the study that count for nothing: a writer that had lost the run was on its way.
    """

    lost: int
    doubled: int
    unplanned: int
    strayed: int
    others: int
    largest: float
    rows: int

    @property
    def whole(self) -> bool:
        return not (self.lost or self.doubled or self.unplanned or self.strayed or self.others)


def judged(
    store: TrialStore,
    budget: int,
    alone: Callable[[Sequence[tuple[int, ...]]], Sequence[Mapping[str, float]]],
    proposer: Proposer,
) -> Verdict:
    """Compare what is stored.

    Args:
        alone: Measures candidates without any harm.
        proposer: The run's own.
    """
    trials = [trial for trial in store.trials() if trial.number < budget]
    planned = [proposal.x for proposals in store.rounds() for proposal in proposals]
    complete = [trial for trial in trials if trial.complete]
    differences = [
        max(abs(trial.values[name] - found[name]) for name in trial.values)
        for trial, found in zip(complete, alone([trial.x for trial in complete]), strict=True)
    ]
    return Verdict(
        lost=budget - len(complete),
        doubled=len(complete) - len({trial.x for trial in complete}),
        unplanned=sum(trial.x != planned[trial.number] for trial in trials),
        strayed=_strayed(store, budget, proposer),
        others=sum(difference > 0 for difference in differences),
        largest=max(differences, default=0.0),
        rows=len(store._study.trials) - len(store.trials()),
    )


def _strayed(store: TrialStore, budget: int, proposer: Proposer) -> int:
    attributes, trials, first, count = store._study.user_attrs, store.trials(), 0, 0
    latest = {
        key.partition("@")[0]: key for key in sorted(attributes) if key.startswith(ROUND)
    }  # by owner, of each round
    for number, (key, made) in enumerate(zip(latest.values(), store.rounds(), strict=True)):
        if first >= budget:
            break
        known = [
            replace(trial, state=TrialState.RUNNING, values={}, windows={}, seconds=None)
            if trial.number in attributes[key][0].get("pending", ())
            else trial
            for trial in trials[:first]
        ]
        again = proposer.propose(known, len(made), SEED * SEEDS_PER_RUN + number)
        count += [proposal.x for proposal in again] != [proposal.x for proposal in made]
        first += len(made)
    return count
