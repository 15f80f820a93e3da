"""Propose, evaluate, store, repeat: on a real store, with scripted measurements."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.worker_scaling.__main__ import SimulatedStore, in_rounds, simulated
from experiments.worker_scaling.real import Timed, efficiency
from llmbo.errors import EvaluationError
from llmbo.run.store import TrialStore
from llmbo.search import loop
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.baselines import RandomProposer, ThresholdProposer
from llmbo.search.loop import run_search
from llmbo.types import Measurement, Proposal, Proposer, Trial, TrialState


@dataclass
class Log:
    """An observer that writes everything down."""

    events: list[tuple[str, int]] = field(default_factory=list)
    on_end: Callable[[Trial], None] = lambda trial: None

    def on_proposing(self, round: int) -> None:
        self.events.append(("proposing", round))

    def on_trial_start(self, proposal: Proposal, number: int) -> None:
        self.events.append(("start", number))

    def on_trial_end(self, trial: Trial, trials: Sequence[Trial]) -> None:
        assert trials[trial.number] == trial and trial.state is not TrialState.RUNNING
        self.events.append(("end", trial.number))
        self.on_end(trial)


@dataclass
class Scripted:
    """An evaluator that raises, or spoils values, at the calls named in `script`."""

    toy: Any
    script: dict[int, BaseException | dict[str, float]] = field(default_factory=dict)
    at_once: int = 1
    calls: int = 0

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        return [self.measure(x) for x in batch]

    def measure(self, x: tuple[int, ...]) -> Measurement:
        step = self.script.get(self.calls)
        self.calls += 1
        if isinstance(step, BaseException):
            raise step
        found: Measurement = self.toy.evaluate(x)
        return Measurement({**found, **(step or {})}, found.windows)


@pytest.fixture
def open_store(toy: Any, tmp_path: Path) -> Callable[..., TrialStore]:
    return lambda name="run": TrialStore.create(
        f"sqlite:///{tmp_path / 'study.db'}", name, toy.space, toy.objectives, {}, {}
    )


def story(store: TrialStore) -> list[tuple[object, ...]]:
    """What must not depend on interruptions."""
    return [(t.number, t.round, t.x, t.origin, t.state, dict(t.values)) for t in store.trials()]


def qnehvi(toy: Any) -> QNehviProposer:
    return QNehviProposer(toy.family, toy.objectives, toy.dense, num_initial=6)


@pytest.mark.parametrize(("budget", "q"), [(1, 4), (5, 1), (8, 4), (10, 4), (3, 7)])
def test_exactly_the_budget_is_evaluated_in_order(
    toy: Any, open_store: Callable[..., TrialStore], budget: int, q: int
) -> None:
    store, log, evaluator = open_store(), Log(), Scripted(toy)
    ticks = itertools.count()
    run_search(RandomProposer(toy.space), evaluator, store, budget, q, 0, log, clock=lambda: float(next(ticks)))
    trials = store.trials()
    assert evaluator.calls == len(trials) == budget
    assert all(trial.complete and trial.values == toy.evaluate(trial.x) and trial.seconds == 1 for trial in trials)
    assert [trial.round for trial in trials] == [number // q for number in range(budget)]
    expected: list[tuple[str, int]] = []
    for number in range(budget):
        expected += [("proposing", number // q)] if number % q == 0 else []
        expected += [("start", number), ("end", number)]
    assert log.events == expected


def test_a_round_is_stored_before_any_of_it_is_evaluated(toy: Any, open_store: Callable[..., TrialStore]) -> None:
    class Watching(Scripted):
        def measure(self, x: tuple[int, ...]) -> Measurement:
            store = open_store()
            assert x == store.rounds()[self.calls // 3][self.calls % 3].x
            assert [trial.state for trial in store.trials()] == [TrialState.COMPLETE] * self.calls + [
                TrialState.RUNNING
            ]
            return super().measure(x)

    run_search(RandomProposer(toy.space), Watching(toy), open_store(), 6, 3, 0, Log())


def test_proposers_see_earlier_rounds_and_nothing_else(toy: Any, open_store: Callable[..., TrialStore]) -> None:
    seen: list[tuple[int, int, int]] = []

    class Asked:
        def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
            assert all(trial.complete for trial in trials)
            seen.append((len(trials), q, seed))
            return RandomProposer(toy.space).propose(trials, q, seed)

    run_search(Asked(), Scripted(toy), open_store(), 7, 3, 1, Log())
    assert [(trials, q) for trials, q, _ in seen] == [(0, 3), (3, 3), (6, 3)]
    assert len({seed for *_, seed in seen}) == 3  # a round's own seed


def test_no_two_runs_share_the_seed_of_any_round(toy: Any, open_store: Callable[..., TrialStore]) -> None:
    """Or the second round of one run would draw what the first of the next run drew."""
    seen: list[int] = []

    class Asked:
        def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
            seen.append(seed)
            return RandomProposer(toy.space).propose(trials, q, seed)

    for seed in range(3):
        run_search(Asked(), Scripted(toy), open_store(str(seed)), 2, 1, seed, Log())
    assert len(seen) == 6 == len(set(seen))


@pytest.mark.parametrize("make", [lambda toy: RandomProposer(toy.space), qnehvi], ids=["random", "qnehvi"])
def test_a_raised_budget_equals_one_longer_run(
    toy: Any, open_store: Callable[..., TrialStore], make: Callable[[Any], Proposer]
) -> None:
    run_search(make(toy), Scripted(toy), open_store("whole"), 14, 4, 2, Log())
    for stops in ([3, 10], [1, 2, 5, 9], [6, 8]):
        for budget in [*stops, 14]:
            run_search(make(toy), Scripted(toy), open_store(str(stops)), budget, 4, 2, Log())
        assert story(open_store(str(stops))) == story(open_store("whole")), stops


def test_a_spent_budget_does_nothing(toy: Any, open_store: Callable[..., TrialStore]) -> None:
    run_search(RandomProposer(toy.space), Scripted(toy), open_store(), 5, 2, 0, Log())
    before, log = story(open_store()), Log()
    run_search(RandomProposer(toy.space), Scripted(toy), open_store(), 4, 2, 0, log)
    assert story(open_store()) == before and log.events == []


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({"kl": math.nan}, "kl is nan"),
        ({"loss": math.inf}, "loss is inf"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
            ),
            "out of memory",
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_candidate_that_cannot_be_measured_is_a_failed_trial(
    toy: Any, open_store: Callable[..., TrialStore], step: BaseException | dict[str, float], reason: str
) -> None:
    store = open_store()
    run_search(RandomProposer(toy.space), Scripted(toy, {2: step, 3: step, 5: step}), store, 8, 4, 0, Log())
    trials = store.trials()
    assert [trial.number for trial in trials if trial.state is TrialState.FAILED] == [2, 3, 5]
    assert all(trial.complete or (trial.failure == reason and trial.seconds is not None) for trial in trials)
    assert len({trial.x for trial in trials}) == 8  # a failed one is not tried again


def test_three_failures_in_a_row_end_the_run_and_the_same_call_goes_on(
    toy: Any, open_store: Callable[..., TrialStore]
) -> None:
    store = open_store()
    failing: dict[int, BaseException | dict[str, float]] = {n: {"kl": math.nan} for n in (1, 3, 4, 5)}
    with pytest.raises(EvaluationError, match=r"3 candidates in a row failed \(kl is nan\)"):
        run_search(RandomProposer(toy.space), Scripted(toy, failing), store, 12, 4, 0, Log())
    assert [trial.complete for trial in store.trials()] == [True, False, True, False, False, False]
    run_search(RandomProposer(toy.space), Scripted(toy), store, 12, 4, 0, Log())
    assert [trial.complete for trial in store.trials()][6:] == [True] * 6


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("odd"), KeyboardInterrupt()], ids=repr
)
def test_any_other_error_comes_through_and_loses_only_the_running_trial(
    toy: Any, open_store: Callable[..., TrialStore], error: BaseException
) -> None:
    run_search(RandomProposer(toy.space), Scripted(toy), open_store("whole"), 8, 4, 0, Log())
    with pytest.raises(type(error)) as caught:
        run_search(RandomProposer(toy.space), Scripted(toy, {5: error}), open_store(), 8, 4, 0, Log())
    assert caught.value is error
    assert [trial.state for trial in open_store().trials()] == [TrialState.COMPLETE] * 5 + [TrialState.RUNNING]
    run_search(RandomProposer(toy.space), Scripted(toy), open_store(), 8, 4, 0, Log())
    assert story(open_store()) == story(open_store("whole"))


def test_nothing_left_to_propose_ends_the_run(make_toy: Callable[..., Any], tmp_path: Path) -> None:
    toy = make_toy(1, 24, 0.3, 8)
    store = TrialStore.create(f"sqlite:///{tmp_path / 'study.db'}", "run", toy.space, toy.objectives, {}, {})
    run_search(ThresholdProposer(toy.family, toy.objectives, toy.dense), Scripted(toy), store, 1000, 4, 0, Log())
    assert 0 < len(store.trials()) == len(toy.family.path) - 1


def test_candidates_measured_together_are_the_same_trials(toy: Any, open_store: Callable[..., TrialStore]) -> None:
    run_search(RandomProposer(toy.space), Scripted(toy), open_store("alone"), 11, 4, 0, Log())
    run_search(RandomProposer(toy.space), Scripted(toy, at_once=3), open_store("together"), 11, 4, 0, Log())
    assert story(open_store("together")) == story(open_store("alone"))


def test_what_does_not_fit_into_memory_together_is_measured_alone(
    toy: Any, open_store: Callable[..., TrialStore]
) -> None:
    full = MemoryError()
    script = {0: full, 2: full}  # the first time of all four together, then the second of them alone
    run_search(RandomProposer(toy.space), Scripted(toy, script, at_once=4), open_store(), 4, 4, 0, Log())
    states = [trial.state for trial in open_store().trials()]
    assert states == [TrialState.COMPLETE, TrialState.FAILED, TrialState.COMPLETE, TrialState.COMPLETE]


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_simulated_workers_evaluate_what_a_run_proposes_and_are_never_idle(toy: Any, workers: int) -> None:
    """Of `experiments.worker_scaling`: with candidates of equal length every worker is busy until none is left."""
    store = SimulatedStore(toy.evaluate, lambda x: 1.0, workers)
    trials, ended = simulated(RandomProposer(toy.space), store, 18, 4, 0)
    assert [trial.number for trial in trials] == list(range(18)) and len({trial.x for trial in trials}) == 18
    assert all(trial.complete and trial.values == toy.evaluate(trial.x) for trial in trials)
    assert sorted(ended) == [1.0 + number // workers for number in range(18)]
    if workers == 1:
        assert in_rounds(trials, lambda x: 1.0, 1) == ended
        assert in_rounds(trials, lambda x: 1.0, 3) == [1, 1, 1, 2, 3, 3, 3, 4, 5, 5, 5, 6, 7, 7, 7, 8, 9, 9]


def test_who_leads_a_crowd_only_proposes_and_evaluates_what_is_lost(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve workers: eleven evaluate, what is proposed knows all but the latest, and a lost trial is not left to the end."""
    monkeypatch.setattr(loop, "PAUSE", 0.0)
    lost, workers, budget = 5, 12, 80

    class Losing(SimulatedStore):
        """Nobody but the one that leads may start one of the trials."""

        def _deal(self) -> None:
            self._waiting = [number for number in self._waiting if number != lost]
            super()._deal()

        def free(self, numbers: Sequence[int]) -> list[int]:
            return sorted({*super().free(numbers), *({lost} & {*numbers} - {*self.ended})})

        def lost(self, numbers: Sequence[int]) -> list[int]:
            return [number for number in numbers if number == lost]

        def start(self, number: int, round_number: int, proposal: Proposal) -> bool:
            return super().start(number, round_number, proposal) or number == lost

    class Knowing(RandomProposer):
        def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
            unfinished.append(sum(trial.state is TrialState.RUNNING for trial in trials))
            return super().propose(trials, q, seed)

    unfinished: list[int] = []
    store = Losing(toy.evaluate, lambda x: 1.0, workers)
    trials, ended = simulated(Knowing(toy.space), store, budget, 4, 0)
    assert all(trial.complete for trial in trials) and len(trials) == budget
    assert ended[lost] <= 2 and max(ended) <= math.ceil(budget / (workers - 1)) + 2
    assert max(unfinished) <= workers  # those that eleven evaluate, and the lost one; not as many again that wait


@pytest.mark.parametrize("workers", [2, 12])
def test_each_candidate_is_queued_once(toy: Any, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many turns a run takes: whoever queues looks through the database."""
    monkeypatch.setattr(loop, "PAUSE", 0.0)

    class Counting(SimulatedStore):
        def queue(self, number: int, round_number: int, proposal: Proposal) -> None:
            queued.append(number)
            super().queue(number, round_number, proposal)

    queued: list[int] = []
    simulated(RandomProposer(toy.space), Counting(toy.evaluate, lambda x: 1.0, workers), 40, 4, 0)
    assert sorted(queued) == list(range(40))


def test_the_efficiency_of_two_is_what_they_do_by_what_one_does() -> None:
    """The second one comes late and what it finds none of any more does not count; each is a quarter slower, or pauses as long."""
    alone = [Timed("owner", float(n), n + 0.9) for n in range(8)]
    slower = [Timed("owner", 1.25 * n, 1.25 * (n + 1)) for n in range(4)]
    slower += [Timed("worker 0", 2 + 1.25 * n, 2 + 1.25 * (n + 1)) for n in range(4)]
    assert efficiency(alone, slower)[0] == pytest.approx(0.8, rel=0.05) and efficiency(alone, slower)[1] == 3.0
    pausing = [Timed("owner", 1.25 * n, 1.25 * n + 1) for n in range(4)]
    pausing += [Timed("worker 0", 1.25 * n, 1.25 * n + 1) for n in range(4)]
    assert efficiency(alone, pausing)[0] == pytest.approx(8 / (2 * 4.75), rel=0.05)
