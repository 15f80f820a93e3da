"""`llmbo compare`: strategies side by side on one problem."""

from pathlib import Path
from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say, split_list


def compare(
    config: Annotated[Path, typer.Argument(help="TOML file with strategies, seeds, checkpoints and a problem.")],
    problem: Annotated[
        str | None, typer.Option(help="Recorded benchmark in place of the file's problem, e.g. problem-r-surrogate.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Replaces the problem's text, e.g. text:wikitext2-valid.txt.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Replaces the file's seeds, e.g. 0,1,2.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; by default comparisons/NAME.")] = None,
    cache: Annotated[
        Path, typer.Option(help="Database of evaluations, shared by all comparisons that name it.")
    ] = Path("comparisons/evaluations.db"),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Let all strategies think again; evaluations are kept.")
    ] = False,
) -> None:
    """Compare search strategies at equal budgets and write comparison.json and comparison.html.

    The same command continues a comparison that was stopped; larger checkpoints, more seeds and more strategies extend it.

    Example: llmbo compare experiments/configs/quick.toml
    """
    from llmbo.display.console import Console

    console = Console(stderr=True)
    with one_line_errors(interrupted="Interrupted. The same command goes on from here."):
        from llmbo.comparison.config import read_config
        from llmbo.comparison.display import CompareDisplay, table
        from llmbo.comparison.session import compare as run
        from llmbo.models.silence import silence_libraries

        silence_libraries()
        checked = read_config(config, problem, text, _seeds(seeds))
        folder = out or Path("comparisons") / checked.name
        total = len(checked.arms) * len(checked.seeds) * checked.budget
        with CompareDisplay(console, total) as display:
            result = run(checked, folder, cache, fresh, display, console.print)
        Console().print(table(result))
        say(f"Results: {folder / 'comparison.json'}   Page: {folder / 'comparison.html'}")


def _seeds(text: str | None) -> tuple[int, ...] | None:
    from llmbo.config.numbers import SEED
    from llmbo.errors import ConfigError

    if text is None:
        return None
    try:
        seeds = tuple(int(part) for part in split_list(text))
    except ValueError:
        seeds = ()
    if not seeds:
        raise ConfigError(f"--seeds needs whole numbers separated by commas, got '{text}'.")
    for seed in seeds:
        SEED.check("--seeds", seed, whole=True)
    return seeds
