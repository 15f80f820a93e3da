"""The search tries paths of other recipes where prices are known, and remembers which."""

import json
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.recipe import DEFAULT_RECIPE, AllocationRecipe
from llmbo.problem.wording import in_words
from llmbo.search.pool import recipe_members
from llmbo.search.recipes import best_recipe
from llmbo.types import Source, Trial, TrialState


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
        asked = family.space.share(x) + torch.linspace(0, 0.02, 80, dtype=torch.float64)  # prices may depend on it
        assert (family.prices.members(theta[None], asked)[0] == x).all(-1).any()


def test_new_recipes_are_drawn_around_those_that_stand_on_the_front(family: ThresholdFamily) -> None:
    good = AllocationRecipe.of({"mlp_slope": 1.0, "attention": -1.0, "mlp_curve": 0.9})
    trial = Trial(0, 0, family.at(0.6), "recipe", TrialState.COMPLETE, recipe=good.to_dict())

    def near(trials: list[Trial]) -> int:
        rows = recipe_members(family, trials, torch.Generator().manual_seed(1))
        recipes = {tuple(row.recipe.values()) for row in rows}
        return sum(AllocationRecipe(*recipe).mlp_curve > 0.7 for recipe in recipes)

    assert near([]) == 0 and near([trial]) > 5


def test_a_run_tells_the_recipes_of_its_trials_and_goes_on_as_if_it_had_never_stopped(
    llmbo: Any, finished: Any
) -> None:
    def trials(name: str, **flags: Any) -> list[dict[str, Any]]:
        done = llmbo(name=name, **flags)
        assert done.exit_code == 0, done.output
        return [{**trial, "seconds": None, "gain": None} for trial in llmbo.report(name)["trials"]]

    flags = {"recipe_search": True, "seed": 2}
    whole = trials("whole", budget=20, **flags)
    first = trials("parts", budget=16, **flags)
    rest = trials("parts", budget=20, **flags)
    assert rest[:16] == first and rest == whole
    stem = [trial for trial in whole if trial["recipe"]]
    assert stem and all(trial["origin"] == "recipe" for trial in stem)
    assert all(AllocationRecipe.of(trial["recipe"]).to_dict() == trial["recipe"] for trial in stem)
    assert not any(trial["recipe"] for trial in finished.report()["trials"])
    _another_run_begins_with_what_it_found(llmbo)


def _another_run_begins_with_what_it_found(llmbo: Any) -> None:
    """And needs it no more after that. A run that found nothing better hands on its own recipe."""
    good, file = (
        AllocationRecipe.of({"mlp_slope": 0.7, "attention": -0.25}),
        llmbo.folder / "runs" / "whole" / "report.json",
    )
    report = llmbo.report("whole")
    assert report["recipes"][0]["names"][0] == "own" and report["recipes"][0]["numbers"] == DEFAULT_RECIPE.to_dict()
    assert [path["share"] for path in report["recipes"][0]["paths"]] == pytest.approx([0.55, 0.7, 0.85])

    def begun(name: str, recipe: str, **flags: Any) -> tuple[dict[str, float], str]:
        done = llmbo(name=name, recipe=recipe, budget=1, strategy="threshold", no_samples=True, **flags)
        assert done.exit_code == 0, done.output
        [said] = [line for line in done.stderr.splitlines() if line.startswith("note: Recipe")]
        return llmbo.report(name)["run"]["recipe"]["allocation"], said

    report["recipes"] = report["recipes"][:1]
    file.write_text(json.dumps(report), encoding="utf-8")
    numbers, said = begun("own", "whole")
    assert numbers == DEFAULT_RECIPE.to_dict() and "its own" in said and in_words(DEFAULT_RECIPE, 3) in said
    found = {"names": ["best"], "numbers": good.to_dict(), "words": "", "trials": [13, 15], "gain": 0.042}
    file.write_text(json.dumps({**report, "recipes": [*report["recipes"], found]}), encoding="utf-8")
    numbers, said = begun("next", "runs/whole/report.json")
    assert numbers == good.to_dict() and all(
        word in said for word in ("'whole'", "4.2%", "trials 13, 15", "late layers")
    )
    own, *_ = llmbo.report("next")["recipes"]
    assert own["names"] == ["own"] and "(+0.70)" in own["words"]
    assert own["paths"][0]["architecture"] != report["recipes"][0]["paths"][0]["architecture"]
    planned = llmbo(name="planned", recipe="whole", plan=True)
    assert planned.exit_code == 0 and "MLPs of late layers dearer (+0.70)" in " ".join(planned.stdout.split())

    for fault, says in (
        ({"run": {**report["run"], "recipe": None}}, "dense-prices"),
        ({"run": {**report["run"], "recipe": {"allocation": {"mlp_slop": 1}}}}, "mlp_slop"),
        ({"trials": 3}, "damaged"),
    ):
        file.write_text(json.dumps({**report, **fault}), encoding="utf-8")
        _refused(llmbo(name="x", recipe="whole"), "whole", says)
    file.unlink()
    _refused(llmbo(name="x", recipe="whole"), "whole", "report.json yet")
    shutil.rmtree(file.parent)
    _refused(llmbo(name="x", recipe="whole"), "--recipe", "'whole'", "dense-prices", "Known runs")
    assert not (llmbo.folder / "runs" / "x").exists()
    more = llmbo(name="next", recipe="runs/whole/report.json", budget=2, strategy="threshold", no_samples=True)
    assert more.exit_code == 0, more.output
    assert llmbo.report("next")["run"]["recipe"]["allocation"] == good.to_dict()


def _refused(done: Any, *words: str) -> None:
    last = done.stderr.splitlines()[-1]
    assert done.exit_code == 2 and last.startswith("error: ") and all(word in last for word in words), done.stderr


def test_nothing_is_tried_where_prices_are_unknown(family: ThresholdFamily) -> None:
    assert recipe_members(replace(family, prices=None), [], torch.Generator()) == []


def test_the_best_recipe_gains_at_several_sizes_and_not_by_chance(toy: Any) -> None:
    path = toy.trials(tuple(x) for x in toy.family.path[:-1].int().tolist())
    good, lucky, often, bad = (AllocationRecipe.of({"mlp_slope": value}) for value in (0.1, 0.2, 0.3, 0.4))

    def best(*tried: tuple[AllocationRecipe, int, float]) -> Any:
        """Recipe, member of the path, and its excess times that."""
        trials = list(path)
        for recipe, member, times in tried:
            values = {**path[member].values, "kl": times * path[member].values["kl"]}
            trials.append(
                replace(
                    path[member],
                    number=len(trials),
                    values=values,
                    origin="recipe",
                    source=Source.SEARCH,
                    recipe=recipe.to_dict(),
                )
            )
        found = best_recipe(trials, toy.objectives[0], toy.dense)
        return found and (found.recipe, len(found.trials), found.gain)

    small, large = 0, len(path) // 2
    assert best() is None and best((good, small, 0.5)) is None  # a lucky member is no path
    assert best((good, small, 0.5), (good, small, 0.5)) is None
    assert best((bad, small, 1.3), (bad, large, 1.2)) is None
    found = best((good, small, 0.8), (good, large, 0.8), (lucky, small, 0.1), (bad, small, 1.3), (bad, large, 1.2))
    assert found[:2] == (good, 2) and 0.1 < found[2] <= 0.2 + 1e-9
    # A part of what the path loses counts alike at every size, so that small models do not outvote large ones.
    assert best((good, small, 0.8), (good, large, 1.0), (often, small, 1.0), (often, large, 0.7))[0] == often
    # Of two that are as good, the one that was tried more often.
    few, many = [(good, at, 0.8) for at in (small, large)], [(often, at, 0.8) for at in (small, 1, 2, 3, large)]
    assert best(*few, *many)[0] == best(*many, *few)[0] == often
