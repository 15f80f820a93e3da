"""The closed form of the expected hypervolume gain against its definition, sampled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmbo.acquisition import QNehviProposer, candidate_pool, smooth_changes, uniform_widths
from llmbo.objectives import ref_point
from llmbo.pareto import hypervolume
from llmbo.surrogate import SHARE, quality_from_gain

SAMPLES = 4000


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (("kl", "params_share"), None),
        (("params", "loss"), None),
        (("kl", "params_share"), (0.7, 0.85)),  # parts of the front lie outside in both directions
    ],
)
def test_expected_improvement_is_the_mean_gain_in_hypervolume(
    make_toy: Callable[..., Any], names: tuple[str, str], reference: tuple[float, float] | None
) -> None:
    toy = make_toy().with_objectives(*names, reference_point=reference)
    trials = toy.trials([tuple(row) for row in toy.family.path[:-1:5].int().tolist()])
    trials += toy.trials(toy.random_points(8, 2), "qnehvi")
    belief = QNehviProposer(toy.family, toy.objectives, toy.dense)._belief(trials)
    X_front = torch.tensor([trial.x for trial in trials[:8]], dtype=torch.float64)
    X = torch.tensor(toy.random_points(12, 5), dtype=torch.float64)
    found = belief.expected_improvement(X_front)(X)

    def outcomes(gain: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Gains -> both objectives for maximisation, `... x n x 2`, size in shares."""
        share = toy.space.share(points).expand_as(gain)
        columns = {True: share, False: quality_from_gain(gain, share, belief.dense, belief.curve)}
        return -torch.stack([columns[objective.known] for objective in toy.objectives], dim=-1)

    ref = ref_point(toy.objectives)
    for column, objective in enumerate(toy.objectives):
        if objective.name == "params":  # the default: the dense model's
            ref[column] = -1.0
    with torch.no_grad():
        front = outcomes(belief.gp.posterior(belief.features(X_front)).mean.squeeze(-1), X_front)
        posterior = belief.gp.posterior(belief.features(X))
        noise = torch.randn(SAMPLES, len(X), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        samples = outcomes(posterior.mean.squeeze(-1) + posterior.variance.squeeze(-1).sqrt() * noise, X)
    before = hypervolume(front, ref)
    for index in range(len(X)):
        # along one candidate only its quality varies, so the gain is interpolated over a grid of samples
        ordered = samples[:, index].sort(0).values[:: SAMPLES // 200]
        expected = sum(hypervolume(torch.cat([front, sample[None]]), ref) - before for sample in ordered) / len(ordered)
        assert float(found[index]) == pytest.approx(expected, rel=0.05, abs=2e-4), index
    assert (found > 1e-3).any()


def test_pool_candidates_stay_inside_the_bounds_and_hold_the_family(toy: Any, is_member: Callable[..., bool]) -> None:
    front = torch.tensor(toy.random_points(5, 0), dtype=torch.float64)
    pool = candidate_pool(toy.family, front, torch.Generator().manual_seed(0), 400)
    assert (
        (pool >= toy.space.bounds[0]).all() and (pool <= toy.space.bounds[1]).all() and torch.equal(pool, pool.round())
    )
    rows = {tuple(row) for row in pool.int().tolist()}
    assert {tuple(row) for row in toy.family.path.int().tolist()} <= rows
    assert len(rows) > 200  # it is a pool, not a few points many times


def test_smooth_changes_scale_with_the_grid(make_toy: Callable[..., Any]) -> None:
    """The same share of a block's units, whatever the number of levels."""
    coarse, fine = make_toy(4, 24, 0.4, 8).space, make_toy(4, 24, 0.4, 2).space
    changes = [
        smooth_changes(space, 50, torch.Generator().manual_seed(0)) / space.bounds[1] for space in (coarse, fine)
    ]
    torch.testing.assert_close(*changes)
    assert changes[0].abs().mean() > 0.01 and SHARE == -1


def test_uniform_widths_are_equal_in_all_layers_and_of_the_wanted_size(make_toy: Callable[..., Any]) -> None:
    space = make_toy(4, 96, 0.4, 2).space  # fine steps, so that size is nearly linear between them
    share = torch.linspace(0.6, 1.0, 9, dtype=torch.float64)
    levels = uniform_widths(space, share)
    assert levels[:, :4].eq(space.bounds[1, :4]).all()
    assert levels[:, 4:].eq(levels[:, 4:5]).all() and (levels[:, 4].diff() > 0).all()
    torch.testing.assert_close(space.share(levels.round()), share, rtol=0, atol=0.02)
