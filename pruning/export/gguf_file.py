"""One file for llama.cpp: architecture `llama` (or `qwen3`) when layers are equal, `deci` when they are not.

`deci` holds head counts and MLP widths per layer. Three habits of llama.cpp matter here. A `deci` layer with attention but no
MLP would silently lose its attention, so it gets a thin MLP of zeros. The head size is read only if the first layer has
heads, so a first layer without attention gets one head of zeros. And both `llama` and `deci` rotate adjacent pairs of a
head's rows where Hugging Face rotates halves, so the rows of q and k are permuted.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from transformers import PreTrainedConfig

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.gguf_tokenizer import add_tokenizer
from pruning.export.hf import Pruned
from pruning.export.rebuild import is_uniform

FILE_TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ROTARY = ("default", "linear", "llama3")  # frequencies alone tell these apart
THIN = 32  # neurons of the MLP that stands in for none: the block size of q8_0
# Family -> architecture for (equal, unequal) layers.
ARCHITECTURES: dict[str, tuple[str, str | None]] = {
    "llama": ("llama", "deci"),
    "mistral": ("llama", "deci"),
    "qwen2": ("llama", "deci"),  # a Llama with biases; llama.cpp's own qwen2 wants all heads
    "qwen3": ("qwen3", None),  # no architecture has both norms of q and k and layers of unequal size
}
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def gguf_architecture(model_type: str, architecture: Architecture) -> str:
    """llama.cpp's name for what can hold this.

    Raises:
        UnsupportedExport: Nothing can.
    """
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedExport(f"GGUF export knows the families {known}, not '{model_type}': export --format hf.")
    equal, unequal = ARCHITECTURES[model_type]
    name = equal if is_uniform(architecture) else unequal
    if name is None:
        raise UnsupportedExport(
            f"llama.cpp has no architecture for a '{model_type}' model with layers of unequal size: export --format hf, "
            "or search with --uniform."
        )
    return name


def write_gguf(pruned: Pruned, path: Path, dtype: str, name: str) -> None:
    """Write the file; `write_gguf` alone neither checks it nor protects what is there.

    Args:
        dtype: A key of `FILE_TYPES`. Vectors stay float32, and a matrix whose rows q8_0 cannot cut into blocks is f16.
        name: The model's name in the file.

    Raises:
        UnsupportedExport: The architecture, rotary scaling, activation, tokenizer or dtype has no place in GGUF.
    """
    config, anatomy = pruned.model.config, pruned.anatomy
    architecture = gguf_architecture(anatomy.family.model_type, pruned.architecture)
    _check(config, architecture, dtype)
    quantization, file_type = FILE_TYPES[dtype]
    writer = GGUFWriter(path, architecture)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_sizes(writer, config, anatomy, pruned.architecture)
        if pruned.tokenizer is None:
            writer.add_tokenizer_model("no_vocab")  # llama.cpp then takes and gives token ids only
        else:
            add_tokenizer(writer, pruned.tokenizer, anatomy.vocab_size)
        for tensor, values in gguf_tensors(pruned):
            kind = _storage(values, quantization)
            writer.add_tensor(tensor, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _check(config: PreTrainedConfig, architecture: str, dtype: str) -> None:
    if dtype not in FILE_TYPES:
        raise UnsupportedExport(f"Unknown GGUF dtype '{dtype}': expected one of {', '.join(FILE_TYPES)}.")
    if config.hidden_act not in ("silu", "swish"):
        raise UnsupportedExport(f"llama.cpp's '{architecture}' has no activation '{config.hidden_act}'.")
    rotary = config.rope_parameters["rope_type"]
    if rotary not in (ROTARY if architecture != "qwen3" else ("default",)):
        raise UnsupportedExport(f"Rotary scaling '{rotary}' cannot be written for llama.cpp's '{architecture}'.")
    if architecture == "qwen3" and config.attention_bias:
        raise UnsupportedExport("llama.cpp's 'qwen3' has no attention biases.")


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture) -> None:
    kept = [index for index in range(anatomy.num_hidden_layers) if architecture.keeps_layer(index)]
    groups = [architecture.kv_groups[index] for index in kept]
    neurons = [architecture.neurons[index] or THIN for index in kept]
    heads = [count * anatomy.queries_per_group for count in groups]
    groups[0], heads[0] = groups[0] or 1, heads[0] or 1
    per_layer = not is_uniform(architecture)
    writer.add_vocab_size(anatomy.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(anatomy.hidden_size)
    writer.add_block_count(len(kept))
    writer.add_head_count(heads if per_layer else heads[0])
    writer.add_head_count_kv(groups if per_layer else groups[0])
    writer.add_feed_forward_length(neurons if per_layer else neurons[0])
    writer.add_key_length(anatomy.head_dim)
    writer.add_value_length(anatomy.head_dim)
    writer.add_rope_dimension_count(anatomy.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def context_length(config: PreTrainedConfig) -> int:
    """Up to its sliding window a model attends to everything, which is all that these architectures can do."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window) if window else int(config.max_position_embeddings)


def gguf_tensors(pruned: Pruned) -> Iterator[tuple[str, Array]]:
    """GGUF names and values in float32, every one once."""
    architecture = gguf_architecture(pruned.anatomy.family.model_type, pruned.architecture)
    anatomy, state = pruned.anatomy, pruned.model.state_dict()
    layers = anatomy.layers_of(pruned.model)
    names = gguf.get_tensor_name_map(
        next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture), len(layers)
    )
    if pruned.model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        values = tensor.detach().float().cpu()
        if architecture != "qwen3" and name.rsplit(".", 2)[-2] in ("q_proj", "k_proj"):
            values = _interleaved(values, anatomy.head_dim)
        translated = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if translated is None:
            raise UnsupportedExport(f"llama.cpp's '{architecture}' has no tensor for '{name}'.")
        yield translated, values.numpy()
    yield from _stand_ins(anatomy, pruned.architecture)
    factors = _rotary_factors(pruned)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows i and i + head_dim/2 of every head, which rotate together, next to each other."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _stand_ins(anatomy: Anatomy, architecture: Architecture) -> Iterator[tuple[str, Array]]:
    """Blocks of zeros where llama.cpp cannot do without one; they add nothing to the residual stream."""
    kept = [index for index in range(anatomy.num_hidden_layers) if architecture.keeps_layer(index)]
    hidden, head = anatomy.hidden_size, anatomy.head_dim
    if not architecture.kv_groups[kept[0]]:
        rows = dict.fromkeys(("attn_q", "attn_k", "attn_v"), (head, hidden))
        yield from _zeros("blk.0", "attn_norm", {**rows, "attn_output": (hidden, head)})
    for position, index in enumerate(kept):
        if not architecture.neurons[index]:
            rows = dict.fromkeys(("ffn_gate", "ffn_up"), (THIN, hidden))
            yield from _zeros(f"blk.{position}", "ffn_norm", {**rows, "ffn_down": (hidden, THIN)})


def _zeros(layer: str, norm: str, shapes: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Array]]:
    hidden_size = next(iter(shapes.values()))[1]
    yield f"{layer}.{norm}.weight", np.ones(hidden_size, dtype=np.float32)
    for name, shape in shapes.items():
        yield f"{layer}.{name}.weight", np.zeros(shape, dtype=np.float32)


def _rotary_factors(pruned: Pruned) -> Array | None:
    """What llama.cpp divides the plain rotary frequencies by, `head_dim / 2`; None if they are plain."""
    dim = pruned.anatomy.head_dim
    if pruned.model.config.rope_parameters["rope_type"] == "default":
        return None
    plain = pruned.model.config.rope_parameters["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    actual = pruned.model.get_decoder().rotary_emb.inv_freq.double().cpu()
    factors: Array = (plain / actual).float().numpy()
    return factors


def _storage(values: Array, quantization: GGMLQuantizationType) -> GGMLQuantizationType:
    if values.ndim == 1:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[quantization]
    return quantization if values.shape[-1] % block == 0 else GGMLQuantizationType.F16
