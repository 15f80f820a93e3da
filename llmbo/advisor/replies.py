"""The formats an advisor replies in: edits of a base and directions, never vectors, so that depth costs no tokens.

The classes validate every reply; `reply_schema` turns them into the JSON schema that a server enforces.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

MAX_TEXT = 120  # characters of a name or a reason that are kept

# Patterns in the plainest words: llama-cpp-python dies of `\d` and `{1,3}`.
LayerRange = Annotated[str, Field(pattern="^[0-9][0-9]?[0-9]?-[0-9][0-9]?[0-9]?$")]
Base = Annotated[str, Field(pattern="^(dense|threshold:0[.][0-9][0-9]?[0-9]?)$")]
Share = Annotated[float, Field(gt=0, le=1)]
Delta = Annotated[int, Field(ge=-12, le=12)]
Level = Annotated[int, Field(ge=0, le=64)]
Text = Annotated[
    str,
    BeforeValidator(lambda value: one_line(value) if isinstance(value, str) else value),
    Field(max_length=MAX_TEXT),
]


def one_line(text: str) -> str:
    """Free text is data: one line, bounded, without control characters. Too long a reason is no reason to refuse."""
    return "".join(c if c.isprintable() else " " for c in text)[:MAX_TEXT].strip()


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


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
    """A contrast; only the ratio of its deltas matters."""

    name: Text
    edits: Annotated[list[EditPart], Field(min_length=1, max_length=6)]
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
RejectionKind = Literal["unparsable", "illegal", "duplicate"]


def reply_schema(hook: str, num_layers: int, count: int) -> dict[str, Any]:
    """JSON schema of a reply to `hook` with at most `count` items, without references, as small servers want it."""
    key, item = FORMATS[hook]
    schema = item.model_json_schema()
    inlined = _inlined(schema, schema.get("$defs", {}), num_layers)
    items = {"type": "array", "items": inlined, "minItems": int(hook != "filter"), "maxItems": count}
    return {"type": "object", "properties": {key: items}, "required": [key], "additionalProperties": False}


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
    return kept
