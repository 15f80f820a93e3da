"""One file for llama.cpp: which of its architectures holds a model, and what the file says about it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFWriter
from torch import Tensor
from transformers import PreTrainedConfig

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.energies import column_energies
from pruning.export.gguf_tensors import Array, stored_widths, tensors
from pruning.export.gguf_tokenizer import add_tokenizer
from pruning.export.hf import Pruned
from pruning.export.quantise import FALLBACKS, Mixture, Stored, check_library, quantised, storage
from pruning.export.rebuild import UNSCALED, context_length, is_uniform
from pruning.widths import units_of

# Family -> architecture for (equal, unequal) layers.
ARCHITECTURES: dict[str, tuple[str, str | None]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("llama", "deci"),  # a Llama with biases; llama.cpp's own qwen2 wants all heads
    "phi3": ("llama", "deci"),  # a Llama with fused projections, which are cut apart; its own phi3 wants all heads
    "internlm3": ("llama", "deci"),
    "iquestcoder": ("llama", "deci"),
    "seed_oss": ("llama", "deci"),
    "cwm": ("llama", "deci"),  # up to its sliding window, as Mistral
    "ministral": ("llama", "deci"),
    "ernie4_5": ("llama", "deci"),
    "helium": ("llama", "deci"),
    "qwen3": ("qwen3", "openelm"),  # the one architecture with both norms of q and k and layers of unequal size
    "gemma2": ("gemma2", None),
    "gemma3_text": ("gemma3", None),
    "gpt_neox": ("gptneox", None),
    "gpt2": ("gpt2", None),
}
LLAMAS = ("llama", "deci", "qwen3", "openelm")
GEMMAS = ("gemma2", "gemma3")
ALL_HEADS = ("gptneox", "gpt2")  # whose heads together are as wide as the residual stream
ACTIVATIONS = {
    **dict.fromkeys(LLAMAS, ("silu", "swish")),
    **dict.fromkeys(GEMMAS, ("gelu_pytorch_tanh",)),
    **dict.fromkeys(
        ALL_HEADS, ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    ),  # llama.cpp takes the tanh for all
}
ROTARY = (*UNSCALED, "linear", "llama3")  # frequencies alone tell these apart, which only `llama` and `deci` read


def gguf_architecture(model_type: str, architecture: Architecture) -> str:
    """llama.cpp's name for what can hold this.

    Raises:
        UnsupportedExport: Nothing can.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedExport(
            f"llama.cpp has no architecture for '{model_type}' models (GGUF export knows {known}): export --format hf."
        )
    equal, unequal = ARCHITECTURES[model_type]
    name = equal if is_uniform(architecture) else unequal
    if name is None:
        raise UnsupportedExport(
            f"llama.cpp has no architecture for a '{model_type}' model with layers of unequal size: export --format hf, "
            "or search with --uniform."
        )
    return name


def check_gguf(config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture) -> str:
    """What `gguf_architecture` says, after all that the dense model's config tells is checked too.

    Raises:
        UnsupportedExport: The architecture computes something else than the model.
    """
    name = gguf_architecture(anatomy.family.model_type, architecture)
    for what, fits in _needs(config, anatomy, architecture, name):
        if not fits:
            raise UnsupportedExport(
                f"llama.cpp's '{name}', which '{anatomy.family.model_type}' would be, {what}: export --format hf."
            )
    return name


def _needs(config: Any, anatomy: Anatomy, architecture: Architecture, name: str) -> Iterator[tuple[str, bool]]:
    """What llama.cpp's architecture cannot do, and whether this model can do without."""
    activation = next(
        found
        for key in ("hidden_act", "hidden_activation", "activation_function")
        if (found := getattr(config, key, None))
    )
    yield f"has no activation '{activation}'", activation in ACTIVATIONS[name]
    for rope in _ropes(config).values():
        kind = rope["rope_type"]
        yield f"has no rotary scaling '{kind}'", kind in (ROTARY if name in ("llama", "deci") else UNSCALED)
        yield "rotates whole heads", name == "gptneox" or rope.get("partial_rotary_factor", 1.0) == 1.0
    yield "has no attention biases", name in ("llama", "deci", *ALL_HEADS) or not config.attention_bias
    yield "needs the embeddings as head", name not in ("openelm", "gemma2") or config.tie_word_embeddings
    yield "needs a head of its own", name != "gptneox" or not config.tie_word_embeddings
    yield "needs biases", name != "gptneox" or config.attention_bias
    heads = {width for width in architecture.units("attention") if width}
    yield "keeps all attention heads", name not in ALL_HEADS or heads == {anatomy.num_key_value_heads}
    yield "caps all logits", name != "gemma2" or bool(config.attn_logit_softcapping and config.final_logit_softcapping)
    yield "attends backwards only", not getattr(config, "use_bidirectional_attention", False)
    yield "scales attention by the size of a head", getattr(config, "scale_attn_weights", True)


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary parameters by layer type; of the only kind where there is one, of none where positions are learned."""
    rope = getattr(config, "rope_parameters", None) or {}
    return {"full_attention": rope} if "rope_type" in rope else rope


def write_gguf(
    pruned: Pruned, path: Path, mixture: Mixture, name: str, windows: Tensor | None = None
) -> dict[str, Stored]:
    """Write the file; `write_gguf` alone neither checks it nor protects what is there.

    Args:
        name: The model's name in the file.
        windows: `num_windows x length` token ids of text; K-quants go by how much of it passes through each column.

    Returns:
        What each tensor is stored as.

    Raises:
        UnsupportedExport: The architecture, rotary scaling, activation, tokenizer or mixture has no place in GGUF.
    """
    config, anatomy = pruned.model.config, pruned.anatomy
    architecture = check_gguf(config, anatomy, pruned.architecture)
    weights = dict(tensors(pruned, architecture))
    plan = storage({tensor: values.shape for tensor, values in weights.items()}, mixture)
    kinds = {stored.kind for stored in plan.values()}
    check_library(kinds)
    weighed = windows is not None and not kinds.isdisjoint(FALLBACKS)
    energies = column_energies(pruned, windows) if windows is not None and weighed else {}
    writer = GGUFWriter(path, architecture)
    try:
        add_metadata(writer, pruned, mixture, name)
        for tensor, stored in plan.items():
            data = quantised(weights.pop(tensor), stored.kind, energies.get(tensor))
            writer.add_tensor(tensor, data, raw_dtype=stored.kind)
        _write(writer)
    finally:
        writer.close()
    return plan


def add_metadata(writer: GGUFWriter, pruned: Pruned, mixture: Mixture, name: str) -> None:
    """All that the file says beside its tensors.

    Args:
        pruned: Of whose model only the config is looked at.
    """
    anatomy, architecture = pruned.anatomy, pruned.architecture
    writer.add_type("model")
    writer.add_name(name)
    if mixture.file_type is not None:
        writer.add_file_type(mixture.file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, pruned.model.config, anatomy, architecture, writer.arch)
    if pruned.tokenizer is None:
        writer.add_tokenizer_model("no_vocab")  # llama.cpp then takes and gives token ids only
    else:
        add_tokenizer(writer, pruned.tokenizer, anatomy.vocab_size)


def _write(writer: GGUFWriter) -> None:
    """NumPy tells of a full disk without its number, and not at all where the last bytes are missing."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    try:
        writer.write_tensors_to_file()
        assert writer.fout is not None  # one file, open until `close`
        file = writer.fout[0]
        file.flush()
        complete = os.fstat(file.fileno()).st_size == file.tell()
    except OSError as error:
        if error.errno is not None:
            raise
        complete = False
    if not complete:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _add_sizes(writer: GGUFWriter, config: Any, anatomy: Anatomy, architecture: Architecture, name: str) -> None:
    widths = stored_widths(anatomy, architecture, name)
    attention, neurons = ([width[index] for width in widths] for index in (0, 1))
    groups = [units_of(width) for width in attention]
    heads = [anatomy.attention.columns_at(width) // anatomy.head_dim for width in attention]
    per_layer = not is_uniform(architecture)
    writer.add_vocab_size(anatomy.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(anatomy.hidden_size)
    writer.add_block_count(len(widths))
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(groups if per_layer else groups[0])
    writer.add_feed_forward_length(neurons if per_layer else neurons[0])
    writer.add_key_length(anatomy.head_dim)
    writer.add_value_length(anatomy.head_dim)
    if name in ALL_HEADS:
        writer.add_layer_norm_eps(config.layer_norm_eps if name == "gptneox" else config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    ropes = _ropes(config)
    if ropes:
        rope = ropes["full_attention"]
        turning = rope.get("partial_rotary_factor", 1.0)
        writer.add_rope_dimension_count(int(anatomy.head_dim * turning))
        writer.add_rope_freq_base(rope["rope_theta"])
    if name == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if name in GEMMAS:
        _add_sliding(writer, config, ropes.get("sliding_attention", ropes["full_attention"]))


def _add_sliding(writer: GGUFWriter, config: Any, rope: dict[str, Any]) -> None:
    """Gemma's windows and caps."""
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    writer.add_rope_freq_base_swa(rope["rope_theta"])
    if config.attn_logit_softcapping:
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if config.final_logit_softcapping:
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def gguf_tensors(pruned: Pruned) -> Iterator[tuple[str, Array]]:
    """GGUF names and values in float32, every one once."""
    return tensors(pruned, gguf_architecture(pruned.anatomy.family.model_type, pruned.architecture))
