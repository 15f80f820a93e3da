"""The supported decoder families, one row each. The only file that knows module names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Places:
    """Where one kind of block lies, as attribute names.

    A *role* is one letter for what a single unit owns: q, k, v the rows of a KV group's queries, key and value, n the
    row of a neuron, h the number of its KV heads (1), H the number of its query heads.

    Args:
        module: The block in the decoder layer; empty when its projections are the layer's own.
        norm: The normalisation before the block, in the decoder layer. It leaves with the block.
        inputs: Input projection -> its parts, each written as the roles of the neighbouring rows that one unit owns in it.
        output: The projection back to the residual stream.
        post_norm: The normalisation between block and residual stream, if there is one. It leaves with the block.
        counts: Attributes of the block's module that its own forward pass takes for widths -> the role that counts them.
        config_counts: The same for attributes that it reads from the config, which all layers share.
    """

    module: str
    norm: str
    inputs: Mapping[str, tuple[str, ...]]
    output: str
    post_norm: str = ""
    counts: Mapping[str, str] = field(default_factory=dict)
    config_counts: Mapping[str, str] = field(default_factory=dict)


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


_QKV = {"q_proj": ("q",), "k_proj": ("k",), "v_proj": ("v",)}
_GATED = {"gate_proj": ("n",), "up_proj": ("n",)}
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
            "self_attn", "input_layernorm", {"qkv_proj": ("q", "k", "v")}, "o_proj",
            counts={"num_key_value_heads": "h"}, config_counts={"num_attention_heads": "H"},
        ),
        Places("mlp", "post_attention_layernorm", {"gate_up_proj": ("n", "n")}, "down_proj"),
    ),
    Family(
        "gpt_neox",
        "GPT-NeoX, Pythia",
        Places("attention", "input_layernorm", {"query_key_value": ("qkv",)}, "dense"),
        Places("mlp", "post_attention_layernorm", {"dense_h_to_4h": ("n",)}, "dense_4h_to_h"),
    ),
    Family(
        "gpt2",
        "GPT-2, DistilGPT-2",
        Places(
            "attn", "ln_1", {"c_attn": ("q", "k", "v")}, "c_proj", counts={"num_heads": "H", "split_size": "q"}
        ),
        Places("mlp", "ln_2", {"c_fc": ("n",)}, "c_proj"),
        layers="h",
        intermediate_size="n_inner",
        required={"add_cross_attention": False, "scale_attn_by_inverse_layer_idx": False},
    ),
    Family(
        "opt",
        "OPT (not 350M)",
        Places("self_attn", "self_attn_layer_norm", _QKV, "out_proj", counts={"num_heads": "H"}),
        Places("", "final_layer_norm", {"fc1": ("n",)}, "fc2"),
        intermediate_size="ffn_dim",
        required={"do_layer_norm_before": True},  # a norm behind the residual sum cannot leave with its block
    ),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _ROWS}
