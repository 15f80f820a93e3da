"""What an advisor says in recipes and formulas where prices are known: what is used, what is refused, and what it leads to."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
import torch

from llmbo.advisor.client import Limits
from llmbo.advisor.context import Setting
from llmbo.advisor.designs import RULES, ruled_recipes
from llmbo.advisor.formula import block_features, evaluated
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.offline import OFFLINE, OfflineAdvisor
from llmbo.advisor.openai_client import OpenAIClient
from llmbo.advisor.parse import judge, parse_reply
from llmbo.advisor.proposer import AdvisedProposer, AdvisorSession
from llmbo.advisor.recipes import COEFFICIENTS
from llmbo.advisor.render import render, token_limit
from llmbo.advisor.replies import reply_schema
from llmbo.advisor.roles import Answer, Question
from llmbo.advisor.store import AdviceStore, Consultation, MemoryNotes
from llmbo.problem.proxy import known_values
from llmbo.problem.recipe import BOUNDS, DEFAULT_RECIPE, DENSE_PRICES, LARGEST_BONUS, WORDS, AllocationRecipe
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.baselines import ThresholdProposer
from llmbo.types import Measurement, Source, Trial

FORMULA = "is_mlp * depth"
GOOD = {
    "numbers": {"mlp_slope": 0.4},
    "profile": {"attention": [0, 0, 0, 0.5, 0.5, 0.5]},
    "formula": FORMULA,
    "coefficient": -0.5,
    "at": [0.5, 0.75],
}


def member(question: Question, recipe: AllocationRecipe, share: float) -> tuple[int, ...]:
    prices = question.context.setting.family.prices
    assert prices is not None
    theta, at = recipe.theta[None], torch.tensor([share], dtype=torch.float64)
    return tuple(prices.members(theta, at, recipe.bonus(6)[None])[0, 0].int().tolist())


@pytest.mark.parametrize(("hook", "shares"), [("warm_start", [0.5]), ("propose", [0.5, 0.75])])
def test_a_recipe_is_the_runs_own_with_what_is_named(
    question: Callable[..., Question], hook: str, shares: list[float]
) -> None:
    """Its members carry it, one in a first design and one for each share later; its profile and formula are directions as well."""
    asked = question(hook, recipes=True)
    family = asked.context.setting.family
    asked = replace(asked, context=replace(asked.context, setting=replace(
        asked.context.setting, family=replace(family, recipe=AllocationRecipe.of({"attention": 0.2})))))  # fmt: skip
    answer = parse_reply(json.dumps({"recipes": [GOOD]}), asked)
    assert not answer.rejections
    vector = evaluated(FORMULA, block_features(family))
    profile = -0.5 * vector + torch.tensor([0, 0, 0, 0.5, 0.5, 0.5, *[0] * 6], dtype=torch.float64)
    expected = replace(AllocationRecipe.of({"attention": 0.2, "mlp_slope": 0.4}), profile=tuple(profile.tolist()))
    assert [AllocationRecipe.of(candidate.recipe) for candidate in answer.candidates] == [expected] * len(shares)
    assert [candidate.x for candidate in answer.candidates] == [member(asked, expected, share) for share in shares]
    spelt, direction = answer.directions
    assert (direction.name, direction.levels, direction.profile) == (FORMULA, (), tuple(vector.tolist()))
    assert spelt.profile == pytest.approx([-(3**-0.5)] * 3 + [3**0.5] * 3 + [-(3**-0.5)] * 6) and not spelt.levels
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer
    stored = Consultation.from_dict(Consultation(1, hook, answer=answer).to_dict())
    assert stored.answer == answer
    jsonschema.validate({"recipes": [], "proposals": []}, reply_schema(hook, 6, 4, True))
    without = {key: value for key, value in GOOD.items() if key != "profile"}
    jsonschema.validate({"recipes": [without]}, reply_schema(hook, 6, 4, True))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"recipes": [GOOD | {"numbers": {"mlp_slope": 7}}]}, reply_schema(hook, 6, 4, True))


HUGE = int("9" * 400)


@pytest.mark.parametrize(
    ("item", "kind", "reason"),
    [
        ({"numbers": {"mlp_slope": 1.5}, "at": [0.5]}, "unparsable", "numbers.mlp_slope.*less than or equal to 1"),
        ({"numbers": {"mlp_slope": HUGE}, "at": [0.5]}, "unparsable", "mlp_slope"),
        ({"numbers": {"mlp_slope": [[[0.1]]]}, "at": [0.5]}, "unparsable", "mlp_slope"),
        ({"numbers": {"mlp_slop": 0.1}, "at": [0.5]}, "unparsable", "mlp_slop"),
        ({"numbers": [0.1], "at": [0.5]}, "unparsable", "numbers"),
        ({"at": []}, "unparsable", "at"),
        ({"numbers": {"mlp_slope": 0.1}}, "unparsable", "at"),
        ({"at": [0.5] * 5}, "unparsable", "at"),
        ({"at": [1e999]}, "unparsable", "at"),
        ({"at": [0.1]}, "illegal", "0.1 is below the smallest"),
        ({"at": [1.0]}, "duplicate", "the dense model"),
        ({"profile": {"mlp": [0.1, 0.2]}, "at": [0.5]}, "illegal", "profile.mlp has 2 numbers, the model has 6 layers"),
        ({"profile": {"mlp": [0.1] * 10**5}, "at": [0.5]}, "illegal", "100000 numbers"),
        ({"profile": {"mlp": [9] * 6}, "at": [0.5]}, "unparsable", "profile.mlp.0"),
        ({"profile": [0.1] * 12, "at": [0.5]}, "unparsable", "profile"),
        ({"formula": "depth.real", "at": [0.5]}, "illegal", "'depth.real' is not in the language"),
        ({"formula": "layer ** layer", "at": [0.5]}, "illegal", "not in the language"),
        ({"formula": "1 / 0", "at": [0.5]}, "illegal", "'1 / 0' is no finite number"),
        ({"formula": "depth" * 99, "at": [0.5]}, "unparsable", "at most 200"),
        ({"formula": "depth", "coefficient": 7, "at": [0.5]}, "unparsable", "coefficient"),
        ([[[]]], "unparsable", "dictionary"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_and_spoils_nothing_else(
    question: Callable[..., Question], item: Any, kind: str, reason: str
) -> None:
    answer = judge({"recipes": [item, GOOD]}, question(recipes=True))
    (rejection,) = answer.rejections
    assert rejection.kind == kind and re.search(reason, rejection.reason), rejection.reason
    assert len(rejection.text) <= 120 and len(rejection.reason) <= 300 and len(answer.candidates) == 2


def test_masses_of_items_and_unpriced_runs_are_bounded(question: Callable[..., Question]) -> None:
    asked = question(recipes=True)
    answer = judge({"recipes": [GOOD] * 10**6, "proposals": [[]] * 10**6}, asked)
    assert len(answer.candidates) == 2 and len(answer.rejections) == 2 * (asked.count - 1) + asked.count
    assert not parse_reply('{"recipes": [{"numbers": {"mlp_slope": NaN}, "at": [0.5]}]}', asked)
    (refused,) = parse_reply(json.dumps({"recipes": [GOOD]}), question()).rejections
    assert "'proposals'" in refused.reason
    both = {
        "recipes": [GOOD],
        "proposals": [{"base": "threshold:0.7", "edits": [{"layers": [1], "neurons_delta": -1}]}],
    }
    assert [bool(c.recipe) for c in parse_reply(json.dumps(both), asked).candidates] == [True, True, False]
    assert len(parse_reply(json.dumps({"proposals": both["proposals"]}), asked).candidates) == 1


@pytest.mark.parametrize("hook", ["warm_start", "propose", "directions"])
def test_nothing_to_say_is_an_answer(
    question: Callable[..., Question], chat_server: Any, advice: AdviceStore, hook: str
) -> None:
    """No repair is asked for, and nothing is noted as a failure."""
    chat_server.answer = lambda body, handler: '{"recipes": [], "formulas": []}'
    limits = Limits(calls=9, tokens=10**6, seconds=60, cost=None, deadline=9.0, price=None)
    advisor = LLMAdvisor(OpenAIClient("m", chat_server.url, chat_server.secret), limits, advice)
    answer = advisor.ask(question(hook, recipes=True), advice.open(3, hook))
    assert answer == Answer() and len(chat_server.requests) == 1
    assert [exchange.error for exchange in advice.exchanges()] == [None]


@pytest.mark.parametrize("layers", [6, 30])
def test_prompts_state_the_limits_of_a_reply(question: Callable[..., Question], layers: int) -> None:
    for hook in ("warm_start", "propose", "directions"):
        asked = question(hook, layers, recipes=True)
        text = render(asked).user
        features = block_features(asked.context.setting.family)
        assert all(f"{name} (" in text for name in features) and "at most 200 characters" in text
        example = re.search(r"Format: (\{.*\})", text)
        assert example and json.loads(example[1].replace("LAYER]", "1]")) and not parse_reply(example[1], asked)
        if hook != "directions":
            lines = [f"{name} {low:g}..{high:g} now " for name, (low, high) in BOUNDS.items()]
            assert all(line in text for line in lines) and all(words in text for words in WORDS.values())
            assert f"{layers} numbers" in text and f"-{LARGEST_BONUS} to {LARGEST_BONUS}" in text
            assert render(asked).tokens <= token_limit(layers)
        assert "recipes" not in render(question(hook, layers)).user


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("hook", ["warm_start", "propose"])
def test_advisors_without_a_model_speak_in_recipes(question: Callable[..., Question], name: str, hook: str) -> None:
    asked = question(hook, recipes=True)
    answer = judge(OFFLINE[name](asked), asked)
    assert answer.candidates and not [r for r in answer.rejections if r.kind != "duplicate"]
    recipes = {json.dumps(candidate.recipe) for candidate in answer.candidates}
    if name == "hostile":
        assert recipes == {"{}"}
    else:
        assert "{}" not in recipes and len(recipes) >= 3
    if name == "heuristic":  # it goes on with what has not been tried, and at sizes that complement one another
        first = answer.candidates[0]
        trial = replace(asked.context.trials[0], number=99, recipe=first.recipe)
        again = replace(asked, context=replace(asked.context, trials=[*asked.context.trials, trial]))
        assert json.dumps(first.recipe) not in {
            json.dumps(c.recipe) for c in judge(OFFLINE[name](again), again).candidates
        }
        space = asked.context.setting.space
        shares = space.share(torch.tensor([c.x for c in answer.candidates], dtype=torch.float64))
        assert float(shares.max() - shares.min()) > 0.15


def nobody() -> Any:
    raise AssertionError("what the optimiser thinks is for models")


def session_of(toy: Any, reply: dict[str, Any], hooks: tuple[str, ...]) -> AdvisorSession:
    setting = Setting(toy.family, toy.objectives, toy.dense, None, "full")
    advisor = OfflineAdvisor("scripted", lambda question: reply)
    return AdvisorSession(advisor, AdviceStore(MemoryNotes()), setting, hooks, 1)


def test_an_optimum_that_only_a_formula_names_is_found_with_it_and_missed_without(
    make_priced: Callable[..., Any],
) -> None:
    """Every second MLP is worth more than its price says: no number of a recipe can say so, a feature of the blocks does."""
    toy = make_priced(12, 60, 0.4, 7)
    uneven = torch.tensor([0.0] * 12 + [1.0, -1.0] * 6, dtype=torch.float64)
    prices = toy.family.prices
    told = replace(prices, anchors=torch.tensor([0.5, 1.0]).double(), corrections=torch.stack([0.5 * uneven, 0 * uneven]),
                   exchanges=torch.zeros(2, 24).double())  # fmt: skip
    family = replace(toy.family, prices=told)
    best = told.members(family.recipe.theta[None], torch.linspace(0.45, 0.9, 12).double(), 0.9 * uneven[None])[0]
    toy.__dict__["family"] = family

    def distance(reply: dict[str, Any], seed: int) -> float:
        """Levels between the advised rows and the optimum of their size, at the nearest."""
        session = session_of(toy, reply, ("directions",))
        trials = toy.trials(family.path[:-1:24].int().tolist())
        rows = torch.tensor([row.x for row in session.advise(trials, 4, seed, nobody).rows], dtype=torch.float64)
        return float(torch.cdist(rows, best, p=1).min()) if len(rows) else torch.inf

    good = {"formulas": [{"name": "what pruned members say of MLPs", "formula": "measured * is_mlp * (first < 2)"}]}
    other = {"formulas": [{"name": "late MLPs", "formula": FORMULA}]}
    found, missed = distance(good, 0), distance(other, 0)
    assert found < 0.35 * missed


@pytest.mark.parametrize("seed", range(2))
def test_a_search_finds_the_optimum_that_only_a_formula_names_and_misses_it_without(
    make_priced: Callable[..., Any], seed: int
) -> None:
    """Some MLPs in a row are worth more than their prices say: no number of a recipe can say so, and another formula does not either."""
    toy = make_priced(12, 60, 0.4, 7)
    band = torch.tensor([0.0] * 12 + [float(3 <= layer < 6) for layer in range(12)], dtype=torch.float64)
    prices, half = toy.family.prices, torch.tensor([0.5**0.5], dtype=torch.float64)
    theta, truth = toy.family.recipe.theta[None], 1.6 * band[None]
    worth = (prices.log_prices(theta, half, truth)[0, 0].exp() * prices.shares).where(prices.steps, 0.0)

    def evaluate(x: tuple[int, ...]) -> Measurement:
        gone = torch.arange(worth.shape[1]) >= torch.tensor(x)[:, None]
        kl = float((worth * gone).sum() / worth.sum())
        return Measurement({"kl": kl, "loss": 3 + kl, **known_values(toy.space, x)})

    toy.__dict__.update(family=replace(toy.family, expansions=None), evaluate=evaluate)

    def excess(formula: str) -> float:
        """What the best trial has over the optimum of its size, as a part of what the path has over it."""
        items = [{"formula": formula, "coefficient": 0.4, "at": [share]} for share in (0.5, 0.65, 0.8)]
        session = session_of(toy, {"recipes": items, "formulas": []}, ("warm_start", "propose"))
        search = QNehviProposer(toy.family, toy.objectives, toy.dense, 6, session)
        proposer = AdvisedProposer(search, ThresholdProposer(toy.family, toy.objectives, toy.dense), session, 6, 3)
        trials: list[Trial] = []
        while len(trials) < 21:
            batch = proposer.propose(trials, 3, seed + len(trials))
            trials += [toy.trial(len(trials) + n, found, len(trials) // 3) for n, found in enumerate(batch)]
        parts = []
        for trial in trials:
            share = torch.tensor([trial.values["params_share"]], dtype=torch.float64)
            if share < 0.85 and not trial.on_path:
                rows = (prices.members(theta, share, bonus)[0, 0] for bonus in (truth, 0 * truth))
                best, path = (evaluate(tuple(row.int().tolist()))["kl"] for row in rows)
                parts.append((trial.values["kl"] - best) / (path - best))
        return min(parts)

    found, missed = excess("is_mlp * (layer >= 3) * (layer < 6)"), excess(FORMULA)
    assert found < 0.4 * missed, (found, missed)


@pytest.mark.parametrize("key", ["directions", "formulas"])
def test_a_contrast_is_followed_at_the_sizes_that_it_names(priced: Any, key: str) -> None:
    named = {"edits": [{"layers": ["0-2"], "neurons_delta": -1}, {"layers": ["3-5"], "neurons_delta": 1}]}
    item = {"name": "late", "at": [0.55, 0.8], **({"formula": FORMULA} if key == "formulas" else named)}
    session = session_of(priced, {key: [item]}, ("directions",))
    rows = session.advise(priced.trials(priced.family.path[:-1:24].int().tolist()), 4, 0, nobody).rows
    shares = priced.space.share(torch.tensor([row.x for row in rows], dtype=torch.float64))
    away = (shares[:, None] - torch.tensor([0.55, 0.8])).abs()
    assert away.min(-1).values.max() < 0.03 and (away.min(0).values < 0.03).all()
    answer = judge({key: [item | {"at": [0.1]}]}, question_of(session))
    assert not answer.directions and "0.1 is below" in answer.rejections[0].reason


def question_of(session: AdvisorSession) -> Question:
    return session.question("directions", [], 4, 0)


@pytest.mark.parametrize("recipe", [DENSE_PRICES, DEFAULT_RECIPE])
def test_rules_name_how_far_to_go_and_add_nothing_to_what_a_recipe_has(
    question: Callable[..., Question], recipe: AllocationRecipe
) -> None:
    asked = question("propose", recipes=True, count=9)
    setting = asked.context.setting
    setting = replace(setting, family=replace(setting.family, recipe=recipe))
    asked = replace(asked, context=replace(asked.context, setting=setting, trials=[]))
    items = ruled_recipes(asked, [0.6])
    by_words = {why: changes for why, changes in RULES}
    assert len(items) >= 4
    for item in items:
        for name, value in item["numbers"].items():
            change, dense, own = by_words[item["why"]][name], getattr(DENSE_PRICES, name), getattr(recipe, name)
            far = max if change > 0 else min
            assert value == pytest.approx(far(own, dense + change), abs=1e-4)
        assert any(value != getattr(recipe, name) for name, value in item["numbers"].items())


def test_formulas_lead_to_rows_that_carry_their_recipe(priced: Any) -> None:
    session = session_of(priced, {"formulas": [{"name": "late", "formula": FORMULA, "why": "dear"}]}, ("directions",))
    trials = priced.trials(priced.family.path[:-1:24].int().tolist())
    good = AllocationRecipe.of({"attention": 0.5})
    trials[0] = replace(trials[0], recipe=good.to_dict())
    rows = session.advise(trials, 4, 0, nobody).rows
    assert rows and rows == session.advise(trials, 4, 0, nobody).rows
    vector = evaluated(FORMULA, block_features(priced.family))
    times, bases = set(), set()
    for row in rows:
        recipe = AllocationRecipe.of(row.recipe)
        share = priced.space.share(torch.tensor([row.x], dtype=torch.float64))
        again = priced.family.prices.members(recipe.theta[None], share, recipe.bonus(6)[None])[0, 0]
        assert tuple(again.int().tolist()) == row.x and row.source is Source.DIRECTION
        times.add(round(float(torch.tensor(recipe.profile).double() @ vector / vector.square().sum()), 6))
        bases.add(recipe.attention)
    assert times <= set(COEFFICIENTS) and min(times) < 0 < max(times) and bases == {0.0, 0.5}
    assert session.explained(replace(rows[0], why=""), trials).why == "late: dear"


def test_a_run_tries_what_it_is_told_and_keeps_where_it_comes_from(priced: Any) -> None:
    """A recipe of the first design is one trial at one share; later ones and formulas must win."""
    items = [
        {"numbers": {"mlp_slope": 0.1 * n}, "profile": {"mlp": [0.5, 0, 0, 0, 0, 0]}, "at": [0.5 + 0.1 * n, 0.9]}
        for n in range(4)
    ]
    items[0]["formula"] = "kept"
    session = session_of(priced, {"recipes": items, "formulas": []}, ("warm_start", "propose", "directions"))
    search = QNehviProposer(priced.family, priced.objectives, priced.dense, 5, session)
    proposer = AdvisedProposer(search, ThresholdProposer(priced.family, priced.objectives, priced.dense), session, 5, 3)
    trials: list[Trial] = []
    while len(trials) < 16:
        batch = proposer.propose(trials, 4, len(trials))
        trials += [
            replace(priced.trial(len(trials) + n, proposal, len(trials) // 4), recipe=proposal.recipe)
            for n, proposal in enumerate(batch)
        ]
    warm = [trial for trial in trials if trial.source is Source.WARM_START]
    assert [round(AllocationRecipe.of(t.recipe).mlp_slope, 3) for t in warm] == [0.0, 0.1, 0.2]
    shares = [trial.values["params_share"] for trial in warm]
    assert shares == pytest.approx([0.5, 0.6, 0.7], abs=0.03)
    assert session.advice.of(1, "warm_start") and len({t.x for t in trials}) == len(trials)
