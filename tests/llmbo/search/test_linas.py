"""The predictor of LINAS, and what its proposals are worth."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from llmbo.errors import ConfigError
from llmbo.problem.objectives import outcomes, ref_point
from llmbo.search.baselines import RandomProposer
from llmbo.search.baselines.linas import LinasProposer, Ridge
from llmbo.search.pareto import hypervolume
from llmbo.search.strategies import strategy_of
from llmbo.types import Proposer, Trial


@pytest.mark.parametrize("kind", ["sum", "positive sum", "product"])
def test_what_adds_up_or_multiplies_over_blocks_is_predicted(kind: str) -> None:
    """Models that were not measured come in the right order, and their values are near: in logarithms where these add up."""
    draw, tops = np.random.default_rng(0), np.full(6, 5.0)
    worth, levels = draw.normal(size=(6, 6)), draw.integers(0, 6, size=(300, 6))
    values = worth[np.arange(6), levels].sum(1)
    if kind != "sum":
        values = np.exp(values) if kind == "product" else values - worth.min(1).sum() + 0.1
    predictor = Ridge.of(levels[:200].astype(float), values[:200], tops)
    predicted = predictor(levels[200:].astype(float))
    assert predictor.log == (kind == "product")
    assert spearmanr(predicted, values[200:]).statistic > 0.999
    assert np.abs(predicted - values[200:]).max() < 0.05 * values.std()


def test_a_level_that_nobody_measured_lies_between_its_neighbours() -> None:
    levels = np.array([[level] for level in range(7) if level != 3], dtype=float)
    low, unknown, high = Ridge.of(levels, np.exp(levels[:, 0]), np.array([6.0]))(np.array([[2.0], [3.0], [4.0]]))
    assert low * 1.2 < unknown < high / 1.2


@pytest.mark.parametrize(("key", "least"), [("population", 2), ("generations", 1)])
def test_too_little_evolution_is_refused_in_one_line(toy: Any, key: str, least: int) -> None:
    """And the least is enough for a round."""
    trials = toy.trials(toy.random_points(6, 0))
    assert (
        len(strategy_of("linas").build(toy, toy.objectives, {key: least, "num_initial": 6}).propose(trials, 4, 0)) == 4
    )
    with pytest.raises(ConfigError, match=f"^The key {key} of LINAS must be at least {least}, got {least - 1}.$"):
        strategy_of("linas").build(toy, toy.objectives, {key: least - 1})


@pytest.mark.parametrize("seed", range(2))
def test_four_rounds_bring_more_than_random_ones(make_toy: Callable[..., Any], seed: int) -> None:
    """From the same random start, where a unit costs what its block is worth, and blocks are worth very different amounts."""
    toy = make_toy(6).with_objectives("kl", "params_share", reference_point=(0.5, 1.0))
    tops = np.array(toy.space.max_levels)
    worth = np.exp(np.random.default_rng(seed).normal(scale=1.5, size=len(tops)))

    def measured(points: Iterable[tuple[int, ...]]) -> list[Trial]:
        losses = ((trial, worth @ (1 - np.array(trial.x) / tops) / worth.sum()) for trial in toy.trials(points))
        return [replace(trial, values={**trial.values, "kl": float(loss)}) for trial, loss in losses]

    def reached(proposer: Proposer) -> float:
        points = [proposal.x for proposal in RandomProposer(toy.space).propose([], 20, seed)]
        for number in range(1, 5):
            points += [proposal.x for proposal in proposer.propose(measured(points), 4, 100 * seed + number)]
        return hypervolume(outcomes(measured(points), toy.objectives), ref_point(toy.objectives))

    linas = LinasProposer(toy.space, toy.objectives, generations=30)
    assert reached(linas) > 1.3 * reached(RandomProposer(toy.space)) > 0
