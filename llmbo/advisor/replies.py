"""The formats an advisor replies in: edits of a base and directions, never vectors, so that depth costs no tokens.

The classes validate every reply; `reply_schema` turns them into the JSON schema that a server enforces.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from llmbo.advisor.formula import MAX_LENGTH
from llmbo.problem.recipe import BOUNDS, LARGEST_BONUS

MAX_TEXT = 120  # characters of a name or a reason that are kept
MAX_SHARES = 4  # at which a recipe may be tried
COEFFICIENT = (-1.0, 1.0, 0.3)  # of a formula in a recipe: lowest, highest, and if none is given

P = TypeVar("P", bound=BaseModel)
RejectionKind = Literal["unparsable", "illegal", "duplicate"]

# Patterns in the plainest words: llama-cpp-python dies of `\d` and `{1,3}`.
LayerRange = Annotated[str, Field(pattern="^[0-9][0-9]?[0-9]?-[0-9][0-9]?[0-9]?$")]
Base = Annotated[str, Field(pattern="^(dense|threshold:0[.][0-9][0-9]?[0-9]?)$")]
Share = Annotated[float, Field(gt=0, le=1)]
Delta = Annotated[int, Field(ge=-12, le=12)]
Level = Annotated[int, Field(ge=0, le=64)]
Bonus = Annotated[float, Field(ge=-LARGEST_BONUS, le=LARGEST_BONUS)]
Formula = Annotated[str, Field(max_length=MAX_LENGTH)]
Text = Annotated[
    str,
    BeforeValidator(lambda value: one_line(value) if isinstance(value, str) else value),
    Field(max_length=MAX_TEXT),
]


def one_line(text: str, length: int = MAX_TEXT) -> str:
    """Free text is data: one line, bounded, without control characters. Too long a reason is no reason to refuse."""
    return "".join(c if c.isprintable() else " " for c in text)[:length].strip()


class Illegal(Exception):
    """One item cannot be used; the message says why in words for the advisor."""

    def __init__(self, reason: str, kind: RejectionKind = "illegal") -> None:
        super().__init__(reason)
        self.kind = kind


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class EditPart(_Part):
    """Change the blocks of some layers: `delta` in grid levels, cut at the bounds; `keep` is the level itself."""

    layers: Annotated[list[int | LayerRange], Field(min_length=1, max_length=12)]
    neurons_delta: Delta | None = None
    neurons_keep: Level | None = None
    kv_delta: Delta | None = None
    kv_keep: Level | None = None


class ProposalPart(_Part):
    """`target_share`: rescale the result to that size, so that contrasts are matched in cost; `also_at`: more sizes."""

    base: int | Base
    edits: Annotated[list[EditPart], Field(max_length=6)] = []
    target_share: Share | None = None
    also_at: Annotated[list[Share], Field(max_length=3)] = []
    why: Text = ""


class DirectionPart(_Part):
    """A contrast; only the ratio of its deltas matters. `at`: shares at which it is followed, none for all."""

    name: Text
    edits: Annotated[list[EditPart], Field(min_length=1, max_length=6)]
    at: Annotated[list[Share], Field(max_length=MAX_SHARES)] = []
    why: Text = ""


class FormulaPart(_Part):
    """A direction by a formula (`llmbo.advisor.formula`), whose coefficient the search chooses; `at` as of `DirectionPart`."""

    name: Text
    formula: Formula
    at: Annotated[list[Share], Field(max_length=MAX_SHARES)] = []
    why: Text = ""


NumbersPart = create_model(
    "NumbersPart",
    __base__=_Part,
    **{name: (Annotated[float, Field(ge=low, le=high)] | None, None) for name, (low, high) in BOUNDS.items()},
)  # type: ignore[call-overload]


class ProfilePart(_Part):
    """A number for every layer, by kind."""

    attention: list[Bonus] | None = None
    mlp: list[Bonus] | None = None


class RecipePart(_Part):
    """The run's own recipe with other numbers (`llmbo.problem.recipe`) and a profile, which a formula may spell.

    `at`: shares at which it is tried, in a first design only the first of them.
    `coefficient`: of the formula, which becomes a direction too, like the profile.
    """

    numbers: NumbersPart = Field(default_factory=NumbersPart)  # type: ignore[valid-type]
    profile: ProfilePart | None = None
    formula: Formula | None = None
    coefficient: Annotated[float, Field(ge=COEFFICIENT[0], le=COEFFICIENT[1])] = COEFFICIENT[2]
    at: Annotated[list[Share], Field(min_length=1, max_length=MAX_SHARES)]
    why: Text = ""


class DecisionPart(_Part):
    id: int
    keep: bool
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.5
    why: Text = ""


# hook -> (key of the reply's list, class of its items)
FORMATS: dict[str, tuple[str, type[_Part]]] = {
    "warm_start": ("proposals", ProposalPart),
    "propose": ("proposals", ProposalPart),
    "directions": ("directions", DirectionPart),
    "filter": ("decisions", DecisionPart),
}
# likewise, and before these where prices are known
PRICED: dict[str, tuple[str, type[_Part]]] = {
    "warm_start": ("recipes", RecipePart),
    "propose": ("recipes", RecipePart),
    "directions": ("formulas", FormulaPart),
}


def validated(part: type[P], item: object) -> P:
    """One item of a reply.

    Raises:
        Illegal: It has not the format of `part`.
    """
    try:
        return part.model_validate(item)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise Illegal(one_line(f"{where}: {first['msg']}"), "unparsable") from None


def formats(hook: str, priced: bool) -> dict[str, type[_Part]]:
    """Lists that a reply may hold, the preferred one first, and the class of their items."""
    return dict(filter(None, (PRICED.get(hook) if priced else None, FORMATS[hook])))


def reply_schema(hook: str, num_layers: int, count: int, priced: bool = False) -> dict[str, Any]:
    """JSON schema of a reply to `hook` with at most `count` items a list, without references, as small servers want it.

    Where prices are known, an empty list is asked for if there is nothing to say; without them small models would say nothing.
    """
    lists = {}
    for key, item in formats(hook, priced).items():
        schema = item.model_json_schema()
        inlined = _inlined(schema, schema.get("$defs", {}), num_layers)
        lists[key] = {
            "type": "array",
            "items": inlined,
            "minItems": int(not priced and hook != "filter"),
            "maxItems": count,
        }
    return {"type": "object", "properties": lists, "required": [next(iter(lists))], "additionalProperties": False}


def _inlined(node: Any, definitions: Mapping[str, Any], num_layers: int) -> Any:
    """`node` with references resolved, optional fields without their null, and layers bounded."""
    if isinstance(node, list):
        return [_inlined(child, definitions, num_layers) for child in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rpartition("/")[2]], definitions, num_layers)
    if {"type": "null"} in node.get("anyOf", ()):
        return _inlined(next(option for option in node["anyOf"] if option != {"type": "null"}), definitions, num_layers)
    kept = {
        name: _inlined(child, definitions, num_layers)
        for name, child in node.items()
        if name not in ("$defs", "title", "default", "description") or (isinstance(child, dict) and name != "$defs")
    }
    if "layers" in kept.get("properties", {}):
        integers = kept["properties"]["layers"]["items"]["anyOf"][0]
        integers.update(minimum=0, maximum=num_layers - 1)
    if kept.get("properties", {}).keys() == {"attention", "mlp"}:
        for half in kept["properties"].values():
            half.update(minItems=num_layers, maxItems=num_layers)
    return kept
