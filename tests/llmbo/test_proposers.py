"""What the loop relies on whoever proposes, and what each proposer promises beyond that."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from llmbo.acquisition import QNehviProposer
from llmbo.baselines import RandomProposer, ThresholdProposer
from llmbo.config import STRATEGIES
from llmbo.errors import ConfigError
from llmbo.objectives import Objective, ref_point, to_maximize
from llmbo.pareto import hypervolume
from llmbo.strategies import TABLE
from llmbo.types import Proposal, Proposer, Trial, TrialState

# Every strategy joins every test of the contract.
# Options keep the slow ones quick.
OPTIONS: dict[str, dict[str, Any]] = {
    "qnehvi": {"num_initial": 6},
    "botorch": {"num_initial": 4, "num_restarts": 1, "raw_samples": 4, "mc_samples": 8, "maxiter": 3},
}


def maker(name: str) -> Callable[[Any], Proposer]:
    return lambda toy: TABLE[name].build(name, toy, toy.objectives, OPTIONS.get(name, {}))


# The GP samplers of Optuna take seconds per candidate; the adapter is the same for all its samplers.
PROPOSERS = {name: maker(name) for name in STRATEGIES if not name.startswith("optuna-gp")}


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
        "only failed": [toy.trial(n, Proposal(x, "threshold"), 0, TrialState.FAILED) for n, x in enumerate(family)],
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


def test_threshold_ignores_seed_and_values(toy: Any) -> None:
    proposer, trials = (
        ThresholdProposer(toy.family),
        toy.trials(p.x for p in ThresholdProposer(toy.family).propose([], 3, 0)),
    )
    expected = proposer.propose(trials, 4, 0)
    worse = [Trial(t.number, t.round, t.x, t.origin, t.state, {"kl": 100.0, "params": 1.0}) for t in reversed(trials)]
    assert proposer.propose(worse, 4, 123) == expected


def test_threshold_does_not_depend_on_the_batch(toy: Any) -> None:
    proposer, trials = ThresholdProposer(toy.family), list[Trial]()
    for q in (1, 4, 2, 3):
        trials += [toy.trial(len(trials) + n, p) for n, p in enumerate(proposer.propose(trials, q, 0))]
    assert [trial.x for trial in trials] == [p.x for p in proposer.propose([], 10, 0)]


def test_threshold_fills_the_range_ever_more_finely(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(5, 100, 0.2, 5)
    shares = toy.space.share(
        torch.tensor([p.x for p in ThresholdProposer(toy.family).propose([], 64, 0)], dtype=torch.float64)
    ).tolist()
    low, high = float(toy.family.shares[0]), 1.0
    assert shares[0] == low
    slack = float(toy.family.shares.diff().max())  # members are not exactly where the sequence wants them
    for power in range(2, 7):
        known = sorted([*shares[: 2**power], high])
        gaps = [b - a for a, b in itertools.pairwise(known)]
        assert max(gaps) <= (high - low) / 2 ** (power) + 2 * slack
    largest = [max(b - a for a, b in itertools.pairwise(sorted([*shares[:n], high]))) for n in range(1, 65)]
    assert all(after <= before for before, after in itertools.pairwise(largest))


@pytest.mark.parametrize("case", [(1, 24, 0.3, 8), (4, 24, 0.4, 0), (3, 24, 0.6, 1)])
def test_threshold_meets_every_member_but_the_dense_model(
    make_toy: Callable[..., Any], case: tuple[float, ...]
) -> None:
    family = make_toy(*case).family
    found = {proposal.x for proposal in ThresholdProposer(family).propose([], 10_000, 0)}
    assert found == {tuple(row) for row in family.path[:-1].int().tolist()}


def run(proposer: Proposer, toy: Any, budget: int, q: int = 4, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < budget:
        proposals = proposer.propose(trials, min(q, budget - len(trials)), 1000 * seed + len(trials))
        assert proposals
        trials += [toy.trial(len(trials) + n, proposal) for n, proposal in enumerate(proposals)]
    return trials


def volume(trials: Sequence[Trial], objectives: Sequence[Objective]) -> float:
    return hypervolume(to_maximize([trial.values for trial in trials], objectives), ref_point(objectives))


def test_qnehvi_starts_with_the_family(toy: Any) -> None:
    trials = run(QNehviProposer(toy.family, toy.objectives, toy.dense, num_initial=7), toy, 15)
    expected = ThresholdProposer(toy.family).propose([], 7, 0)
    assert [(trial.x, trial.origin) for trial in trials[:7]] == [(p.x, p.origin) for p in expected]
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


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (("kl", "params_share"), None),
        (("params_share", "kl"), None),
        (("loss", "params"), None),
        (("params", "loss"), None),
        (("params_share", "kl"), (0.8, 1.0)),
    ],
)
def test_qnehvi_beats_the_baselines_whatever_the_objectives_are_called(
    toy: Any, names: tuple[str, str], reference: tuple[float, float] | None
) -> None:
    toy = toy.with_objectives(*names, reference_point=reference)
    means = {
        name: sum(volume(run(make(toy), toy, 26, seed=seed), toy.objectives) for seed in range(3)) / 3
        for name, make in PROPOSERS.items()
        if name in ("qnehvi", "threshold", "random")
    }
    assert means["qnehvi"] > means["threshold"] and means["qnehvi"] > means["random"], means


def test_qnehvi_thinks_alike_in_shares_and_in_parameters(toy: Any) -> None:
    """Both are the same quantity in another unit, and the default reference points correspond."""
    trials = history(toy)["family and search"]
    parameters = toy.with_objectives("kl", "params")
    assert PROPOSERS["qnehvi"](parameters).propose(trials, 1, 0) == PROPOSERS["qnehvi"](toy).propose(trials, 1, 0)


@pytest.mark.parametrize("names", [("kl", "loss", "params"), ("params", "params_share")])
def test_qnehvi_refuses_objectives_it_cannot_optimise(toy: Any, names: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="qnehvi"):
        QNehviProposer(toy.family, toy.with_objectives(*names).objectives, toy.dense)
