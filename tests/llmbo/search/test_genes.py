"""NSGA-II and TPE over recipes: what they vary, and what it stands for."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmbo.errors import ConfigError
from llmbo.problem.recipe import AllocationRecipe
from llmbo.search.baselines.designs import NUM_INITIAL
from llmbo.search.baselines.genes import RecipeNumbers
from llmbo.search.strategies import strategy_of
from llmbo.types import Proposal, Proposer, Trial

OVER_RECIPES = ["nsga2-recipes", "optuna-tpe-recipes"]


def build(name: str, toy: Any) -> Proposer:
    return strategy_of(name).build(toy, toy.objectives, {})


def run(name: str, toy: Any, budget: int, seed: int = 0) -> list[Trial]:
    proposer, trials = build(name, toy), list[Trial]()
    while len(trials) < budget:
        made = proposer.propose(trials, 4, 100 * seed + len(trials))
        trials += [toy.trial(len(trials) + n, proposal, len(trials) // 4) for n, proposal in enumerate(made)]
    return trials


def with_profile(toy: Any) -> Any:
    """The run's recipe has a profile, which no number says."""
    profile = tuple(0.5 - n / toy.space.d for n in range(toy.space.d))
    toy.__dict__["family"] = replace(toy.family, recipe=AllocationRecipe(mlp_slope=0.4, profile=profile))
    return toy


@pytest.mark.parametrize("name", OVER_RECIPES)
def test_after_the_start_of_the_default_method_every_proposal_is_the_member_of_the_recipe_that_it_names(
    priced: Any, name: str
) -> None:
    toy = with_profile(priced)
    trials = run(name, toy, 36)
    start = [trial.x for trial in run("qnehvi", toy, NUM_INITIAL)]
    assert [trial.x for trial in trials[:NUM_INITIAL]] == start and all(t.on_path for t in trials[:NUM_INITIAL])
    assert len({trial.x for trial in trials}) == 36
    recipes = [AllocationRecipe.of(trial.recipe) for trial in trials[NUM_INITIAL:]]
    assert len(set(recipes)) > 12 and {recipe.profile for recipe in recipes} == {toy.family.recipe.profile}
    assert all((recipe.theta % 1).any() for recipe in recipes)  # its numbers are real ones
    for trial, recipe in zip(trials[NUM_INITIAL:], recipes, strict=True):
        x = torch.tensor(trial.x, dtype=torch.float64)
        asked = toy.space.share(x) + torch.linspace(0, 0.02, 80, dtype=torch.float64)  # prices may depend on it
        assert (toy.family.prices.members_of(recipe, asked) == x).all(-1).any(), trial


def test_a_trial_gives_back_the_numbers_that_it_stems_from(priced: Any) -> None:
    genes = RecipeNumbers(with_profile(priced).family)
    low, high = genes.bounds
    rows = low + (high - low) * torch.rand(20, len(low), generator=torch.Generator().manual_seed(0)).double()
    rows[:, -1] = 0.5 + rows[:, -1] / 2
    trials = [priced.trial(n, made) for n, made in enumerate(genes.points(rows.tolist(), "x"))]
    found = genes.of(trials)
    torch.testing.assert_close(found[:, :-1], rows[:, :-1])
    short = rows[:, -1] - found[:, -1]
    assert len(genes.names) == len(low) and bool(((short > -1e-6) & (short < 0.02)).all())
    [member] = genes.of(priced.trials([priced.family.at(0.6)]))
    assert member[:-1].tolist() == priced.family.recipe.theta.tolist() and float(member[-1]) == pytest.approx(
        0.6, abs=0.02
    )


@pytest.mark.parametrize("name", OVER_RECIPES)
def test_what_fills_up_a_batch_stems_from_recipes_too(make_priced: Callable[..., Any], name: str) -> None:
    toy = make_priced(1, 24, 0.3, 8)
    proposer, trials = build(name, toy), list[Trial]()
    while made := proposer.propose(trials, 4, len(trials)):
        trials += [toy.trial(len(trials) + n, proposal, len(trials) // 4) for n, proposal in enumerate(made)]
    assert 0 < sum(trial.on_path for trial in trials) < len(trials)
    assert all(trial.on_path or trial.recipe for trial in trials)


@pytest.mark.parametrize("name", OVER_RECIPES)
def test_recipes_that_did_well_are_followed(priced: Any, name: str) -> None:
    genes, proposer = RecipeNumbers(priced.family), build(name, priced)
    start = run(name, priced, NUM_INITIAL)

    def tried(steep: float, times: float) -> list[Trial]:
        numbers = [*AllocationRecipe(mlp_slope=steep, attention_curve=-steep).theta.tolist()]
        made = genes.points([[*numbers, 0.5 + 0.04 * n] for n in range(10)], "x")
        trials = [priced.trial(n, proposal, 3 + n // 4) for n, proposal in enumerate(made, NUM_INITIAL)]
        return [replace(trial, values={**trial.values, "kl": times * trial.values["kl"]}) for trial in trials]

    def slope(trials: Sequence[Trial]) -> float:
        made: list[Proposal] = [p for seed in range(4) for p in proposer.propose(trials, 4, seed)]
        return sum(AllocationRecipe.of(p.recipe).mlp_slope for p in made) / len(made)

    assert slope([*start, *tried(-0.9, 0.2)]) < -0.15 and 0.15 < (good := slope([*start, *tried(0.9, 0.2)]))
    assert slope([*start, *tried(0.9, 20.0)]) < good - 0.15  # what did badly is not


@pytest.mark.parametrize("name", OVER_RECIPES)
def test_without_prices_it_is_refused(toy: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} searches recipes.*--recipe-search"):
        build(name, toy)
