"""What is believed away from the path, how far an estimate is trusted, and qLogNEHVI against its definition, sampled."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmbo.problem.family import Expansions
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.posterior import ObjectivesPosterior
from llmbo.search.surrogate import (
    CHANGE,
    DISTANCE,
    LOSS_BEYOND_EXPECTED,
    LOSS_BY_DISTANCE,
    SHARE,
    expected_fall,
)
from llmbo.types import Trial, TrialState

SAMPLES = 2048


@pytest.fixture
def trials(toy: Any) -> list[Trial]:
    """Members of the family, then eight others."""
    members = toy.trials([tuple(row) for row in toy.family.path[:-1:5].int().tolist()])
    return members + toy.trials(toy.random_points(8, 2), "qnehvi")


@pytest.mark.parametrize("expanded", [False, True])
def test_with_nothing_but_the_path_measured_beliefs_are_the_prior(make_toy: Callable[..., Any], expanded: bool) -> None:
    """log excess = the path's at equal share, less what expansions let expect, plus kappa for every squared distance."""
    toy = make_toy(4, 24, 0.4, 4)
    if expanded:
        sizes = (2, toy.space.d, int(toy.space.bounds[1].max()) + 1)
        changes = 0.1 * torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        known = replace(toy.family, expansions=Expansions(torch.tensor([0.5, 1.0], dtype=torch.float64), changes))
        toy.__dict__["family"] = known
    belief = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(
        toy.trials([tuple(row) for row in toy.family.path[:-1:5].int().tolist()])
    )
    (kl,) = (objective for objective in belief.objectives if not hasattr(objective, "column"))
    Z = belief.features(torch.tensor(toy.random_points(20, 3), dtype=torch.float64))
    path = kl.expected.curve(Z[:, SHARE])
    fall = expected_fall(Z[:, CHANGE], path) if expanded else torch.zeros(len(Z), dtype=torch.float64)
    loss = (LOSS_BEYOND_EXPECTED if expanded else LOSS_BY_DISTANCE) * Z[:, DISTANCE]
    assert loss.mean() > 0.01 and (fall.abs().mean() > 0.01 or not expanded)
    torch.testing.assert_close(kl.log_excess(Z)[0], path - fall + loss, rtol=0, atol=1e-6)


def test_what_distance_is_seen_to_lose_is_expected_of_all_others(toy: Any) -> None:
    """Points lose half a nat per squared distance: so much is expected where the GP itself has little to say."""
    points = [tuple(row) for row in toy.family.path[:-1:5].int().tolist()]
    members, far = toy.trials(points), toy.random_points(24, 4)
    features = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(members).features
    curve = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(members).objectives[0].expected.curve
    Z = features(torch.tensor(far, dtype=torch.float64))
    wanted = curve(Z[:, SHARE]) + 0.5 * Z[:, DISTANCE]
    shown = [
        replace(trial, values=trial.values | {"kl": float(excess.exp()) - 0.02})
        for trial, excess in zip(toy.trials(far, "qnehvi"), wanted, strict=True)
    ]
    kl = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(members + shown[:12]).objectives[0]
    assert kl.expected.kappa == pytest.approx(0.5, abs=0.05)
    unseen = kl.log_excess(Z[12:])[0]
    assert (unseen - wanted[12:]).abs().mean() < 0.2 * (wanted - curve(Z[:, SHARE]))[12:].mean()


def test_the_estimate_of_a_lost_race_is_trusted_as_far_as_its_error_says(toy: Any, trials: list[Trial]) -> None:
    """The error of a logarithm, (error / excess)^2; what is measured in full stays exact."""
    raced = trials[-1]

    def posterior(error: float | None) -> Any:
        values = raced.values | ({} if error is None else {"error": error})
        shown = [*trials[:-1], replace(raced, values=values | {"kl": 3 * raced.values["kl"]})]
        return QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(shown)

    X = torch.tensor([raced.x], dtype=torch.float64)
    exact = posterior(None)
    Z, (full, *_) = exact.features(X), exact.objectives
    before = float(full.log_excess(Z)[1])
    deviations = [float(posterior(error).objectives[0].log_excess(Z)[1]) for error in (0.01, 0.5, 5.0)]
    assert deviations == sorted(deviations) and deviations[-1] > 2 * before, (before, deviations)

    kl, error = posterior(0.5).objectives[0], 0.5
    noise = kl.gp.likelihood.noise_covar.noise * kl.gp.outcome_transform.stdvs.square().flatten()
    assert float(noise[-1]) == pytest.approx((error / (3 * raced.values["kl"] + 0.02)) ** 2, rel=0.01)
    assert (noise[:-1] < 1e-4 * noise[-1]).all()


def volumes(values: Tensor, known: Tensor, ref_point: Tensor) -> Tensor:
    """Dominated areas, `samples`: of points whose second objective is `known` for all, and whose first varies (`samples x n`)."""
    order = known.argsort(descending=True)
    kept, best = known[order].clamp_min(ref_point[1]), (values[:, order] - ref_point[0]).clamp_min(0).cummax(-1).values
    widths = kept - torch.cat([kept[1:], ref_point[1:]])
    return (best * widths).sum(-1)


@pytest.mark.parametrize("pending", [0, 1, 3])
def test_log_nehvi_is_the_mean_gain_in_hypervolume_beyond_pending_points(
    toy: Any, trials: list[Trial], pending: int
) -> None:
    """Beyond what is measured and what is pending, on joint draws from the GP."""
    belief = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(trials)
    X_front = torch.tensor([trial.x for trial in trials[:6]], dtype=torch.float64)
    others = torch.tensor(toy.random_points(40, 5), dtype=torch.float64)
    others = others[belief.expected_improvement(X_front)(others).argsort(descending=True)]
    X_pending, X = others[1 : pending + 1], others[:8]  # what is pending is among the candidates
    found = belief.log_nehvi(X, X_front, X_pending).exp()

    together = torch.cat([X_front, X_pending, X])
    Z = belief.features(together)
    kl, share = belief.objectives
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        gain = kl.gp.posterior(Z).rsample(torch.Size([SAMPLES])).squeeze(-1)
    values, known, before = kl.from_gain(gain, Z), share.mean(Z), len(together) - len(X)

    def volume(*rows: int) -> Tensor:
        return volumes(values[:, rows], known[list(rows)], belief.ref_point)

    there = range(before)
    gains = [volume(*there, before + row) - volume(*there) for row in range(len(X))]
    expected = torch.stack(gains, -1).mean(0)
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0.05 * float(expected.max()))
    assert (found[1 : pending + 1] < 1e-3 * found.max()).all()  # it has nothing more to bring
    assert (expected > 0.2 * expected.max()).sum() >= 2  # else the comparison would say little


def test_a_batch_is_chosen_beside_what_is_running_and_what_it_holds_already(
    toy: Any, trials: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[int, ...], ...]] = []
    judged = ObjectivesPosterior.log_nehvi

    def log_nehvi(self: ObjectivesPosterior, X: Tensor, X_baseline: Tensor, X_pending: Tensor) -> Tensor:
        asked.append(tuple(tuple(row) for row in X_pending.int().tolist()))
        return judged(self, X, X_baseline, X_pending)

    monkeypatch.setattr(ObjectivesPosterior, "log_nehvi", log_nehvi)
    (x,) = toy.random_points(1, 7)
    running = replace(toy.trials([x])[0], number=len(trials), state=TrialState.RUNNING, values={})
    proposer = QNehviProposer(toy.family, toy.objectives, toy.dense, num_initial=3)
    first, second, third = (proposal.x for proposal in proposer.propose([*trials, running], 3, 0))
    assert asked == [(x,), (x, first), (x, first, second)] and len({x, first, second, third}) == 4


def test_a_candidate_goes_with_the_gain_that_was_expected_of_it(toy: Any, trials: list[Trial]) -> None:
    """Over the path at equal share, in the quality's unit: that of log-normal draws. Asked beforehand, the optimiser names the same."""
    proposer = QNehviProposer(toy.family, toy.objectives, toy.dense, sum(trial.on_path for trial in trials))
    batch = proposer.propose(trials, 2, 5)
    outlook = proposer.outlook(trials, 2, 5)
    assert outlook and list(outlook.picks) == batch and all(value > 0 for value in outlook.improvements)
    predicted = torch.tensor([proposal.predicted for proposal in batch], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(outlook.predict([p.x for p in batch]), dtype=torch.float64), predicted)
    posterior = proposer.posterior(trials)
    kl, Z = posterior.quality, posterior.features(torch.tensor([p.x for p in batch], dtype=torch.float64))
    mean, deviation = kl.log_excess(Z)
    drawn = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gains = kl.expected.curve(Z[:, SHARE]).exp() - (mean + deviation * drawn).exp()
    torch.testing.assert_close(predicted, torch.stack([gains.mean(0), gains.std(0)], -1), rtol=0.01, atol=1e-4)
    one, half = posterior.reach[0], torch.zeros(2, len(posterior.reach), dtype=torch.float64)
    half[1, 0] = one
    covariance = kl.gp.covar_module(posterior.features(half)).to_dense().detach()
    assert float(covariance[0, 1] / covariance[0, 0]) == pytest.approx(math.exp(-0.5), rel=1e-3)
    assert proposer.outlook(trials[:2], 2, 5) is None
