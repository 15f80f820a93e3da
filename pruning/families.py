"""The supported decoder families, one row each. The only file that knows module names.

Other packages add rows by entry points of the group `llmbo.families`: the name is a `model_type`, the value a `Family`.
"""

import sys
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints, entry_points

from pruning.errors import InvalidFamily
from pruning.family import Family, Inputs, Places

ENTRY_POINTS = "llmbo.families"

_QKV: Inputs = {"q_proj": (("query",),), "k_proj": (("key",),), "v_proj": (("value",),)}
_GATED: Inputs = {"gate_proj": (("neuron",),), "up_proj": (("neuron",),)}
_ATTENTION = Places("self_attn", "input_layernorm", _QKV, "o_proj")
_MLP = Places("mlp", "post_attention_layernorm", _GATED, "down_proj")
_GEMMA_ATTENTION = Places("self_attn", "input_layernorm", _QKV, "o_proj", post_norm="post_attention_layernorm")
_GEMMA_MLP = Places("mlp", "pre_feedforward_layernorm", _GATED, "down_proj", post_norm="post_feedforward_layernorm")
_UP: Inputs = {"up_proj": (("neuron",),)}  # an MLP without a gate
_PLAIN_MLP = Places("mlp", "post_attention_layernorm", _UP, "down_proj")
_FUSED_GATED: Inputs = {"gate_up_proj": (("neuron",), ("neuron",))}
# Norms behind the blocks alone: what goes in is the residual stream.
_POST_ATTENTION = Places("self_attn", "", _QKV, "o_proj", post_norm="post_attention_layernorm")
_POST_MLP = Places("mlp", "", _GATED, "down_proj", post_norm="post_feedforward_layernorm")
# One norm for both blocks, which add to the residual stream side by side.
_PARALLEL_ATTENTION = Places("self_attn", "", _QKV, "o_proj")
_PARALLEL_MLP = Places("mlp", "", _GATED, "down_proj")

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
        Places("mlp", "post_attention_layernorm", _FUSED_GATED, "down_proj"),
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
    Family("arcee", "AFM", _ATTENTION, _PLAIN_MLP, notes="MLP without a gate"),
    Family(
        "apertus", "Apertus",
        Places("self_attn", "attention_layernorm", _QKV, "o_proj"), Places("mlp", "feedforward_layernorm", _UP, "down_proj"),
        notes="MLP without a gate, whose activation is learnt; norms of query and key",
    ),
    Family(
        "biogpt", "BioGPT",
        Places("self_attn", "self_attn_layer_norm", _QKV, "out_proj"),
        Places("", "final_layer_norm", {"fc1": (("neuron",),)}, "fc2"),
        notes="learned positions, biases; the MLP's projections are the layer's own",
    ),
    Family(
        "cohere", "Command R, Aya 23 (not Command R+)", _PARALLEL_ATTENTION, _PARALLEL_MLP, norm="input_layernorm",
        required={"use_qk_norm": False}, logits_times="logit_scale",  # each head would have weights of its own there
        notes="both blocks side by side behind one norm; scaled logits, tied embeddings",
    ),
    Family(
        "cohere2", "Command R7B, Command A, Aya", _PARALLEL_ATTENTION, _PARALLEL_MLP, norm="input_layernorm",
        logits_times="logit_scale",
        notes="both blocks side by side behind one norm; sliding windows, scaled logits, tied embeddings",
    ),
    Family("cwm", "Code World Model", _ATTENTION, _MLP, notes="sliding windows in most layers"),
    Family("ernie4_5", "ERNIE 4.5 (0.3B)", _ATTENTION, _MLP, notes="biases where the config asks for them"),
    Family(
        "exaone4", "EXAONE 4", _POST_ATTENTION, _POST_MLP,
        notes="norms behind both blocks alone, and of query and key; sliding windows in some layers",
    ),
    Family("gemma", "Gemma, CodeGemma", _ATTENTION, _MLP, notes="large heads, tied embeddings"),
    Family(
        "glm", "GLM-4 (9B), GLM-Edge", _ATTENTION, Places("mlp", "post_attention_layernorm", _FUSED_GATED, "down_proj"),
        notes="fused `gate_up_proj`; biases of query, key and value",
    ),
    Family(
        "glm4", "GLM-4-0414, GLM-Z1",
        Places("self_attn", "input_layernorm", _QKV, "o_proj", post_norm="post_self_attn_layernorm"),
        Places("mlp", "post_attention_layernorm", _FUSED_GATED, "down_proj", post_norm="post_mlp_layernorm"),
        notes="fused `gate_up_proj`; norms behind both blocks",
    ),
    Family(
        "gpt_bigcode", "StarCoder, SantaCoder",
        Places(
            "attn", "ln_1", {"c_attn": (("query",), ("key",), ("value",))}, "c_proj",
            counts={"num_heads": "query_heads", "embed_dim": "query"},
        ),
        Places("mlp", "ln_2", {"c_fc": (("neuron",),)}, "c_proj"),
        layers="h", intermediate_size="n_inner", required={"multi_query": True, "add_cross_attention": False},
        notes="one KV head, of whose query heads some may go; fused `c_attn`, learned positions, biases",
    ),
    Family(
        "gptj", "GPT-J",
        Places("attn", "", _QKV, "out_proj", counts={"num_attention_heads": "query_heads"}),
        Places("mlp", "", {"fc_in": (("neuron",),)}, "fc_out"),
        layers="h", intermediate_size="n_inner", norm="ln_1",
        notes="both blocks side by side behind one norm; biases of MLP and head",
    ),
    Family(
        "granite", "Granite 3 (dense)", _ATTENTION, _MLP, residual_scale="residual_multiplier", logits_over="logits_scaling",
        notes="scaled embeddings, residual stream and logits",
    ),
    Family("helium", "Helium", _ATTENTION, _MLP, notes="as Llama, rotating pairs"),
    Family("hunyuan_v1_dense", "Hunyuan (dense)", _ATTENTION, _MLP, notes="norms of query and key"),
    Family(
        "hyperclovax", "HyperCLOVA X SEED",
        Places("self_attn", "input_layernorm", _QKV, "o_proj", post_norm="post_norm1"),
        Places("mlp", "post_attention_layernorm", _GATED, "down_proj", post_norm="post_norm2"),
        residual_scale="residual_multiplier", logits_times="logits_scaling",
        notes="scaled embeddings, residual stream and logits; norms behind both blocks where the config asks for them",
    ),
    Family("internlm3", "InternLM3", _ATTENTION, _MLP, notes="loads as a Llama; biases where the config asks for them"),
    Family("iquestcoder", "IQuest-Coder", _ATTENTION, _MLP, notes="loads as a Llama"),
    Family("jais2", "Jais 2", _ATTENTION, _PLAIN_MLP, notes="MLP without a gate; biases"),
    Family("ministral", "Ministral 8B", _ATTENTION, _MLP, notes="sliding windows in some layers"),
    Family("ministral3", "Ministral 3 (text)", _ATTENTION, _MLP, notes="queries scaled by position"),
    Family(
        "nanochat", "nanochat", _ATTENTION, Places("mlp", "post_attention_layernorm", {"fc1": (("neuron",),)}, "fc2"),
        notes="norms without weights, also of query and key; MLP without a gate, soft-capped logits",
    ),
    Family("nemotron", "Nemotron 4, Minitron", _ATTENTION, _PLAIN_MLP, notes="MLP without a gate; biases of norms"),
    Family("olmo", "OLMo", _ATTENTION, _MLP, notes="norms without weights"),
    Family(
        "olmo2", "OLMo 2", _POST_ATTENTION, _POST_MLP, whole_attention=True,
        notes="norms behind both blocks alone; one over all heads of query and of key, so attention is kept whole or not at all",
    ),
    Family(
        "olmo3", "OLMo 3", _POST_ATTENTION, _POST_MLP, whole_attention=True,
        notes="as OLMo 2, with sliding windows in most layers",
    ),
    Family(
        "phi", "Phi-1, Phi-1.5, Phi-2",
        Places("self_attn", "", _QKV, "dense"), Places("mlp", "", {"fc1": (("neuron",),)}, "fc2"), norm="input_layernorm",
        notes="both blocks side by side behind one norm; MLP without a gate, biases, also of the head",
    ),
    Family("seed_oss", "Seed-OSS", _ATTENTION, _MLP, notes="biases of query, key and value"),
    Family(
        "smollm3", "SmolLM3", _ATTENTION, _MLP, per_layer=("no_rope_layers",),
        notes="no positions in every fourth layer, tied embeddings",
    ),
    Family(
        "stablelm", "StableLM 2 (1.6B), StableLM Zephyr",
        Places(
            "self_attn", "input_layernorm", _QKV, "o_proj",
            counts={"num_heads": "query_heads", "num_key_value_heads": "kv_heads"},
        ),
        _MLP, required={"use_parallel_residual": False, "qk_layernorm": False},
        notes="norms with biases; biases of query, key and value where the config asks for them",
    ),
    Family(
        "starcoder2", "StarCoder2", _ATTENTION, Places("mlp", "post_attention_layernorm", {"c_fc": (("neuron",),)}, "c_proj"),
        notes="MLP without a gate, biases, sliding windows",
    ),
    Family(
        "vaultgemma", "VaultGemma", _ATTENTION, Places("mlp", "pre_feedforward_layernorm", _GATED, "down_proj"),
        notes="alternating attention, soft-capped logits, tied embeddings",
    ),
    Family(
        "xglm", "XGLM",
        Places(
            "self_attn", "self_attn_layer_norm", _QKV, "out_proj", counts={"num_heads": "query_heads", "embed_dim": "query"}
        ),
        Places("", "final_layer_norm", {"fc1": (("neuron",),)}, "fc2"),
        intermediate_size="ffn_dim",
        notes="sinusoidal positions, biases; the MLP's projections are the layer's own",
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
