"""What `--recipe` names -> numbers: beside names and files of numbers, what another run has found."""

from pathlib import Path

from llmbo.errors import ConfigError, StorageError
from llmbo.problem.recipe import RECIPES, AllocationRecipe, recipe_of
from llmbo.problem.wording import in_words
from llmbo.report.files import find_run
from llmbo.run.rebuild import read_run

TOLD = 3  # changes of a recipe in a line


def recipe_named(word: str) -> tuple[AllocationRecipe, str]:
    """The recipe, and a line that says what it changes and, of another run, which of its recipes that is.

    Raises:
        ConfigError: It is no recipe's name, no file of numbers and no run, or a run without recipes.
        StorageError: The run has no report yet, or one that cannot be read.
    """
    path = Path(word)
    if word in RECIPES or (path.is_file() and path.name != "report.json"):
        recipe = recipe_of(word)
        return recipe, f"{word}: {in_words(recipe, TOLD)}"
    try:
        folder = find_run(word)
    except StorageError as error:
        raise ConfigError(
            f"--recipe must be {', '.join(RECIPES)}, a JSON file of numbers by name, or a finished run. {error}"
        ) from error
    report = read_run(str(folder))
    best = next((part for part in report.recipes if "best" in part.names), None)
    numbers = best.numbers if best else (report.run.recipe or {}).get("allocation")
    if not isinstance(numbers, dict):
        raise ConfigError(
            f"--recipe {word}: that run was made before there were recipes, so it has none: take dense-prices, which is how it was made."
        )
    try:
        recipe = AllocationRecipe.of(numbers)
    except ConfigError as error:
        raise ConfigError(f"--recipe {word}: the run is damaged or of another version of llmbo. {error}") from error
    tried = any(trial.recipe for trial in report.trials)
    where = "its own" + (", as none that it tried was better at two sizes or more" if tried else "")
    if best:
        trials = ", ".join(map(str, best.trials))
        where = f"the best of those it tried, {best.gain or 0:.1%} less than its path on average in trials {trials}"
    return recipe, f"from the run '{report.run.name}', {where}: {in_words(recipe, TOLD)}"
