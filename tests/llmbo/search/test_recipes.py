"""The search tries paths of other recipes where prices are known, and remembers which."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.recipe import AllocationRecipe
from llmbo.search.pool import recipe_members
from llmbo.types import Trial, TrialState


@pytest.fixture
def family(priced: Any) -> ThresholdFamily:
    found: ThresholdFamily = priced.family
    return found


def test_members_of_new_recipes_lie_on_the_paths_that_they_name(family: ThresholdFamily) -> None:
    assert family.prices is not None
    rows = recipe_members(family, [], torch.Generator().manual_seed(1))
    assert len({tuple(row.recipe.values()) for row in rows}) > 20 and len({row.x for row in rows}) > 50
    for row in rows[::37]:
        theta = AllocationRecipe.of(row.recipe).theta
        x = torch.tensor([row.x], dtype=torch.float64)
        assert torch.equal(family.prices.members(theta[None], family.space.share(x))[0], x)


def test_new_recipes_are_drawn_around_those_that_stand_on_the_front(family: ThresholdFamily) -> None:
    good = AllocationRecipe.of({"mlp_slope": 1.0, "attention": -1.0, "mlp_curve": 0.9})
    trial = Trial(0, 0, family.at(0.6), "recipe", TrialState.COMPLETE, recipe=good.to_dict())

    def near(trials: list[Trial]) -> int:
        rows = recipe_members(family, trials, torch.Generator().manual_seed(1))
        recipes = {tuple(row.recipe.values()) for row in rows}
        return sum(AllocationRecipe(*recipe).mlp_curve > 0.7 for recipe in recipes)

    assert near([]) == 0 and near([trial]) > 5


def test_a_run_tells_the_recipes_of_its_trials_and_goes_on_as_if_it_had_never_stopped(llmbo: Any) -> None:
    def trials(name: str, **flags: Any) -> list[dict[str, Any]]:
        done = llmbo(name=name, **flags)
        assert done.exit_code == 0, done.output
        return [{**trial, "seconds": None, "gain": None} for trial in llmbo.report(name)["trials"]]

    flags = {"recipe_search": True, "seed": 1}
    whole = trials("whole", budget=20, **flags)
    first = trials("parts", budget=16, **flags)
    rest = trials("parts", budget=20, **flags)
    assert rest[:16] == first and rest == whole
    stem = [trial for trial in whole if trial["recipe"]]
    assert stem and all(trial["origin"] == "recipe" for trial in stem)
    assert all(AllocationRecipe.of(trial["recipe"]).to_dict() == trial["recipe"] for trial in stem)
    assert not any(trial["recipe"] for trial in trials("without", budget=14))


def test_nothing_is_tried_where_prices_are_unknown(family: ThresholdFamily) -> None:
    assert recipe_members(replace(family, prices=None), [], torch.Generator()) == []
