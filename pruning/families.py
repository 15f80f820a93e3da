"""The supported decoder families, one row each. The only file that knows module names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
    """

    module: str
    norm: str
    inputs: Inputs
    output: str
    post_norm: str = ""
    counts: Mapping[str, Role] = field(default_factory=dict)
    config_counts: Mapping[str, Role] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        model_type: The config's `model_type`.
        models: Models that users know it by.
        layers: Attribute of the decoder that holds its layers.
        intermediate_size: Config attribute for the number of neurons; where that is None there are 4 for each hidden unit.
        required: Config attributes of which any other value makes a model that is not supported.
    """

    model_type: str
    models: str
    attention: Places
    mlp: Places
    layers: str = "layers"
    intermediate_size: str = "intermediate_size"
    required: Mapping[str, Any] = field(default_factory=dict)


_QKV: Inputs = {"q_proj": (("query",),), "k_proj": (("key",),), "v_proj": (("value",),)}
_GATED: Inputs = {"gate_proj": (("neuron",),), "up_proj": (("neuron",),)}
_ATTENTION = Places("self_attn", "input_layernorm", _QKV, "o_proj")
_MLP = Places("mlp", "post_attention_layernorm", _GATED, "down_proj")
_GEMMA_ATTENTION = Places("self_attn", "input_layernorm", _QKV, "o_proj", post_norm="post_attention_layernorm")
_GEMMA_MLP = Places("mlp", "pre_feedforward_layernorm", _GATED, "down_proj", post_norm="post_feedforward_layernorm")

_ROWS = (
    Family("llama", "Llama, SmolLM2, TinyLlama", _ATTENTION, _MLP),
    Family("mistral", "Mistral", _ATTENTION, _MLP),
    Family("qwen2", "Qwen2, Qwen2.5", _ATTENTION, _MLP),
    Family("qwen3", "Qwen3", _ATTENTION, _MLP),
    Family("gemma2", "Gemma 2", _GEMMA_ATTENTION, _GEMMA_MLP),
    Family("gemma3_text", "Gemma 3 (text: 270M, 1B)", _GEMMA_ATTENTION, _GEMMA_MLP),
    Family(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4",
        Places(
            "self_attn", "input_layernorm", {"qkv_proj": (("query",), ("key",), ("value",))}, "o_proj",
            counts={"num_key_value_heads": "kv_heads"}, config_counts={"num_attention_heads": "query_heads"},
        ),
        Places("mlp", "post_attention_layernorm", {"gate_up_proj": (("neuron",), ("neuron",))}, "down_proj"),
    ),
    Family(
        "gpt_neox",
        "GPT-NeoX, Pythia",
        Places("attention", "input_layernorm", {"query_key_value": (("query", "key", "value"),)}, "dense"),
        Places("mlp", "post_attention_layernorm", {"dense_h_to_4h": (("neuron",),)}, "dense_4h_to_h"),
    ),
    Family(
        "gpt2",
        "GPT-2, DistilGPT-2",
        Places(
            "attn", "ln_1", {"c_attn": (("query",), ("key",), ("value",))}, "c_proj",
            counts={"num_heads": "query_heads", "split_size": "query"},
        ),
        Places("mlp", "ln_2", {"c_fc": (("neuron",),)}, "c_proj"),
        layers="h",
        intermediate_size="n_inner",
        required={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    ),
    Family(
        "opt",
        "OPT (not 350M)",
        Places("self_attn", "self_attn_layer_norm", _QKV, "out_proj", counts={"num_heads": "query_heads"}),
        Places("", "final_layer_norm", {"fc1": (("neuron",),)}, "fc2"),
        intermediate_size="ffn_dim",
        required={"do_layer_norm_before": True},  # a norm behind the residual sum cannot leave with its block
    ),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _ROWS}
