"""What the loop relies on whoever proposes, and what each proposer promises beyond that."""

import itertools
import math
import random
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from botorch.fit import fit_gpytorch_mll

from llmbo.config import STRATEGIES
from llmbo.problem.objectives import Objective, outcomes, ref_point, to_maximize
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.baselines import RandomProposer, ThresholdProposer
from llmbo.search.baselines.designs import NUM_INITIAL, evenly, van_der_corput
from llmbo.search.baselines.optuna_samplers import POPULATION
from llmbo.search.pareto import hypervolume
from llmbo.search.strategies import strategy_of
from llmbo.types import Proposal, Proposer, Source, Trial, TrialState
from pruning.importance import Importance

DOCS = Path(__file__).parents[3] / "docs"
# Every strategy joins every test of the contract.
# Options keep the slow ones quick.
OPTIONS: dict[str, dict[str, Any]] = {
    "qnehvi": {"num_initial": 6},
    "qnehvi-plain": {"num_initial": 6},
    "linas": {"generations": 3},
    "linas-moved": {"generations": 3},
    "botorch": {"num_initial": 4, "num_restarts": 1, "raw_samples": 4, "mc_samples": 8, "maxiter": 3},
}


def maker(name: str) -> Callable[[Any], Proposer]:
    def make(toy: Any) -> Proposer:
        factory = strategy_of(name)
        problem = toy.with_prices() if factory.strategy.recipes else toy
        return factory.build(problem, toy.objectives, OPTIONS.get(name, {}))

    return make


# A third party's package: the example of the documentation.
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "plugins.md").read_text(), re.MULTILINE | re.DOTALL)
PLUGINS = {"thinning": "my_search:Thinning", "thinning-seeded": "my_search:seeded"}
# The GP samplers of Optuna take seconds per candidate; the adapter is the same for all its samplers.
PROPOSERS = {name: maker(name) for name in [*STRATEGIES, *PLUGINS] if not name.startswith("optuna-gp")}


@pytest.fixture(autouse=True)
def plugins(install: Callable[..., None]) -> None:
    install("my_search", EXAMPLE, {"llmbo.strategies": PLUGINS})


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `botorch` fits is BoTorch's own: no test here asks how well, and to the optimum it takes two thirds of all its time."""
    fit = partial(fit_gpytorch_mll, optimizer_kwargs={"options": {"maxiter": 5}})
    monkeypatch.setattr("llmbo.search.baselines.plain_botorch.fit_gpytorch_mll", fit)


def history(toy: Any) -> dict[str, list[Trial]]:
    """Trials that a proposer may meet, by what is special about them."""
    family = [tuple(row) for row in toy.family.path[:-1:4].int().tolist()]
    first = toy.trials(family)
    first += [toy.trial(len(first) + n, Proposal(x, "qnehvi"), 1) for n, x in enumerate(toy.random_points(6, 3))]
    extra = toy.random_points(4, 8)

    def ending(state: TrialState) -> list[Trial]:
        return [*first, *(toy.trial(len(first) + n, Proposal(x, "qnehvi"), 2, state) for n, x in enumerate(extra))]

    return {
        "nothing": [],
        "one trial": first[:1],
        "family": toy.trials(family),
        "family and search": first,
        "running": ending(TrialState.RUNNING),
        "failed": ending(TrialState.FAILED),
        "only failed": [
            toy.trial(n, Proposal(x, "threshold", source=Source.PATH), 0, TrialState.FAILED)
            for n, x in enumerate(family)
        ],
    }


HISTORIES = ["nothing", "one trial", "family", "family and search", "running", "failed", "only failed"]


def check_contract(proposals: Sequence[Proposal], trials: Sequence[Trial], q: int, toy: Any) -> None:
    points = [proposal.x for proposal in proposals]
    assert len(points) <= q
    assert len(set(points)) == len(points)
    assert set(points).isdisjoint(trial.x for trial in trials)
    assert toy.space.max_levels not in points
    assert all(type(level) is int for x in points for level in x)
    assert toy.space.legal(torch.tensor(points, dtype=torch.float64).view(len(points), toy.space.d)).all()


@pytest.mark.parametrize("name", PROPOSERS)
@pytest.mark.parametrize("kind", HISTORIES)
@pytest.mark.parametrize("q", [1, 3])
def test_contract(toy: Any, name: str, kind: str, q: int) -> None:
    proposer, trials = PROPOSERS[name](toy), history(toy)[kind]
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    proposals = proposer.propose(trials, q, seed=5)
    check_contract(proposals, trials, q, toy)
    assert proposals
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
    torch.rand(7)  # the global generator moves on; answers do not depend on it
    assert proposer.propose(list(trials), q, seed=5) == proposals
    assert PROPOSERS[name](toy).propose(trials, q, seed=5) == proposals


@pytest.mark.parametrize("name", PROPOSERS)
def test_a_tiny_space_is_used_up_without_a_repeat_or_an_endless_loop(make_toy: Callable[..., Any], name: str) -> None:
    toy = make_toy(1, 24, 0.3, 8)
    proposer, trials = PROPOSERS[name](toy), list[Trial]()
    for round_number in range(30):
        proposals = proposer.propose(trials, 4, round_number)
        check_contract(proposals, trials, 4, toy)
        trials += [toy.trial(len(trials) + n, proposal, round_number) for n, proposal in enumerate(proposals)]
        if not proposals:
            break
    else:
        pytest.fail("never said that nothing is left")


@pytest.mark.parametrize("name", ["random", "qnehvi"])
def test_a_space_without_any_candidate_gives_nothing(make_toy: Callable[..., Any], name: str) -> None:
    toy = make_toy(1, 24, 0.99, 24)
    assert len(toy.family.path) == 1  # the dense model alone
    proposer: Proposer = (
        RandomProposer(toy.space)
        if name == "random"
        else QNehviProposer(toy.family, make_toy().objectives, toy.dense)  # no reference point fits such a space
    )
    assert proposer.propose([], 2, 0) == []


def test_random_covers_all_sizes(toy: Any) -> None:
    shares = toy.space.share(
        torch.tensor([p.x for p in RandomProposer(toy.space).propose([], 200, 0)], dtype=torch.float64)
    )
    assert torch.histc(shares, bins=5, min=0.4, max=1.0).gt(5).all()


def test_random_listens_to_the_seed(toy: Any) -> None:
    proposer = RandomProposer(toy.space)
    assert proposer.propose([], 4, 0) != proposer.propose([], 4, 1)


@pytest.mark.parametrize("first", [0, 1, 6, 37])
def test_van_der_corput_mirrors_the_binary_digits_at_the_point(first: int) -> None:
    expected = [int(f"{n:b}"[::-1], 2) / 2 ** len(f"{n:b}") for n in range(first, first + 200)]
    assert van_der_corput(200, first) == expected


def test_evenly_gives_every_item_once_and_spreads_every_prefix() -> None:
    found = list(evenly(range(100)))
    assert sorted(found) == list(range(100)) and found[:4] == [0, 50, 25, 75]
    for n in (8, 16, 32):
        assert max(b - a for a, b in itertools.pairwise(sorted(found[:n]))) <= 2 * 100 / n
    assert list(evenly([])) == []


def test_optunas_nsga2_breeds_from_what_it_was_told(make_toy: Callable[..., Any]) -> None:
    """A child takes its levels from two parents, but for a mutation. Without any generation all would stay random."""
    toy = make_toy(10)
    proposer = strategy_of("optuna-nsga2").build(toy, toy.objectives, {})

    def kinship(told: Sequence[Trial]) -> float:
        """Mean share of a proposal's levels that the best pair of trials accounts for."""
        X = torch.tensor([trial.x for trial in told])
        shares = []
        for proposal in proposer.propose(told, 8, 0):
            same = X == torch.tensor(proposal.x)
            shares.append(float((same[:, None] | same).double().mean(-1).max()))
        return statistics.mean(shares)

    trials = toy.trials(toy.random_points(POPULATION, 0))
    assert kinship(trials) > 0.9 > kinship(trials[:-1])
    failed = [*trials[:-1], replace(trials[-1], state=TrialState.FAILED, values={})]
    assert kinship(failed) > 0.9  # its place in the first generation is taken all the same


def threshold(toy: Any) -> ThresholdProposer:
    return ThresholdProposer(toy.family, toy.objectives, toy.dense)


def test_threshold_ignores_the_seed_and_the_order_of_trials(toy: Any) -> None:
    trials = run(threshold(toy), toy, 5)
    assert threshold(toy).propose(trials, 4, 0) == threshold(toy).propose(trials[::-1], 4, 123)


def test_threshold_starts_with_the_smallest_and_halves_what_it_knows_nothing_about(toy: Any) -> None:
    shares = toy.space.share(
        torch.tensor([p.x for p in threshold(toy).propose([], 4, 0)], dtype=torch.float64)
    ).tolist()
    low, slack = float(toy.family.shares[0]), float(toy.family.shares.diff().max())
    assert shares[0] == low
    assert shares[1] == pytest.approx((1 + low) / 2, abs=slack)
    assert sorted(shares[2:]) == pytest.approx([(1 + 3 * low) / 4, (3 + low) / 4], abs=2 * slack)


def rectangles(trials: Sequence[Trial], toy: Any) -> list[float]:
    """What the front could still gain between neighbours of the family, where members are left."""
    quality, reference = toy.objectives[0].name, toy.objectives[0].reference
    points = sorted([(t.values["params_share"], t.values[quality]) for t in trials] + [(1.0, toy.dense[quality])])
    inside = [
        any(low < share < high for share in toy.family.shares.tolist())
        for (low, _), (high, _) in itertools.pairwise(points)
    ]
    areas = [(b[0] - a[0]) * (min(a[1], reference) - min(b[1], reference)) for a, b in itertools.pairwise(points)]
    return [area for area, left in zip(areas, inside, strict=True) if left]


def test_threshold_always_halves_the_largest_rectangle(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(5, 100, 0.2, 5)
    trials = run(threshold(toy), toy, 32, q=1)
    largest = [max(rectangles(trials[:n], toy)) for n in range(3, 33)]
    assert all(after <= before + 1e-12 for before, after in itertools.pairwise(largest))
    assert largest[-1] < largest[0] / 8


def test_threshold_spends_little_beyond_the_reference_point(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(5, 100, 0.2, 5).with_objectives("kl", "params_share", reference_point=(0.8, 1.0))
    values = [trial.values["kl"] for trial in run(threshold(toy), toy, 24)]
    members = torch.tensor([toy.evaluate(tuple(row))["kl"] for row in toy.family.path.int().tolist()])
    assert (members > 0.8).double().mean() > 0.5  # an even design would spend as many there
    assert sum(value > 0.8 for value in values) <= 7


@pytest.mark.parametrize("case", [(1, 24, 0.3, 8), (4, 24, 0.4, 0), (3, 24, 0.6, 1)])
def test_threshold_meets_every_member_but_the_dense_model(
    make_toy: Callable[..., Any], case: tuple[float, ...]
) -> None:
    toy = make_toy(*case)
    found = {proposal.x for proposal in threshold(toy).propose([], 10_000, 0)}
    assert found == {tuple(row) for row in toy.family.path[:-1].int().tolist()}


def run(proposer: Proposer, toy: Any, budget: int, q: int = 4, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < budget:
        proposals = proposer.propose(trials, min(q, budget - len(trials)), 1000 * seed + len(trials))
        assert proposals, f"nothing left after {len(trials)} trials"
        trials += [toy.trial(len(trials) + n, proposal) for n, proposal in enumerate(proposals)]
    return trials


def volume(trials: Sequence[Trial], objectives: Sequence[Objective]) -> float:
    return hypervolume(to_maximize([trial.values for trial in trials], objectives), ref_point(objectives))


def test_qnehvi_starts_with_the_family(toy: Any) -> None:
    trials = run(QNehviProposer(toy.family, toy.objectives, toy.dense, num_initial=7), toy, 15)
    expected = run(threshold(toy), toy, 7)
    assert [(trial.x, trial.origin) for trial in trials[:7]] == [(t.x, t.origin) for t in expected]
    assert {trial.origin for trial in trials[7:]} == {"qnehvi"}


def test_qnehvi_searches_on_when_the_family_is_smaller_than_the_initial_design(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(4, 24, 0.93)
    assert 4 < len(toy.family.path) < 12
    trials = run(QNehviProposer(toy.family, toy.objectives, toy.dense), toy, 14)
    check_contract([Proposal(trial.x, trial.origin) for trial in trials], [], 14, toy)


def test_qnehvi_listens_to_the_seed(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(10)  # in a small space every seed finds the same best point
    trials = history(toy)["family and search"]
    assert len({tuple(PROPOSERS["qnehvi"](toy).propose(trials, 2, seed)) for seed in range(3)}) > 1


def test_qnehvi_avoids_what_is_already_running(toy: Any) -> None:
    """Pending trials are neither proposed again nor forgotten: the next best is proposed instead."""
    proposer, trials = PROPOSERS["qnehvi"](toy), history(toy)["family and search"]
    (first,) = proposer.propose(trials, 1, 0)
    running = [*trials, toy.trial(len(trials), first, 9, TrialState.RUNNING)]
    (second,) = proposer.propose(running, 1, 0)
    assert second.x != first.x
    share = toy.space.share(torch.tensor([first.x, second.x], dtype=torch.float64))
    assert share[0] != share[1]  # a batch is spread: an equal-sized neighbour could add next to nothing


def informed(toy: Any) -> Any:
    """The toy under a family that knows what each block is worth up to a factor, as measured scores do; `toy`'s knows nothing."""
    rng, layers = random.Random(0), toy.space.num_layers
    worth = torch.tensor([weight * math.exp(rng.gauss(0, 0.5)) for weight in toy.weights])

    def scores(worth: torch.Tensor, units: int) -> torch.Tensor:
        last = 2 * torch.arange(units, 0, -1) - 1  # (gone / units)^2 grows by as much with the k-th best unit
        return worth[:, None] * last / units**2

    groups = scores(worth[:layers], toy.space.anatomy.num_key_value_heads)
    neurons = scores(worth[layers:], toy.space.anatomy.intermediate_size)
    return replace(toy, importance=Importance(groups, neurons, groups.sum(-1) + neurons.sum(-1)))


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (("kl", "params_share"), None),
        (("loss", "params"), None),
        (("params_share", "kl"), (0.8, 1.0)),
    ],
)
def test_qnehvi_beats_the_baselines_whatever_the_objectives_are_called(
    toy: Any, names: tuple[str, str], reference: tuple[float, float] | None
) -> None:
    toy = informed(toy).with_objectives(*names, reference_point=reference)
    means = {
        name: sum(volume(run(make(toy), toy, 26, seed=seed), toy.objectives) for seed in range(2)) / 2
        for name, make in PROPOSERS.items()
        if name in ("qnehvi", "threshold", "random")
    }
    assert means["qnehvi"] > means["threshold"] and means["qnehvi"] > means["random"], means


def test_qnehvi_thinks_alike_in_shares_and_in_parameters(toy: Any) -> None:
    """Both are the same quantity in another unit, and the default reference points correspond."""
    trials = history(toy)["family and search"]
    parameters = toy.with_objectives("kl", "params")
    assert PROPOSERS["qnehvi"](parameters).propose(trials, 1, 0) == PROPOSERS["qnehvi"](toy).propose(trials, 1, 0)


@pytest.mark.parametrize(
    "names", [("kl", "params_share", "kv_bytes"), ("flops", "loss"), ("kl", "loss", "weight_bytes")]
)
def test_qnehvi_takes_any_two_or_three_objectives(toy: Any, names: tuple[str, ...]) -> None:
    """On the same trials it proposes what brings more hypervolume in these terms than random points mostly do."""
    goal = toy.with_objectives(*names)
    trials = history(goal)["family and search"]
    proposals = PROPOSERS["qnehvi"](goal).propose(trials, 4, 0)

    def volume(points: Sequence[tuple[int, ...]]) -> float:
        return hypervolume(outcomes([*trials, *goal.trials(points)], goal.objectives), ref_point(goal.objectives))

    rivals = [volume(goal.random_points(4, seed)) for seed in range(10)]
    assert volume([proposal.x for proposal in proposals]) > statistics.quantiles(rivals, n=4)[-1]


@pytest.mark.parametrize("strategy", list(PROPOSERS))
def test_known_limits_are_kept_by_every_strategy(make_toy: Callable[..., Any], strategy: str) -> None:
    toy = make_toy()
    limits = {"params_share": 0.75, "kv_bytes": 0.9 * toy.dense["kv_bytes"]}
    toy = replace(toy, space=replace(toy.space, limits=limits))
    proposer, trials = PROPOSERS[strategy](toy), list[Trial]()
    while proposals := proposer.propose(trials, 4, len(trials))[: 14 - len(trials)]:
        trials += [toy.trial(len(trials) + n, proposal) for n, proposal in enumerate(proposals)]
    assert len(trials) > 9
    assert all(trial.values[name] <= limit for trial in trials for name, limit in limits.items())


@pytest.mark.parametrize("names", [("kl", "params_share"), ("loss", "params_share")])
def test_qnehvi_keeps_measured_limits_once_it_has_learnt_them(toy: Any, names: tuple[str, str]) -> None:
    """A limit on kl, which is an objective in one case and nothing but a limit in the other."""
    free = toy.with_objectives(*names)
    trials = run(QNehviProposer(free.family, free.objectives, free.dense, num_initial=7), free, 27)
    limits = {"kl": statistics.median(trial.values["kl"] for trial in trials[7:])}  # which half of that search breaks
    goal = replace(free, limits=limits)
    trials = run(QNehviProposer(goal.family, goal.objectives, goal.dense, num_initial=7, limits=limits), goal, 27)
    assert not all(trial.feasible for trial in trials[:7])
    assert sum(trial.feasible for trial in trials[7:]) >= 16, [trial.values["kl"] for trial in trials]


def test_what_a_large_team_begins_with_is_a_design_and_changes_of_its_members(make_toy: Callable[..., Any]) -> None:
    """Forty begin before anything is known: distinct legal models, a design's worth of the path, the others near it at many sizes."""
    toy = make_toy(6, 60, 0.4, 7)
    proposer, trials = QNehviProposer(toy.family, toy.objectives, toy.dense), list[Trial]()
    while len(trials) < 40:
        made = proposer.propose(trials, 40 - len(trials), 3)
        assert made and made == proposer.propose(trials, 40 - len(trials), 3)
        trials += [toy.trial(len(trials) + n, each, state=TrialState.RUNNING) for n, each in enumerate(made)]
    X = torch.tensor([trial.x for trial in trials], dtype=torch.float64)
    assert len({trial.x for trial in trials}) == 40 and bool(toy.space.legal(X).all())
    assert [trial.on_path for trial in trials] == [True] * NUM_INITIAL + [False] * (40 - NUM_INITIAL)
    shares = toy.space.share(X[NUM_INITIAL:])
    away = (X[NUM_INITIAL:] - toy.family.profile(shares)).abs() / toy.space.bounds[1]
    assert shares.unique().numel() > 20 and float(away.mean()) < 0.15
