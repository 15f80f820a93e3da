"""Context -> prompt text. The words are in `prompts/*.j2`; here the numbers are chosen, rounded and kept within bounds."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

import jinja2

from llmbo.advisor.context import (
    Context,
    offset_text,
    parameters_per_level,
    share_of,
    z_scores,
)
from llmbo.advisor.parse import rejection_lines
from llmbo.advisor.recipes import vocabulary
from llmbo.advisor.replies import reply_schema
from llmbo.advisor.roles import Question, Rejection
from llmbo.types import Trial
from pruning.anatomy import BLOCK_KINDS

REPLY_TOKENS = 700  # of a reply, enough unless the model thinks
GROWTH = 8  # times as many for a second try after an empty or cut reply: models think for thousands
TOKENS_AT_32_LAYERS = 3500
TOKENS_PER_LAYER = 52  # 6000 at 80 layers
MAX_FAMILY = 14
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
    """Longest prompt for a model of this depth."""
    return TOKENS_AT_32_LAYERS + TOKENS_PER_LAYER * max(0, num_layers - 32)


def render(question: Question) -> Prompt:
    """The prompt of a question, with as many trials as fit its limit."""
    context, space = question.context, question.context.setting.space
    schema = reply_schema(question.hook, space.num_layers, question.max_items, question.priced)
    variables = _variables(question)
    rows = variables.pop("trials")
    while True:
        prompt = Prompt(
            _template("system").render(level=context.setting.level),
            _template(question.hook).render(**variables, trials=rows),
            schema,
            next(iter(schema["properties"])),
            hook=question.hook,
        )
        if prompt.tokens <= token_limit(space.num_layers) or not rows:
            return prompt
        rows = _without_middle(rows)


def render_repair(prompt: Prompt, reply: str, rejections: tuple[Rejection, ...], count: int) -> Prompt:
    """Ask again for what could not be used, with the reasons. The reply is quoted, cut to a bounded length."""
    problems = list(rejection_lines(rejections))
    again = _template("repair").render(problems=problems, count=max(1, count))
    user = f"{prompt.user}\n\nYOUR REPLY WAS\n{reply[:1500]}\n\n{again}"
    return replace(prompt, user=user)


def _template(name: str) -> jinja2.Template:
    return environment().get_template(f"{name}.j2")


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
    header, table = _table(context)
    hooked: dict[str, Any] = {"count": question.count, "priced": vocabulary(family, question.shares)}
    if question.hook in ("warm_start", "propose"):
        hooked["example_share"] = round((1 + space.min_share) / 2 - 0.05, 2)
    if question.hook == "filter":
        hooked["candidates"] = [
            f"{index} {share_of(space, x):.3f} | {offset_text(family, x)}"
            for index, x in enumerate(question.candidates)
        ]
    return hooked | {
        "level": setting.level,
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
        "quality": setting.quality.name if setting.level != "none" else "y",
        "quality_unit": setting.quality.unit,
        "costs": [o.name for o in setting.objectives if o.name not in (setting.quality.name, "params_share")],
        "limits": [f"{name} <= {limit:g}" for name, limit in {**space.limits, **setting.limits}.items()],
        "noise": None
        if context.marginals is None or context.marginals.noise is None
        else f"{context.marginals.noise:.4f}",
        "table": table,
        "table_header": header,
        "family": {"base": _base_name(context), "measured": _measured_family(context)},
        "trials": [_trial_line(context, trial) for trial in context.informative],
        "gaps": [f"{low:.2f}-{high:.2f}" for low, high in context.gaps],
        "refusals": context.refusals,
        "budget_left": context.budget_left,
    }


def _trial_line(context: Context, trial: Trial) -> str:
    setting = context.setting
    quality = trial.values[setting.quality.name]
    return (
        f"{trial.number} {trial.values['params_share']:.3f} {quality:.3f} {context.gains[trial.number]:+.3f} | "
        f"{offset_text(setting.family, trial.x)}"
    )


def _measured_family(context: Context) -> list[str]:
    members = sorted((t for t in context.complete if t.on_path), key=lambda t: t.values["params_share"])
    kept = (
        [members[round(i * (len(members) - 1) / (MAX_FAMILY - 1))] for i in range(MAX_FAMILY)]
        if len(members) > MAX_FAMILY
        else members
    )
    name = context.setting.quality.name
    return [f"{trial.values['params_share']:.2f} {trial.values[name]:.3f}" for trial in kept]


def _base_name(context: Context) -> str:
    if context.marginals is None:
        return "the family"
    return f"threshold:{share_of(context.setting.space, context.marginals.x):.2f}"


def _table(context: Context) -> tuple[str, list[str]]:
    """One row per layer: importance of both blocks and what one level less costs. Empty below level "full"."""
    statistics, marginals = context.setting.statistics, context.marginals
    if statistics is None:
        return "", []
    layers = context.setting.space.num_layers
    columns: list[tuple[str, list[str]]] = []
    for offset, kind, name in zip((0, layers), BLOCK_KINDS, ("kv", "mlp"), strict=True):
        for label, scores in (
            ("taylor", statistics.taylor),
            ("act", statistics.activation),
            ("infl", statistics.influence),
        ):
            if (kind, label) != ("attention", "act"):
                columns.append((f"{name}:{label}", _tenths(z_scores(scores[kind]))))
        if marginals is not None:
            block = slice(offset, offset + layers)
            columns.append((f"{name}:less", [_ten_thousandths(cost) for cost in marginals.cost[block]]))
            columns.append((f"{name}:now", [str(level) for level in marginals.x[block]]))
    header = "layer " + " ".join(label for label, _ in columns)
    return header, [f"{layer} " + " ".join(values[layer] for _, values in columns) for layer in range(layers)]


def _tenths(scores: Sequence[float | None]) -> list[str]:
    return ["?" if score is None else f"{round(10 * score)}" for score in scores]


def _ten_thousandths(cost: float | None) -> str:
    return "?" if cost is None else f"{round(10000 * cost)}"


def _without_middle(rows: list[str]) -> list[str]:
    """Fewer rows, the best and the worst kept longest."""
    middle = len(rows) * 2 // 3
    return rows[:middle] + rows[middle + 1 :]
