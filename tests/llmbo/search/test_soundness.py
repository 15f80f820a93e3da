"""Where width exchanges have broken the path the user is told, and the search goes on along the path before them; else nobody notices.

The faults are injected: into what single blocks are said to change, and into members that no anchor vouches for.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmbo.advisor.offline import OfflineAdvisor
from llmbo.comparison.strategies import strategy_of
from llmbo.problem import exchanges as exchanging
from llmbo.problem import preparation
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.problem.prices import Prices
from llmbo.problem.recipe import DENSE_PRICES
from llmbo.search.baselines import ThresholdProposer
from llmbo.search.gain import trial_gains
from llmbo.search.soundness import SoundPath, on_sound_path
from llmbo.types import Proposal, Proposer, Source, Trial, TrialState

AT_ANCHOR, IN_SEARCH = "Width exchanges at share", "Width exchanges have broken the allocation path"
FLAGS = {"budget": 14, "min_share": 0.3}


@pytest.fixture(autouse=True)
def _measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults are planted in what would be taken from an earlier preparation."""
    monkeypatch.setenv("LLMBO_PREPARED", str(tmp_path / "prepared"))


def broken(family: ThresholdFamily) -> ThresholdFamily:
    """In large members the first layer has lost its attention."""
    path = family.path.clone()
    path[(family.shares > 0.7) & (family.shares < 0.97), 0] = 0
    shares = family.space.share(path)
    order = shares.argsort()
    return replace(family, path=path[order], shares=shares[order])


def stored(run: Any, name: str) -> list[dict[str, Any]]:
    return [{key: trial[key] for key in trial if key != "seconds"} for trial in run.report(name)["trials"]]


def test_a_healthy_run_is_told_of_no_fault(llmbo: Any) -> None:
    done = llmbo(**FLAGS | {"budget": 12})
    assert done.exit_code == 0 and "Width exchanges" not in done.output
    assert len(stored(llmbo, "tiny")) == 12


def test_exchanges_that_lose_are_dropped_with_the_expansion_that_promised_a_gain(
    llmbo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expansions of the wrong sign: without the check half of this path is worth nothing."""
    real, make, made = exchanging.exchange_costs, exchanging.informed, list[Any]()

    def wrong(*args: Any, **options: Any) -> Any:
        costs, kl = real(*args, **options)
        return {kind: -1e4 * cost for kind, cost in costs.items()}, kl

    def watched(prices: Prices, recipe: Any, exchanges: Any, *rest: Any) -> Prices:
        found = make(prices, recipe, exchanges, *rest)
        made.append((torch.stack([*exchanges.values()]), *(p.path(DENSE_PRICES) for p in (found, prices))))
        return found

    monkeypatch.setattr(exchanging, "exchange_costs", wrong)
    monkeypatch.setattr(exchanging, "informed", watched)
    done = llmbo(**FLAGS | {"budget": 1, "min_share": 0.2})
    assert done.exit_code == 0, done.output
    ((exchanges, moved, plain),) = made
    assert done.output.count(AT_ANCHOR) == 3 and not exchanges.any()
    assert torch.equal(moved, plain)
    monkeypatch.setattr(exchanging, "LOSS_OF_EXCHANGES", float("inf"))
    assert AT_ANCHOR not in llmbo(name="unguarded", **FLAGS | {"budget": 1, "min_share": 0.2}).output
    assert made[1][0].any(-1).all() and not torch.equal(made[1][1], plain)


def test_a_broken_member_is_told_and_left_behind_and_a_resumed_search_decides_alike(
    llmbo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, real = list[ThresholdFamily](), preparation.with_exchanges

    def watched(family: ThresholdFamily, *rest: Any) -> ThresholdFamily:
        made.append(family)
        return broken(real(family, *rest))

    monkeypatch.setattr(preparation, "with_exchanges", watched)
    done = llmbo(**FLAGS)
    assert done.exit_code == 0 and done.output.count(IN_SEARCH) == 1
    trials, space = stored(llmbo, "tiny"), made[0].space
    members = [space.decode(tuple(row)).to_dict() for row in made[0].path.int().tolist()]
    on_plain = [trial["architecture"] in members for trial in trials if trial["origin"] == "threshold"]
    assert (
        not all(on_plain[:4]) and all(on_plain[4:]) and len(on_plain) == 12
    )  # it is told after the first round of four
    assert trials[-1]["origin"] == "qnehvi"
    for budget in (3, 14):
        again = llmbo(name="resumed", **FLAGS | {"budget": budget})
        assert again.exit_code == 0, again.output
    assert IN_SEARCH in again.output
    assert stored(llmbo, "resumed") == trials


def at(toy: Any, family: ThresholdFamily, member: int, **values: float) -> Trial:
    """A member as a trial that measured these values."""
    x = tuple(family.path[member].int().tolist())
    trial = toy.trial(member, Proposal(x, "threshold", source=Source.PATH))
    return replace(trial, values={**trial.values, **values})


@pytest.mark.parametrize(
    ("moved", "large", "small", "left"),
    [
        (True, 12.7, 0.9, True),
        (True, 13.2, 4.0, True),
        (True, 0.4, 0.0, True),
        (True, 0.15, 0.0, False),  # near the dense model no measurement tells them apart
        (True, 1.3, 0.9, False),
        (True, 12.7, 9.0, False),  # no worse than its neighbours
        (False, 12.7, 0.9, False),  # not by exchanges
    ],
)
@pytest.mark.parametrize("quality", [Objective("kl", "", False, 1.2), Objective("skill", "", False, 0.0, True)])
def test_a_path_is_left_for_members_that_are_far_worse_than_smaller_ones(
    toy: Any, quality: Objective, moved: bool, large: float, small: float, left: bool
) -> None:
    plain, told = toy.family, list[str]()
    after = broken(plain)
    dense = {quality.name: 20.0}
    new = [row.tolist() not in plain.path.tolist() for row in after.path]
    member = new.index(True) if moved else 4
    assert new[member] is moved and not new[2]
    trials = [
        at(toy, after, member, **{quality.name: 20.0 - quality.sign * large}),
        at(toy, after, 2, **{quality.name: 20.0 - quality.sign * small}),
    ]

    def build(family: ThresholdFamily) -> Proposer:
        return ThresholdProposer(family, toy.objectives, toy.dense, origin="moved" if family is after else "plain")

    for _ in range(2):  # another process decides alike
        path = SoundPath(after, plain, quality, dense, build, told.append)
        for seen, expected in (([], False), (trials[:1], False), (trials, left), (trials, left)):
            (proposal,) = path.propose(seen, 1, 0)
            assert proposal.origin == ("plain" if expected else "moved")
    assert len(told) == 2 * left and all(line.startswith(IN_SEARCH) and "\n" not in line for line in told)


def test_an_advised_arm_asks_nothing_twice_when_the_path_is_left(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is found between its two places in the first design; a recording or a paid model would be asked again."""
    after, asked, told = broken(toy.family), list[int](), list[str]()
    problem: Any = SimpleNamespace(
        space=toy.space, family=after, threshold_family=toy.family, dense=toy.dense, limits={}
    )
    real = OfflineAdvisor.ask

    def counted(advisor: Any, question: Any, transcript: Any) -> Any:
        asked.append(question.round)
        return real(advisor, question, transcript)

    monkeypatch.setattr(OfflineAdvisor, "ask", counted)
    keys = {"by": "random", "hooks": ["warm_start"], "warm_start": 2, "num_initial": 4}
    arm = strategy_of("advised").build(problem, toy.objectives, keys, told.append)
    new = [row.tolist() not in toy.family.path.tolist() for row in after.path].index(True)
    trials = [at(toy, after, 2, kl=0.9), replace(at(toy, after, new, kl=12.7), number=1, state=TrialState.RUNNING)]
    [first] = arm.propose(trials, 1, 0)
    trials = [trials[0], replace(trials[1], state=TrialState.COMPLETE), replace(toy.trial(2, first), round=1)]
    [second] = arm.propose(trials, 1, 0)
    assert told and first.source is second.source is Source.WARM_START and first.x != second.x
    assert len(asked) == 1
    again = strategy_of("advised").build(problem, toy.objectives, keys)
    again.propose(trials[:2], 1, 0)
    assert len(asked) == 2  # another arm has no part in it


def test_where_nothing_was_exchanged_there_is_no_guard(toy: Any) -> None:
    build: Callable[[ThresholdFamily], Any] = lambda family: family  # noqa: E731
    assert on_sound_path(toy.family, toy.family, toy.objectives, toy.dense, build, print) is toy.family
    assert isinstance(on_sound_path(broken(toy.family), toy.family, toy.objectives, toy.dense, build, print), SoundPath)


def test_gains_are_not_measured_against_a_broken_member(toy: Any) -> None:
    path = [at(toy, toy.family, member) for member in range(0, len(toy.family.path) - 1, 6)]
    others = toy.trials(toy.random_points(6, 3), "qnehvi")
    sound = [*path, *(replace(trial, number=100 + trial.number) for trial in others)]
    middle = path[len(path) // 2]
    spoilt = [replace(trial, values={**trial.values, "kl": 20.0}) if trial is middle else trial for trial in sound]
    without = [trial for trial in sound if trial is not middle]
    quality = toy.objectives[0]
    found = trial_gains(spoilt, quality, toy.dense)
    assert found.pop(middle.number) < -10
    assert found == pytest.approx(trial_gains(without, quality, toy.dense))
