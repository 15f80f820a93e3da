"""The surrogate's coordinates can be undone, and its GP learns what it is shown."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmbo.problem.family import Expansions
from llmbo.search import surrogate
from llmbo.search.gain import FamilyCurve
from llmbo.search.surrogate import (
    DISTANCE,
    LARGEST_FALL,
    LOSS_BEYOND_EXPECTED,
    LOSS_BY_DISTANCE,
    SHARE,
    Features,
    _uneven,
    expected_fall,
    fit_surrogate,
    gains,
    prior_weights,
    quality_from_gain,
)


@pytest.fixture
def curve() -> FamilyCurve:
    return FamilyCurve.through(
        torch.tensor([0.8, 0.4, 0.6], dtype=torch.float64), torch.tensor([0.2, 1.5, 0.7], dtype=torch.float64)
    )


@pytest.mark.parametrize("dense", [0.0, 3.9])
def test_quality_from_gain_inverts_gains(curve: FamilyCurve, dense: float) -> None:
    rng = torch.Generator().manual_seed(0)
    shares = 0.4 + 0.6 * torch.rand(50, generator=rng, dtype=torch.float64)
    values = dense + 2 * torch.rand(50, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(
        quality_from_gain(gains(values, curve(shares), dense), curve(shares), dense), values, rtol=1e-9, atol=1e-12
    )


def test_gain_is_zero_on_the_family_and_positive_below_it(curve: FamilyCurve) -> None:
    shares, excess = (
        torch.tensor([0.4, 0.6, 0.8, 1.0], dtype=torch.float64),
        torch.tensor([1.5, 0.7, 0.2, 0.0], dtype=torch.float64),
    )
    torch.testing.assert_close(
        gains(3 + excess, curve(shares), 3.0), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9
    )
    assert (gains(3 + 0.9 * excess[:3], curve(shares[:3]), 3.0) > 0).all()
    assert (gains(3 + 1.1 * excess[:3], curve(shares[:3]), 3.0) < 0).all()


def test_the_curve_falls_between_its_points_and_is_flat_outside(curve: FamilyCurve) -> None:
    inside = curve(torch.linspace(0.4, 1.0, 61, dtype=torch.float64))
    assert (inside.diff() < 0).all()
    torch.testing.assert_close(curve(torch.tensor([0.1, 1.2], dtype=torch.float64)), inside[[0, -1]], rtol=0, atol=0)
    assert curve(torch.full((2, 3), 0.5, dtype=torch.float64)).shape == (2, 3)


@pytest.mark.parametrize("n", [0, 1])
def test_a_curve_through_next_to_nothing_is_finite(n: int) -> None:
    shares, excess = torch.full((n,), 0.5, dtype=torch.float64), torch.full((n,), 0.3, dtype=torch.float64)
    assert FamilyCurve.through(shares, excess)(torch.linspace(0, 1, 11, dtype=torch.float64)).isfinite().all()


def test_members_below_the_dense_model_do_not_break_the_logarithm(curve: FamilyCurve) -> None:
    """A pruned model may be better than the dense one by noise."""
    below = FamilyCurve.through(
        torch.tensor([0.5, 0.9], dtype=torch.float64), torch.tensor([0.5, -0.3], dtype=torch.float64)
    )
    assert below(torch.linspace(0, 1, 11, dtype=torch.float64)).isfinite().all()
    assert (
        gains(torch.tensor([-1.0], dtype=torch.float64), curve(torch.tensor([0.5], dtype=torch.float64)), 0.0)
        .isfinite()
        .all()
    )


def test_features_are_weighted_levels_and_the_share(make_toy: Callable[..., Any]) -> None:
    toy = make_toy(3, 100, 0.1, 7)
    X = torch.tensor([toy.space.max_levels, *toy.random_points(10, 0)], dtype=torch.float64)
    Z = Features(toy.family)(X)
    assert Z.shape == (11, toy.space.d + 3)
    torch.testing.assert_close(Z[:, SHARE], toy.space.share(X), rtol=0, atol=0)
    weights = Z[0, : toy.space.d]  # the dense model's: a block's full width, whatever its number of levels
    torch.testing.assert_close(
        weights**2 / weights.square().mean(), toy.family.importance / toy.family.importance.mean(), rtol=1e-9, atol=0
    )
    torch.testing.assert_close(Z[:, : toy.space.d], X / X[0] * weights, rtol=1e-9, atol=1e-12)


def test_members_have_no_distance_from_the_path_and_what_leaves_it_is_expected_to_lose(
    toy: Any, is_member: Callable[..., bool]
) -> None:
    members = toy.family.path[::4]
    points = [x for x in toy.random_points(40, 2) if not is_member(toy.family, x)]
    others = torch.tensor(points, dtype=torch.float64)
    features = Features(toy.family)
    Z = features(torch.cat([members, others]))
    distance = Z[:, DISTANCE]
    torch.testing.assert_close(distance[: len(members)], torch.zeros(len(members), dtype=torch.float64))
    assert (distance[len(members) :] > 0).all()

    curve = FamilyCurve.through(Z[: len(members), SHARE], torch.linspace(1, 0, len(members), dtype=torch.float64))
    at = curve(Z[:, SHARE])
    for kappa in (0.0, 0.03, 0.5):  # what is lost per squared distance is found again, once enough is measured
        values = quality_from_gain(-kappa * distance, at, 0.0)
        assert prior_weights(None, distance, gains(values, at, 0.0)) == (0, pytest.approx(kappa, abs=0.01))
    first = slice(len(members))
    assert prior_weights(None, distance[first], gains(values, at, 0.0)[first]) == (0, pytest.approx(LOSS_BY_DISTANCE))


def test_what_expansions_are_worth_is_found_again() -> None:
    """And nobody believes them blindly where little is measured."""
    generator = torch.Generator().manual_seed(0)
    fall = 0.1 * torch.randn(60, generator=generator, dtype=torch.float64)
    distance = torch.rand(60, generator=generator, dtype=torch.float64)
    for beta, kappa in ((0.0, 0.1), (0.5, 0.0), (1.5, 0.02)):
        gain = beta * fall - kappa * distance
        assert prior_weights(fall, distance, gain) == pytest.approx((beta, kappa), abs=0.05)
        before, after = prior_weights(fall[:1], distance[:1], gain[:1])[0], prior_weights(fall, distance, gain)[0]
        assert abs(before - 1) <= abs(after - 1) + 1e-9
    nothing_yet = torch.zeros(12, dtype=torch.float64)  # all members of the family
    assert prior_weights(nothing_yet, nothing_yet, nothing_yet) == pytest.approx((1.0, LOSS_BEYOND_EXPECTED))
    assert prior_weights(fall, distance, -fall)[0] == 0  # not even when they are wrong throughout


def test_an_expected_fall_is_the_logarithm_of_what_is_left() -> None:
    excess = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    found = expected_fall(torch.tensor([0.0, -0.05, -9.0], dtype=torch.float64), excess.log())
    assert found[:2].tolist() == pytest.approx([0.0, -math.log(0.9)])
    assert float(found[2]) == pytest.approx(-math.log(LARGEST_FALL))  # far beyond what an expansion is good for


def test_costs_are_columns_in_shares_of_the_dense_models(toy: Any) -> None:
    X = torch.tensor([toy.space.max_levels, *toy.random_points(10, 0)], dtype=torch.float64)
    features = Features(toy.family, ["flops", "kv_bytes"])
    Z = features(X)
    assert Z.shape == (11, toy.space.d + 5)
    for name in ("flops", "kv_bytes"):
        torch.testing.assert_close(Z[:, features.column(name)] * features.dense[name], toy.space.cost(name, X))
    torch.testing.assert_close(Z[:, SHARE], toy.space.share(X), rtol=0, atol=0)
    assert Z[0, toy.space.d :].tolist() == [1, 1, 0, 0, 1]  # the dense model is a member of the family


def test_the_gp_predicts_unseen_points_better_than_their_mean(toy: Any) -> None:
    points = [*(tuple(row) for row in toy.family.path[:-1:3].int().tolist()), *toy.random_points(50, 1)]
    trials = toy.trials(points)
    X = torch.tensor(points, dtype=torch.float64)
    values = torch.tensor([trial.values["kl"] for trial in trials], dtype=torch.float64)
    members = len(points) - 50
    curve = FamilyCurve.through(toy.space.share(X[:members]), values[:members])
    Z, Y = Features(toy.family)(X), gains(values, curve(toy.space.share(X)), 0.0)
    gp = fit_surrogate(Z[:-15], Y[:-15, None], toy.space.d)
    with torch.no_grad():
        predicted = gp.posterior(Z[-15:]).mean.squeeze(-1)
    assert (predicted - Y[-15:]).square().mean() < 0.5 * Y[-15:].var()


def test_the_gp_does_not_look_at_costs(toy: Any) -> None:
    Z = Features(toy.family, ["flops"])(torch.tensor(toy.random_points(12, 0), dtype=torch.float64))
    gp = fit_surrogate(Z, torch.sin(3 * Z[:, :1]), toy.space.d)
    moved = Z.clone()
    moved[:, toy.space.d :] = 0
    with torch.no_grad():
        torch.testing.assert_close(gp.posterior(moved).mean, gp.posterior(Z).mean, rtol=0, atol=0)


def test_where_directions_are_priced_only_what_neighbours_do_not_share_counts(toy: Any) -> None:
    """A step of all layers alike is free, one of a single layer is not, and twice the step costs four times as much."""
    no_changes = torch.zeros(1, toy.space.d, int(toy.space.bounds[1].max()) + 1, dtype=torch.float64)
    known = replace(toy.family, expansions=Expansions(torch.ones(1, dtype=torch.float64), no_changes))
    X = torch.tensor(toy.random_points(40, 2), dtype=torch.float64)
    all_of_it, uneven = Features(toy.family)(X)[:, DISTANCE], Features(known)(X)[:, DISTANCE]
    assert (uneven <= all_of_it).all() and (uneven < all_of_it).any()
    assert Features(known)(toy.family.path)[:, DISTANCE].abs().max() < 1e-12

    even, single = torch.zeros(2, toy.space.d, dtype=torch.float64)
    even[: toy.space.num_layers] = 0.3
    single[0] = 0.3
    assert not _uneven(even[None]).any()
    assert float(_uneven(2 * single[None]).square().sum()) == pytest.approx(4 * float(_uneven(single).square().sum()))
    assert _uneven(single).any()


def test_of_many_trials_some_set_the_hyperparameters_and_all_are_predicted_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = torch.Generator().manual_seed(0)
    Z = torch.rand(40, 5, generator=rng, dtype=torch.float64)
    Y = (3 * Z[:, :1]).sin()
    Y[-2] += 2.0  # of no use to the fit, which does not see it
    monkeypatch.setattr(surrogate, "FITTED_ROWS", 14)  # every third
    found = fit_surrogate(Z, Y, 2)
    monkeypatch.setattr(surrogate, "FITTED_ROWS", 40)
    few = fit_surrogate(Z[::3], Y[::3], 2)
    kernels: list[Any] = [model.covar_module for model in (found, few, fit_surrogate(Z, Y, 2))]
    scales = [kernel.base_kernel.lengthscale.item() for kernel in kernels]
    assert abs(scales[0] / scales[1] - 1) < 0.2 < abs(scales[2] / scales[1] - 1)
    with torch.no_grad():
        there = [float(model.posterior(Z[-2:-1]).mean) for model in (found, few)]
    assert there[0] > there[1] + 0.05
