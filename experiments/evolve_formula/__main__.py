"""Formulas for prices, written by a language model that sees how earlier ones did, each judged by real evaluations and by no surrogate.

    python -m experiments.evolve_formula ask --text text:path/to/wikitext2-valid.txt
    python -m experiments.evolve_formula score --text text:path/to/wikitext2-valid.txt --by "MODEL, DATE"
    python -m experiments.evolve_formula control --text text:path/to/wikitext2-valid.txt
    python -m experiments.evolve_formula judge --text text:path/to/wikitext2-valid.txt --on text:path/to/another.txt
    python -m experiments.evolve_formula show

`ask` writes a prompt, `1.md`, into --out. Give it to a model, and nothing else, and put what it says beside it as `1.json`. `score`
measures each formula at its coefficient on the problem's proxy windows (`formulas.json`), and writes the next prompt, which tells how they
did. `control` measures as many recipes by a Gaussian process (`recipes.json`). `judge` takes the best of either to held-out windows of
another text (`judged.json`), where each path is prepared as a run there would prepare it, width exchanges included. Whatever is measured
is stored at once, and not measured anew.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from experiments.evolve_formula.control import Tried, next_recipe
from experiments.evolve_formula.scores import SHARES, Bench, before_exchanges, with_formula
from experiments.quiet import Quiet
from experiments.recipe_quality import SHARES as JUDGED
from experiments.recipe_quality import Members, measured
from experiments.studies import Results, one_line_errors
from llmbo.advisor.context import parameters_per_level
from llmbo.advisor.formula import MAX_LENGTH, block_features
from llmbo.advisor.parse import extract_object
from llmbo.advisor.recipes import vocabulary
from llmbo.advisor.render import environment
from llmbo.advisor.replies import COEFFICIENT, Formula, Illegal, Text, validated
from llmbo.advisor.tables import BY_SIZE
from llmbo.comparison.config import ProblemConfig, read_config
from llmbo.comparison.problems import windows_of
from llmbo.comparison.statistics import band
from llmbo.errors import ConfigError
from llmbo.models.loading import LoadedModel, load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import prepared
from llmbo.problem.recipe import AllocationRecipe

CONFIG = Path("experiments/configs/recipes.toml")
TEMPLATE = Path(__file__).with_name("prompt.j2")
OUT = Path(__file__).with_name("smollm2")
KEY = "formulas"  # of a reply's list
COUNT = 8  # formulas in a round
TABULATED = ("log_fisher", "log_sensitivity", "measured", "kept", "importance")  # the others follow from layer and kind

Entry = Mapping[str, Any]


class Written(BaseModel):
    """An item of a reply: a formula, and the coefficient at which it is tried."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    formula: Formula
    coefficient: Annotated[float, Field(ge=COEFFICIENT[0], le=COEFFICIENT[1])]
    why: Text = ""


def main(arguments: Sequence[str] | None = None) -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ask", "score", "control", "judge", "show"))
    parser.add_argument("--config", type=Path, default=CONFIG, help="of a comparison, whose problem it is")
    parser.add_argument("--text", help="in place of the config's")
    parser.add_argument("--by", default="", help="score: the model that replied, and the date")
    parser.add_argument("--recipes", type=int, help="control: how many (as many as formulas were measured)")
    parser.add_argument("--on", default="", help="judge: another text")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    if bool(options.by) != (options.what == "score") or bool(options.on) != (options.what == "judge"):
        parser.error("score needs --by 'MODEL, DATE', and judge --on TEXT: give either there and nowhere else")
    if options.what == "show":
        show(options.out)
        return
    with one_line_errors():
        config = read_config(options.config, text=options.text).arms[0].problem
        loaded = load_model(config.run.model, config.run.dtype, config.run.device)
        if options.what == "judge":
            judge(config, loaded, options.on, options.out)
            return
        with Bench.opened(config, loaded) as bench:
            formulas = Results(options.out / "formulas.json", bench.settings)
            if options.what == "control":
                number = options.recipes or len(measured_of(formulas.entries))
                control(bench, Results(options.out / "recipes.json", bench.settings), number)
                return
            if options.what == "score":
                score(bench, formulas, options.by, options.out)
            ask(bench, formulas.entries, options.out)


def ask(bench: Bench, tried: Mapping[str, Entry], out: Path) -> None:
    """Write the prompt of the first round that has no reply."""
    file = out / f"{1 + len(replies(out))}.md"
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(prompt(bench, list(tried.values())), encoding="utf-8")
    print(f"{file}: put the reply beside it, as {file.stem}.json")


def replies(out: Path) -> list[Path]:
    """Of the first round and those that follow."""
    files = (out / f"{round}.json" for round in count(1))
    return list(takewhile(Path.is_file, files))


def prompt(bench: Bench, tried: Sequence[Entry]) -> str:
    family, space = bench.family, bench.problem.space
    L, features, costs = space.num_layers, block_features(family), parameters_per_level(space)
    price = bench.problem.prices.log_prices_of(family.recipe, torch.tensor([BY_SIZE], dtype=torch.float64))[0]
    columns = [*(features[name] for name in TABULATED), price.where(price.isfinite(), torch.nan).nanmean(-1)]
    kept = bench.problem.prices.members_of(family.recipe, SHARES).int().T.tolist()
    cells = [
        " ".join([*(f"{float(column[block]):.2f}" for column in columns), ",".join(map(str, kept[block]))])
        for block in range(space.d)
    ]
    template = environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        priced=vocabulary(family, len(SHARES)),
        count=COUNT,
        last_layer=L - 1,
        levels=(space.max_levels[0], space.max_levels[-1]),
        costs=(costs["attention"], costs["mlp"]),
        features=TABULATED,
        shares=SHARES.tolist(),
        rows=[f"{layer} | {cells[layer]} | {cells[layer + L]}" for layer in range(L)],
        tried=[row_of(entry) for entry in measured_of(tried)],
        refused=[f"{entry['item']} -> {entry['refused']}" for entry in tried if "refused" in entry],
    )


def score(bench: Bench, results: Results, by: str, out: Path) -> None:
    """Measure what replies hold and has not been measured."""
    if not (files := replies(out)):
        raise ConfigError(
            f"There is no reply '{out / '1.json'}': ask first, and put there what a model says to the prompt."
        )
    for file in files:
        asked = file.with_suffix(".md")
        if not asked.is_file():
            raise ConfigError(f"'{file}' replies to a prompt that is not there: expected '{asked}', as `ask` wrote it.")
        origin = {"by": by, "prompt": hashlib.sha256(asked.read_bytes()).hexdigest()[:16]}
        for index, item in enumerate(items_of(file.read_text(encoding="utf-8"))[:COUNT], 1):
            key = f"{file.stem}.{index}"
            if key not in results.entries:
                results.add(key, origin | scored(bench, item))
                print(key, row_of(results.entries[key]), flush=True)


def items_of(reply: str) -> list[Any]:
    """What a reply lists; itself if it lists nothing."""
    try:
        items = extract_object(reply, KEY)[KEY]
    except Illegal:
        return [reply]
    return items if isinstance(items, list) else [items]


def scored(bench: Bench, item: Any) -> Entry:
    """A formula and how it does, or what is refused and why."""
    try:
        written = validated(Written, item)
        recipe = with_formula(bench.family, written.formula, written.coefficient)
        return written.model_dump(include={"formula", "coefficient", "why"}) | bench.score(recipe)
    except Illegal as error:
        return {"item": json.dumps(item)[:MAX_LENGTH], "refused": str(error)}


def control(bench: Bench, results: Results, number: int) -> None:
    """Measure recipes until there are so many."""
    if not number:
        raise ConfigError(
            "No formula has been scored: there are as many recipes as formulas, so score those first, or give --recipes."
        )
    while len(results.entries) < number:
        recipe = next_recipe(bench, [Tried.of(entry) for entry in results.entries.values()])
        key = str(1 + len(results.entries))
        results.add(key, {"recipe": recipe.to_dict()} | bench.score(recipe))
        print(key, row_of(results.entries[key]), flush=True)


def judge(config: ProblemConfig, loaded: LoadedModel, text: str, out: Path) -> None:
    """The best of either on held-out windows of another text, at the shares of `experiments.recipe_quality`."""
    formulas, recipes = (measured_of(entries(out / f"{name}.json")) for name in ("formulas", "recipes"))
    if not formulas or not recipes:
        raise ConfigError(f"'{out}' holds {len(formulas)} formulas and {len(recipes)} recipes: score both kinds first.")
    best, tuned = formulas[0], AllocationRecipe.of(recipes[0]["recipe"])
    settings = {"formula": best["formula"], "coefficient": best["coefficient"], "recipe": tuned.to_dict()}
    results = Results(out / "judged.json", settings | {"shares": JUDGED.tolist()})
    run = replace(config.run, text=text, recipe_search=True)
    windows = windows_of(replace(config, run=run), run, [], loaded)
    with prepared(run, loaded, windows, Quiet()) as problem:
        own = problem.family.recipe
        written = with_formula(before_exchanges(problem), best["formula"], best["coefficient"])
    for name, recipe in (("path", own), ("formula", written), ("recipe", tuned)):
        key = f"{text.rpartition('/')[2]} {name}"
        if key not in results.entries:
            found = measured(run, loaded, windows, replace(recipe, width_exchanges=own.width_exchanges))
            results.add(key, {"text_sha256": windows.sha256, "shares": found.shares.tolist(), "kl": found.kl.tolist()})
    show(out)


def measured_of(tried: Mapping[str, Entry] | Sequence[Entry]) -> list[Entry]:
    """What was measured, best first."""
    every = tried.values() if isinstance(tried, Mapping) else tried
    return sorted((entry for entry in every if "score" in entry), key=lambda entry: entry["score"])


def row_of(entry: Entry) -> str:
    """How one formula or recipe did, in hundredths of log KL."""
    if "refused" in entry:
        return f"refused: {entry['refused']}"
    shares = " ".join(f"{100 * ratio:+.1f}" for ratio in entry["log_ratios"])
    what = f" | {entry['coefficient']:g} | {entry['formula']} | {entry['why']}" if "formula" in entry else ""
    return f"{100 * entry['score']:+.2f}+-{100 * entry['error']:.2f} ({shares}){what}"


def entries(file: Path) -> dict[str, Entry]:
    return dict(json.loads(file.read_text(encoding="utf-8"))["entries"]) if file.is_file() else {}


def show(out: Path) -> None:
    """Scores of all, best first, and the judgement: KL over that of the path at every share, their geometric mean and its interval."""
    for name in ("formulas", "recipes"):
        tried = measured_of(entries(out / f"{name}.json"))
        print(f"{len(tried)} {name}, 100 x log KL over the path's")
        for entry in tried:
            print("  " + row_of(entry))
    judged = {
        key: Members(*(torch.tensor(found[name], dtype=torch.float64) for name in ("shares", "kl")))
        for key, found in entries(out / "judged.json").items()
    }
    for text in dict.fromkeys(key.rpartition(" ")[0] for key in judged):
        print(f"KL on {text}, held out, at shares {' '.join(map(str, JUDGED.tolist()))}: mean and its 95 % interval")
        for name, reference in (("formula", "path"), ("recipe", "path"), ("formula", "recipe")):
            own, other = (judged.get(f"{text} {which}") for which in (name, reference))
            if own is None or other is None:  # stopped before it was measured
                continue
            shares = " ".join(f"{ratio:.3f}" for ratio in own.log_ratios(other).exp().tolist())
            ratio = band(own.pseudo_values(other).tolist())
            low, mean, high = (math.exp(end or 0.0) for end in (ratio.low, ratio.mean, ratio.high))
            print(f"  {name} over {reference}: {shares}: {mean:.3f} ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
