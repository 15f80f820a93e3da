"""The supported decoder families, one row each. The only file that knows module names.

Other packages add rows by entry points of the group `llmbo.families`: the name is a `model_type`, the value a `Family`.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Literal, get_args

from pruning.errors import InvalidFamily

ENTRY_POINTS = "llmbo.families"
# What a single unit owns: rows of its queries, keys and values, or a neuron's row; and how many heads a KV group is.
Role = Literal["query", "key", "value", "neuron", "query_heads", "kv_heads"]
Part = tuple[Role, ...]  # roles of the neighbouring rows of one unit, in their order
Inputs = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Places:
    """Where one kind of block lies, as attribute names.

    Args:
        module: The block in the decoder layer; empty when its projections are the layer's own.
        norm: The normalisation before the block, in the decoder layer. It leaves with the block.
        inputs: Input projection -> its parts, one below the other. In a part the rows of a unit are neighbours.
        output: The projection back to the residual stream.
        post_norm: The normalisation between block and residual stream, if there is one. It leaves with the block.
        counts: Attributes of the block's module that its own forward pass takes for widths -> the role they count.
        config_counts: The same for attributes that it reads from the config, which all layers share.

    Raises:
        InvalidFamily: What should be roles is none.
    """

    module: str
    norm: str
    inputs: Inputs
    output: str
    post_norm: str = ""
    counts: Mapping[str, Role] = field(default_factory=dict)
    config_counts: Mapping[str, Role] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = get_args(Role)
        for name, parts in self.inputs.items():
            if not all(isinstance(part, tuple) and part and {*part} <= {*roles} for part in parts):
                raise InvalidFamily(
                    f"`inputs` of '{name}' must be a tuple of parts, each a tuple of roles ({', '.join(roles)}), got {parts!r}."
                )
        for name, role in {**self.counts, **self.config_counts}.items():
            if role not in roles:
                raise InvalidFamily(f"'{name}' must count one of {', '.join(roles)}, got {role!r}.")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        model_type: The config's `model_type`.
        models: Models that users know it by.
        layers: Attribute of the decoder that holds its layers.
        intermediate_size: Config attribute for the number of neurons; where that is None there are 4 for each hidden unit.
        required: Config attributes of which any other value makes a model that is not supported.
        notes: What is particular about it, for the table in the documentation.
    """

    model_type: str
    models: str
    attention: Places
    mlp: Places
    layers: str = "layers"
    intermediate_size: str = "intermediate_size"
    required: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""


_QKV: Inputs = {"q_proj": (("query",),), "k_proj": (("key",),), "v_proj": (("value",),)}
_GATED: Inputs = {"gate_proj": (("neuron",),), "up_proj": (("neuron",),)}
_ATTENTION = Places("self_attn", "input_layernorm", _QKV, "o_proj")
_MLP = Places("mlp", "post_attention_layernorm", _GATED, "down_proj")
_GEMMA_ATTENTION = Places("self_attn", "input_layernorm", _QKV, "o_proj", post_norm="post_attention_layernorm")
_GEMMA_MLP = Places("mlp", "pre_feedforward_layernorm", _GATED, "down_proj", post_norm="post_feedforward_layernorm")

_ROWS = (
    Family(
        "llama", "Llama, SmolLM2, TinyLlama", _ATTENTION, _MLP,
        notes="grouped-query attention; biases where the config asks for them",
    ),
    Family("mistral", "Mistral", _ATTENTION, _MLP, notes="sliding windows"),
    Family(
        "qwen2", "Qwen2, Qwen2.5", _ATTENTION, _MLP,
        notes="biases of query, key and value; sliding windows in some layers",
    ),
    Family("qwen3", "Qwen3", _ATTENTION, _MLP, notes="norms of query and key"),
    Family(
        "gemma2", "Gemma 2", _GEMMA_ATTENTION, _GEMMA_MLP,
        notes="norms behind both blocks, alternating attention, soft-capped logits, tied embeddings",
    ),
    Family(
        "gemma3_text", "Gemma 3 (text: 270M, 1B)", _GEMMA_ATTENTION, _GEMMA_MLP,
        notes="norms behind both blocks and of query and key, alternating attention, tied embeddings",
    ),
    Family(
        "phi3", "Phi-3, Phi-3.5, Phi-4",
        Places(
            "self_attn", "input_layernorm", {"qkv_proj": (("query",), ("key",), ("value",))}, "o_proj",
            counts={"num_key_value_heads": "kv_heads"}, config_counts={"num_attention_heads": "query_heads"},
        ),
        Places("mlp", "post_attention_layernorm", {"gate_up_proj": (("neuron",), ("neuron",))}, "down_proj"),
        notes="fused `qkv_proj` and `gate_up_proj`",
    ),
    Family(
        "gpt_neox", "GPT-NeoX, Pythia",
        Places("attention", "input_layernorm", {"query_key_value": (("query", "key", "value"),)}, "dense"),
        Places("mlp", "post_attention_layernorm", {"dense_h_to_4h": (("neuron",),)}, "dense_4h_to_h"),
        notes="fused `query_key_value`, interleaved by head; parallel residual; biases",
    ),
    Family(
        "gpt2", "GPT-2, DistilGPT-2",
        Places(
            "attn", "ln_1", {"c_attn": (("query",), ("key",), ("value",))}, "c_proj",
            counts={"num_heads": "query_heads", "split_size": "query"},
        ),
        Places("mlp", "ln_2", {"c_fc": (("neuron",),)}, "c_proj"),
        layers="h",
        intermediate_size="n_inner",
        required={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
        notes="transposed weights (`Conv1D`), fused `c_attn`, learned positions, biases",
    ),
    Family(
        "opt", "OPT (not 350M)",
        Places("self_attn", "self_attn_layer_norm", _QKV, "out_proj", counts={"num_heads": "query_heads"}),
        Places("", "final_layer_norm", {"fc1": (("neuron",),)}, "fc2"),
        intermediate_size="ffn_dim",
        required={"do_layer_norm_before": True},  # a norm behind the residual sum cannot leave with its block
        notes="learned positions, biases; the MLP's projections are the layer's own",
    ),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _ROWS}


def find_family(model_type: str) -> Family | None:
    """The family of models of this type, of `FAMILIES` or a plug-in; None if there is none.

    Raises:
        InvalidFamily: The plug-in for this type cannot be loaded, gives no `Family` of this type, or is not alone with it.
    """
    points = [point for point in _plugins(tuple(sys.path)) if point.name == model_type]
    family = FAMILIES.get(model_type)
    if not points:
        return family
    if family is not None or len(points) > 1:
        raise _refused(points, f"there is a family '{model_type}' already" if family else "one of them must go")
    try:
        found = points[0].load()
    except Exception as error:  # whatever a stranger's module does while it is imported
        raise _refused(points, (str(error) or type(error).__name__).splitlines()[0]) from error
    if not isinstance(found, Family):
        raise _refused(points, f"expected a `pruning.Family`, got a {type(found).__name__}")
    if found.model_type != model_type:
        raise _refused(points, f"it is a family '{found.model_type}', which must be its name too")
    return found


def known_families() -> list[str]:
    """Every `model_type` that `find_family` is there for, sorted; no plug-in is loaded."""
    return sorted({*FAMILIES, *(point.name for point in _plugins(tuple(sys.path)))})


@cache
def _plugins(path: tuple[str, ...]) -> EntryPoints:
    """What is installed on `sys.path`, which is the key: looking through all packages takes 10 ms."""
    return entry_points(group=ENTRY_POINTS)


def _refused(points: list[EntryPoint], reason: str) -> InvalidFamily:
    named = " and ".join(
        f"'{point.name} = {point.value}' of the package '{point.dist.name if point.dist else '?'}'" for point in points
    )
    return InvalidFamily(f"Cannot use {named} as a family ({ENTRY_POINTS}): {reason}. Update or uninstall the package.")
