"""The closed form of the expected hypervolume gain against its definition, sampled."""

from collections.abc import Callable
from typing import Any

import botorch
import pytest
import torch
from botorch.acquisition.multi_objective import logei
from torch.utils import cpp_extension

from llmbo.problem.objectives import ref_point
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.pareto import hypervolume
from llmbo.search.pool import candidate_pool, eligible, smooth_changes, uniform_widths
from llmbo.search.surrogate import quality_from_gain

SAMPLES = 300


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (("kl", "params_share"), None),
        (("params", "loss"), None),
        (("kl", "params_share"), (0.7, 0.85)),  # parts of the front lie outside in both directions
        (("kl", "params_share", "kv_bytes"), None),
        (("flops", "kl", "loss"), None),
    ],
)
def test_expected_improvement_is_the_mean_gain_in_hypervolume(
    make_toy: Callable[..., Any], names: tuple[str, ...], reference: tuple[float, ...] | None
) -> None:
    toy = make_toy().with_objectives(*names, reference_point=reference)
    trials = toy.trials([tuple(row) for row in toy.family.path[:-1:5].int().tolist()])
    trials += toy.trials(toy.random_points(8, 2), "qnehvi")
    belief = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(trials)
    X_front = torch.tensor([trial.x for trial in trials[:8]], dtype=torch.float64)
    X = torch.tensor(toy.random_points(12, 5), dtype=torch.float64)
    found = belief.expected_improvement(X_front)(X)

    # Normal quantiles in random order: what is measured varies independently, and as evenly as can be.
    quantiles = torch.special.ndtri((torch.arange(SAMPLES, dtype=torch.float64) + 0.5) / SAMPLES)
    order = torch.Generator().manual_seed(0)
    columns, front = [], []
    for objective, believed in zip(toy.objectives, belief.objectives, strict=True):
        if objective.known:
            columns.append(-toy.space.cost(objective.name, X).expand(SAMPLES, len(X)))
            front.append(-toy.space.cost(objective.name, X_front))
            continue
        with torch.no_grad():
            posterior = believed.gp.posterior(belief.features(X))
            mean = believed.gp.posterior(belief.features(X_front)).mean.squeeze(-1)
        noise = posterior.variance.squeeze(-1).sqrt() * quantiles[torch.randperm(SAMPLES, generator=order), None]
        gain = posterior.mean.squeeze(-1) + noise
        at, at_front = (believed.expected(belief.features(points)) for points in (X, X_front))
        columns.append(-quality_from_gain(gain, at.expand_as(gain), believed.dense))
        front.append(-quality_from_gain(mean, at_front, believed.dense))
    samples, fixed, ref = torch.stack(columns, -1), torch.stack(front, -1), ref_point(toy.objectives)
    before = hypervolume(fixed, ref)
    measured = sum(not objective.known for objective in toy.objectives)
    for index in range(len(X)):
        gains = [hypervolume(torch.cat([fixed, sample[None]]), ref) - before for sample in samples[:, index]]
        close = pytest.approx(sum(gains) / SAMPLES, rel=0.03 if measured == 1 else 0.1, abs=0.01 * float(found.max()))
        assert float(found[index]) == close, index
    assert (found > 0.1 * found.max()).sum() >= 2  # else the comparison above would say little


def test_a_limit_that_is_no_objective_weighs_by_its_probability(toy: Any) -> None:
    trials = toy.trials([tuple(row) for row in toy.family.path[:-1:5].int().tolist()])
    trials += toy.trials(toy.random_points(8, 2), "qnehvi")
    X_front = torch.tensor([trial.x for trial in trials[:8]], dtype=torch.float64)
    X = torch.tensor(toy.random_points(12, 5), dtype=torch.float64)

    def value(**limits: float) -> torch.Tensor:
        proposer = QNehviProposer(toy.family, toy.objectives, toy.dense, limits=limits)
        return proposer.posterior(trials).expected_improvement(X_front)(X)

    free, strict = value(), value(loss=3.0 + 0.3)
    belief = QNehviProposer(toy.family, toy.objectives, toy.dense, limits={"loss": 3.3}).posterior(trials)
    (loss, limit), Z = belief.limits[0], belief.features(X)
    noise = torch.randn(20_000, len(X), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        posterior = loss.gp.posterior(Z)
    gain = posterior.mean.squeeze(-1) + posterior.variance.squeeze(-1).sqrt() * noise
    kept = (-loss.from_gain(gain, Z) <= limit).double().mean(0)
    torch.testing.assert_close(strict, free * kept, rtol=0.02, atol=0.01 * float(free.max()))
    assert kept.min() < 0.1 and kept.max() > 0.9
    torch.testing.assert_close(value(loss=1e6), free, rtol=1e-9, atol=0)


def test_botorch_compiles_nothing_and_heeds_the_private_mark_that_says_so(
    toy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`llmbo.search.logei` sets a private mark of BoTorch, for want of a public switch."""
    attempts: list[object] = []
    monkeypatch.setattr(cpp_extension, "load", lambda **wanted: attempts.append(wanted))
    monkeypatch.setattr(logei, "_C", None)
    trials = toy.trials([tuple(row) for row in toy.family.path[:-1:5].int().tolist()])
    posterior = QNehviProposer(toy.family, toy.objectives, toy.dense).posterior(trials)
    X = torch.tensor(toy.random_points(4, 5), dtype=torch.float64)
    values = posterior.log_nehvi(X, X[:1], X[:0])
    here = f"BoTorch {botorch.__version__}: see llmbo/search/logei.py"
    assert not attempts, f"compiles its C++ kernel although `logei._load_attempted` is set. {here}"
    monkeypatch.setattr(logei, "_load_attempted", False)
    torch.testing.assert_close(posterior.log_nehvi(X, X[:1], X[:0]), values)
    assert attempts, (
        f"does not compile a C++ kernel when `logei._load_attempted` is False: is the mark needed yet? {here}"
    )


def test_pool_candidates_stay_inside_the_bounds_and_hold_the_family(toy: Any, is_member: Callable[..., bool]) -> None:
    front = torch.tensor(toy.random_points(5, 0), dtype=torch.float64)
    pool = candidate_pool(toy.family, front, torch.Generator().manual_seed(0), 400)
    assert (
        (pool >= toy.space.bounds[0]).all() and (pool <= toy.space.bounds[1]).all() and torch.equal(pool, pool.round())
    )
    rows = {tuple(row) for row in pool.int().tolist()}
    assert {tuple(row) for row in toy.family.path.int().tolist()} <= rows
    assert len(rows) > 200  # it is a pool, not a few points many times


def test_what_is_eligible_may_be_evaluated_is_new_and_stands_there_once(toy: Any) -> None:
    (seen, *fresh) = toy.random_points(5, 3)
    none, dense = (0,) * toy.space.d, toy.space.max_levels
    too_wide = (*dense[:-1], dense[-1] + 1)
    found = eligible(torch.tensor([none, fresh[0], seen, too_wide, *fresh]).double(), toy.space, {seen})
    assert [tuple(row) for row in found.int().tolist()] == fresh


def test_smooth_changes_scale_with_the_grid(make_toy: Callable[..., Any]) -> None:
    """The same share of a block's units, whatever the number of levels."""
    coarse, fine = make_toy(4, 24, 0.4, 8).space, make_toy(4, 24, 0.4, 2).space
    changes = [
        smooth_changes(space, 50, torch.Generator().manual_seed(0)) / space.bounds[1] for space in (coarse, fine)
    ]
    torch.testing.assert_close(*changes)
    assert changes[0].abs().mean() > 0.01


def test_uniform_widths_are_equal_in_all_layers_and_of_the_wanted_size(make_toy: Callable[..., Any]) -> None:
    space = make_toy(4, 96, 0.4, 2).space  # fine steps, so that size is nearly linear between them
    share = torch.linspace(0.6, 1.0, 9, dtype=torch.float64)
    levels = uniform_widths(space, share)
    assert levels[:, :4].eq(space.bounds[1, :4]).all()
    assert levels[:, 4:].eq(levels[:, 4:5]).all() and (levels[:, 4].diff() > 0).all()
    torch.testing.assert_close(space.share(levels.round()), share, rtol=0, atol=0.02)
