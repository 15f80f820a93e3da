"""Context -> prompt text. The words are in `prompts/*.j2`; here the numbers are chosen, rounded and kept within bounds."""

import functools
import hashlib
import json
import math
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import jinja2

from llmbo.advisor.context import Context, change_text, offset_text, parameters_per_level, recipe_text, share_of
from llmbo.advisor.parse import rejection_lines
from llmbo.advisor.recipes import vocabulary
from llmbo.advisor.replies import reply_schema
from llmbo.advisor.roles import Question, Rejection
from llmbo.advisor.tables import block_tables
from llmbo.types import Proposal, Trial

REPLY_TOKENS = 4000  # of a reply, enough unless the model thinks
SHORTEST_REPLY = 700  # that is of use
GROWTH = 4  # times as many for a second try after an empty or cut reply: models think for thousands
TOKENS, TOKENS_PER_LAYER = 5500, 100  # of a prompt
MOST_TOKENS = 12_000
MAX_FAMILY = 24  # members of a path that has been measured at more are hardly apart
MAX_PICKS = 4
QUOTED = 1500  # characters of a reply that is to be repaired
MAX_BLOCKS = 6  # that matter most and least
_TOKEN = re.compile(r"[A-Za-z]{1,6}|\d|[^\sA-Za-z\d]|\n| (?=\d)")


@dataclass(frozen=True)
class Prompt:
    """What is sent: one system and one user message, and the JSON schema of the reply.

    Args:
        max_tokens: What the reply may be long, thinking included.
        second_try: The same once more, if a reply of `max_tokens` is empty or cut; no second try if it is not above it.
        hook: What it asks for.
    """

    system: str
    user: str
    schema: dict[str, Any]
    name: str
    max_tokens: int = REPLY_TOKENS
    second_try: int = GROWTH * REPLY_TOKENS
    hook: str = ""

    @property
    def tokens(self) -> int:
        """An upper estimate of its length."""
        return estimated_tokens(self.system) + estimated_tokens(self.user)

    @property
    def digest(self) -> str:
        """Tells it from any other question; how long the reply may be does not count."""
        asked = json.dumps([self.system, self.user, self.schema], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


def estimated_tokens(text: str) -> int:
    """At least what byte-pair tokenizers count for text like ours, digits taken one by one as Llama's and SmolLM's do."""
    return len(_TOKEN.findall(text))


def token_limit(num_layers: int) -> int:
    """Longest prompt for a model of this depth: 8,500 at 30 layers, 12,000 from 65 on."""
    return min(MOST_TOKENS, TOKENS + TOKENS_PER_LAYER * num_layers)


def render(question: Question, room: int = 0) -> Prompt:
    """The prompt of a question, with as many trials as fit its limit: the advisor's own last of all are left out.

    Args:
        room: Tokens of the limit that are left free.
    """
    context, space = question.context, question.context.setting.space
    schema = reply_schema(question.hook, space.num_layers, question.max_items, question.priced)
    variables = _variables(question)
    others, waiting, own = _others(context), _waiting(context), _own(context)
    known = len(others) + len(waiting) + len(own)
    while True:
        kept = [others, waiting, own]
        rows = {
            "trials": [row for _, row in sorted([*own, *others], key=lambda ranked: ranked[0])],
            "waiting": [row for _, row in waiting],
            "left_out": known - sum(map(len, kept)),
        }
        prompt = Prompt(
            _template("system").render(level=context.setting.level),
            _template(question.hook).render(**variables, **rows),
            schema,
            next(iter(schema["properties"])),
            hook=question.hook,
        )
        excess = prompt.tokens + room - token_limit(space.num_layers)
        if excess <= 0 or not any(kept):
            return prompt
        while excess > 0 and any(kept):
            some = next(filter(None, kept))
            excess -= estimated_tokens(some.pop(len(some) * 2 // 3)[1])  # the best and the worst are kept longest


def render_repair(question: Question, reply: str, rejections: tuple[Rejection, ...], count: int) -> Prompt:
    """Ask again for what could not be used, with the reasons, within the limit of the question's own prompt.

    The reply is quoted as far as there is room for it; what is refused of it is quoted with its reason in any case.
    """
    problems = list(rejection_lines(rejections))
    again = _template("repair").render(problems=problems, count=max(1, count))
    quoted = reply[:QUOTED]
    while True:
        begins = "WAS" if quoted == reply else f"BEGAN (the first {len(quoted)} characters)"
        added = f"\n\nYOUR REPLY {begins}\n{quoted}\n\n{again}"
        prompt = render(question, estimated_tokens(added))
        prompt = replace(prompt, user=prompt.user + added)
        if prompt.tokens <= token_limit(question.context.setting.space.num_layers) or not quoted:
            return prompt
        quoted = quoted[: len(quoted) // 2]


def _template(name: str) -> jinja2.Template:
    return environment().get_template(f"{name}.j2")


@functools.cache
def environment() -> jinja2.Environment:
    """Templates as text: nothing is escaped, and a variable that is missing is an error."""
    folder = files("prompts")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def _variables(question: Question) -> dict[str, Any]:
    context = question.context
    setting = context.setting
    space, family = setting.space, setting.family
    anatomy = space.anatomy
    costs = parameters_per_level(space)
    tables = block_tables(context)
    hooked: dict[str, Any] = {"count": question.count, "priced": vocabulary(family, question.shares)}
    if question.hook in ("warm_start", "propose"):
        hooked["example_share"] = round((1 + space.min_share) / 2 - 0.05, 2)
    if question.hook == "filter":
        hooked["candidates"] = [
            f"{index} {share_of(space, x):.3f} | {offset_text(family, x)}"
            for index, x in enumerate(question.candidates)
        ]
    return hooked | {
        "tells": setting.tells,
        "card": (
            f"{anatomy.family.model_type}, {anatomy.num_hidden_layers} layers, hidden {anatomy.hidden_size}, "
            f"{anatomy.num_attention_heads} heads in {anatomy.num_key_value_heads} KV groups, "
            f"{anatomy.intermediate_size} neurons per MLP, one level is {space.neuron_step} neurons"
        ),
        "max_kv": space.max_levels[0],
        "max_neurons": space.max_levels[-1],
        "kv_cost": costs["attention"],
        "neurons_cost": costs["mlp"],
        "min_share": space.min_share,
        "last_layer": space.num_layers - 1,
        "quality": "y" if "nothing" in setting.tells else setting.quality.name,
        "quality_unit": setting.quality.unit,
        "costs": [o.name for o in setting.objectives if o.name not in (setting.quality.name, "params_share")],
        "limits": [f"{name} <= {limit:g}" for name, limit in {**space.limits, **setting.limits}.items()],
        "noise": None
        if context.marginals is None or context.marginals.noise is None
        else f"{context.marginals.noise:.4f}",
        "tables": tables,
        "columns": {name for table in tables for name in table.names},
        "recipe": None if family.prices is None or not tables else recipe_text(family.recipe),
        "measured": _measured_family(context),
        "picks": _picks(context),
        "reach": _reach(context),
        "kept_promises": _kept_promises(context),
        "gaps": [f"{low:.2f}-{high:.2f}" for low, high in context.gaps],
        "refusals": context.refusals,
    }


Ranked = tuple[float, str]  # the larger the gain, the smaller


def _own(context: Context) -> list[Ranked]:
    """All that has been evaluated by the advisor's word."""
    return sorted(_ranked(context, trial, "you") for trial in context.own)


def _others(context: Context) -> list[Ranked]:
    return [_ranked(context, trial, "search") for trial in context.informative]


def _ranked(context: Context, trial: Trial, by: str) -> Ranked:
    """A trial with what was expected of it before it was measured."""
    setting, gain, name = context.setting, context.gains.get(trial.number), context.setting.quality.name
    found = (
        f"{trial.values[name]:.3f} {_gain(gain, context.errors.get(trial.number))}" if trial.complete else "failed ?"
    )
    expected = f" expected {_gain(*trial.predicted)}" if trial.predicted and "optimiser" in setting.tells else ""
    row = f"{trial.number} {share_of(setting.space, trial.x):.3f} {found}{expected} {by} | {_change(context, trial)}"
    return math.inf if gain is None else -gain, row


def _waiting(context: Context) -> list[Ranked]:
    """What the advisor has named in vain so far, and what the optimiser now expects of it."""
    points = [proposal.x for proposal in context.waiting]
    expected = context.outlook.predict(points) if context.outlook else [None] * len(points)
    rows = []
    for proposal, prediction in zip(context.waiting, expected, strict=True):
        told = f" expected {_gain(*prediction)}" if prediction else ""
        row = f"{share_of(context.setting.space, proposal.x):.3f}{told} | {_change(context, proposal)}"
        rows.append((-prediction[0] if prediction else 0.0, row))
    return sorted(rows, key=lambda ranked: ranked[0])


def _picks(context: Context) -> list[str]:
    if context.outlook is None:
        return []
    found = list(zip(context.outlook.picks, context.outlook.improvements, strict=False))[:MAX_PICKS]
    return [
        f"{share_of(context.setting.space, pick.x):.3f} {_gain(*pick.predicted)} {10000 * improvement:.1f} | "
        f"{_change(context, pick)}"
        for pick, improvement in found
        if pick.predicted
    ]


def _reach(context: Context) -> list[str]:
    """Blocks by how few of their levels tell models apart, the fewest first: the first and the last of them."""
    if context.outlook is None:
        return []
    space, order = context.setting.space, context.setting.order
    L, levels = space.num_layers, context.outlook.reach
    names = [f"{kind} {layer}" for kind in ("kv", "mlp") for layer in range(L)]
    reach = [levels[first + shown] for first in (0, L) for shown in order]
    parts = [length / top for length, top in zip(reach, space.max_levels, strict=True)]
    ranked = sorted(range(len(parts)), key=lambda index: parts[index])
    return [
        ", ".join(f"{names[index]}: {reach[index]:.1f}" for index in some)
        for some in (ranked[:MAX_BLOCKS], ranked[-MAX_BLOCKS:])
    ]


def _kept_promises(context: Context) -> str:
    """How predictions made before have come true."""
    if "optimiser" not in context.setting.tells:
        return ""
    pairs = [
        (
            (context.gains[trial.number] - trial.predicted[0]),
            math.hypot(trial.predicted[1], context.errors.get(trial.number, 0)),
        )
        for trial in context.off_path
        if trial.predicted and trial.number in context.gains
    ]
    if not pairs:
        return ""
    within = sum(abs(error) <= deviation for error, deviation in pairs)
    mean = sum(error for error, _ in pairs) / len(pairs)
    return f"{within} of {len(pairs)} gains came within one +- of what was expected, on average {mean:+.3f} off it"


def _change(context: Context, made: Trial | Proposal) -> str:
    recipe = {} if "nothing" in context.setting.tells else made.recipe
    return change_text(context.setting.family, made.x, recipe)


def _gain(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "?"
    return f"{mean:+.3f}" if deviation is None else f"{mean:+.3f}+-{deviation:.3f}"


def _measured_family(context: Context) -> list[str]:
    members = sorted((t for t in context.complete if t.on_path), key=lambda t: t.values["params_share"])
    kept = (
        [members[round(i * (len(members) - 1) / (MAX_FAMILY - 1))] for i in range(MAX_FAMILY)]
        if len(members) > MAX_FAMILY
        else members
    )
    name = context.setting.quality.name
    return [f"{trial.values['params_share']:.2f} {trial.values[name]:.3f}" for trial in kept]
