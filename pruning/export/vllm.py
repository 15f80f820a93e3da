"""Folders for vLLM, which serves Llamas with layers of unequal size as `DeciLMForCausalLM`: MLPs of any width, attention whole or absent.

There the first layer's attention begins the residual stream, so that a first layer without attention gets one of zeros. Its Transformers
backend serves the folders of `pruning.export.hf` as they are, with any number of heads in each layer and of more families: `check_backend`.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.hf import MAX_SHARD_SIZE, Pruned, check_hf, save_model
from pruning.export.reader import Read
from pruning.export.rebuild import context_length
from pruning.export.verify import Check
from pruning.modeling_decilm import DeciLMConfig, DeciLMForCausalLM

FAMILIES = ("llama", "mistral", "phi3", "qwen2")  # whose layers compute what a Llama's do
ROTARY = ("default", "linear", "llama3")  # vLLM computes these as transformers does
# Families that vLLM's Transformers backend computes as transformers does (`experiments.vllm_check` asks it), and what it does to others.
BACKEND = (
    "apertus", "arcee", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_bigcode",
    "gpt_neox", "helium", "hunyuan_v1_dense", "internlm3", "iquestcoder", "jais2", "llama", "ministral", "ministral3", "mistral",
    "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
    "vaultgemma",
)  # fmt: skip
NOT_BACKEND = {
    **dict.fromkeys(("biogpt", "gptj", "stablelm", "xglm"), "cannot replace the attention of"),
    "gpt2": "does not load the biases of",
    "granite": "does not scale the logits of",
    "hyperclovax": "has a config without layers of their own for",
}
SHARED = (  # what a Llama's config has from the dense model's, whatever its family
    "vocab_size", "hidden_size", "hidden_act", "initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout", "dtype",
)  # fmt: skip
SHOWN = 4  # layers in a message


def check_vllm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, architecture: Architecture) -> None:
    """Refuse early what `save_vllm` would refuse of the dense `model` cut to `architecture`.

    Raises:
        UnsupportedExport: vLLM would compute something else, or has no way to tell the sizes.
    """
    _check(model.config, anatomy_of(model), architecture)


def check_type(model_type: str, architecture: Architecture) -> None:
    """The same as far as a family alone tells.

    Raises:
        UnsupportedExport: It is no Llama.
    """
    if model_type not in FAMILIES:
        raise UnsupportedExport(
            f"vLLM serves layers of unequal size of Llama-like models only ({', '.join(FAMILIES)}; RoPE, RMSNorm, SwiGLU), not of "
            f"'{model_type}': export --format hf or gguf."
        )


def check_backend(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, architecture: Architecture
) -> None:
    """Refuse early what vLLM's Transformers backend cannot serve of what `save_hf` writes of the dense `model` cut to `architecture`.

    Raises:
        UnsupportedExport: Nothing can hold it, or vLLM would compute something else.
    """
    check_hf(model, tokenizer, architecture)
    model_type = model.config.model_type
    if model_type not in BACKEND:
        reason = NOT_BACKEND.get(model_type, "has not been compared with transformers on")
        raise UnsupportedExport(f"vLLM's Transformers backend {reason} '{model_type}' models: search with --deploy hf.")


def _check(config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture) -> None:
    check_type(anatomy.family.model_type, architecture)
    for what, fits in _needs(config):
        if not fits:
            raise UnsupportedExport(
                f"vLLM's DeciLMForCausalLM, which '{anatomy.family.model_type}' would be, {what}: export --format hf or gguf."
            )
    check_attention(anatomy.num_key_value_heads, architecture)


def _needs(config: Any) -> Iterator[tuple[str, bool]]:
    """What vLLM's class cannot do, and whether this model can do without."""
    rope = config.rope_parameters
    yield f"has no activation '{config.hidden_act}'", config.hidden_act == "silu"
    yield f"has no rotary scaling '{rope['rope_type']}'", rope["rope_type"] in ROTARY
    yield "rotates whole heads", rope.get("partial_rotary_factor", 1.0) == 1.0


def check_attention(num_key_value_heads: int, architecture: Architecture) -> None:
    """The same as far as the widths of attention tell.

    Raises:
        UnsupportedExport: A layer keeps some of the dense layer's KV groups, or of their query heads.
    """
    whole = (0, num_key_value_heads)
    parted = [str(layer) for layer, width in enumerate(architecture.units("attention")) if width not in whole]
    if parted:
        more = f" and {len(parted) - SHOWN} more" if len(parted) > SHOWN else ""
        raise UnsupportedExport(
            "vLLM's DeciLMForCausalLM keeps all heads of a layer or none, and some of them are gone in layers "
            f"{', '.join(parted[:SHOWN])}{more}: search with --deploy vllm, or export --format hf or gguf."
        )


def save_vllm(
    pruned: Pruned,
    out: Path,
    files: Mapping[str, str] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    read: Read | None = None,
) -> Check:
    """Write a folder that vLLM serves and transformers loads, both with `trust_remote_code=True`. Transformers reads it back.

    Args:
        out, files, max_shard_size, read: As for `pruning.export.save_hf`.

    Raises:
        UnsupportedExport: See `check_vllm`; or `out` is taken.
        ExportFailed: What was written does not load, or computes something else. Nothing is left.
    """
    return save_model(pruned, decilm(pruned), out, files or {}, max_shard_size, read)


def decilm(pruned: Pruned) -> PreTrainedModel:
    """The same weights in the class that vLLM knows.

    Raises:
        UnsupportedExport: See `check_vllm`.
    """
    _check(pruned.model.config, pruned.anatomy, pruned.architecture)
    with torch.device("meta"):
        model = DeciLMForCausalLM(_config(pruned.model.config, pruned.anatomy, pruned.architecture))
    model.load_state_dict(dict(_weights(pruned)), assign=True)
    model.tie_weights()
    model.generation_config = pruned.model.generation_config
    return model.eval()


def _config(config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture) -> DeciLMConfig:
    shared = {name: getattr(config, name) for name in SHARED}
    kept = [pair for pair in zip(architecture.kv_groups, architecture.neurons, strict=True) if any(pair)]
    blocks = [
        {
            "attention": {
                "no_op": position > 0 and not groups,
                "n_heads_in_group": anatomy.queries_per_group if groups or position == 0 else None,
            },
            "ffn": {"no_op": not neurons, "intermediate_size": neurons or None},
        }
        for position, (groups, neurons) in enumerate(kept)
    ]
    return DeciLMConfig(
        blocks,
        qkv_bias=True if anatomy.family.model_type == "qwen2" else None,
        **shared,
        num_hidden_layers=len(kept),
        num_attention_heads=anatomy.num_attention_heads,
        num_key_value_heads=anatomy.num_key_value_heads,
        head_dim=anatomy.head_dim,
        intermediate_size=max(architecture.neurons) or anatomy.intermediate_size,
        max_position_embeddings=context_length(config),
        attention_bias=getattr(config, "attention_bias", False),
        mlp_bias=getattr(config, "mlp_bias", False),
    )


def _weights(pruned: Pruned) -> Iterator[tuple[str, Tensor]]:
    """Under a Llama's names; Phi-3's fused projections are cut apart."""
    queries = pruned.anatomy.num_attention_heads * pruned.anatomy.head_dim
    keys = pruned.anatomy.num_key_value_heads * pruned.anatomy.head_dim
    state = pruned.model.state_dict()
    for name, values in state.items():
        owner, _, module = name.removesuffix(".weight").rpartition(".")
        fused = {"qkv_proj": ("qkv", [queries, keys, keys]), "gate_up_proj": (("gate", "up"), len(values) // 2)}
        if module not in fused:
            yield name, values
            continue
        parts, sizes = fused[module]
        for part, rows in zip(parts, values.split(sizes), strict=True):
            yield f"{owner}.{part}_proj.weight", rows.contiguous()
    if "model.layers.0.input_layernorm.weight" not in state:
        yield from _nothing(pruned, queries, keys)


def _nothing(pruned: Pruned, queries: int, keys: int) -> Iterator[tuple[str, Tensor]]:
    """An attention of zeros for the first layer, which adds nothing to the residual stream."""
    config: Any = pruned.model.config
    embedding: Any = pruned.model.get_input_embeddings()
    like, hidden = embedding.weight, pruned.anatomy.hidden_size
    inputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    biased = getattr(config, "attention_bias", False)
    yield "model.layers.0.input_layernorm.weight", like.new_ones(hidden)
    for name, rows in inputs.items():
        yield f"model.layers.0.self_attn.{name}.weight", like.new_zeros(rows, hidden)
    yield "model.layers.0.self_attn.o_proj.weight", like.new_zeros(hidden, queries)
    for name, rows in {**inputs, "o_proj": hidden}.items():
        if biased or (pruned.anatomy.family.model_type == "qwen2" and name != "o_proj"):
            yield f"model.layers.0.self_attn.{name}.bias", like.new_zeros(rows)
