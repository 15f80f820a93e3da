"""Weights as llama.cpp's architectures hold them: their names, the order of their rows, and zeros where a block is missing.

Hugging Face rotates the halves of a head's rows against each other in all families but two, llama.cpp's `llama` and `deci` rotate
adjacent pairs, so there the rows of q and k are permuted. Two architectures hold layers of unequal size: `deci`, where a layer with
attention but no MLP would silently lose its attention and gets a thin MLP of zeros, and where the head size is read only if the first
layer has heads, so that a first layer without attention gets one head of zeros; and `openelm`, where every layer needs both blocks.
"""

import copy
from collections.abc import Callable, Iterator, Mapping

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.hf import Pruned
from pruning.export.rebuild import UNSCALED, cast
from pruning.projection import matrix_of
from pruning.widths import units_of

PAIRWISE = ("ernie4_5", "helium")  # which rotate adjacent pairs in Hugging Face too
THIN = 32  # neurons of the MLP that stands in for none: the block size of q8_0
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def stored_widths(anatomy: Anatomy, architecture: Architecture, name: str) -> list[tuple[int, int]]:
    """Widths of every kept layer as llama.cpp's architecture `name` holds them, stand-ins of zeros included."""
    pairs = zip(architecture.units("attention"), architecture.neurons, strict=True)
    kept = [pair for pair in pairs if any(pair)]
    return [
        (groups or int(position == 0 or name == "openelm"), neurons or THIN)
        for position, (groups, neurons) in enumerate(kept)
    ]


def tensors(pruned: Pruned, architecture: str) -> Iterator[tuple[str, Array]]:
    """GGUF names and values in float32, every one once."""
    state = {name: tensor.detach().float().cpu() for name, tensor in _matrices(pruned.model).items()}
    for name, source, values in _named(state, pruned, architecture):
        shift, factor = _scaling(pruned, source)
        yield name, ((values + shift) * factor).contiguous().numpy()
    yield from zeros(pruned, architecture)
    if _turns_otherwise(pruned, architecture):
        yield "rope_freqs.weight", _rotary_factors(pruned)


def shapes(pruned: Pruned, architecture: str) -> dict[str, tuple[int, ...]]:
    """Of all tensors without stand-ins, by GGUF's names; weights are not looked at."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in _matrices(pruned.model).items()}
    found = {name: tuple(values.shape) for name, _, values in _named(state, pruned, architecture)}
    return found | (
        {"rope_freqs.weight": (pruned.anatomy.head_dim // 2,)} if _turns_otherwise(pruned, architecture) else {}
    )


def with_matrices(pruned: Pruned, architecture: str, stored: Callable[[str], Array]) -> PreTrainedModel:
    """A copy of the model, in float32, that computes with the matrices of a GGUF file.

    Args:
        stored: A tensor of the file in float32, by its name there.
    """
    model = copy.deepcopy(pruned.model)
    cast(model, torch.float32)
    matrices = {name: tensor for name, tensor in _matrices(model).items() if tensor.ndim == 2}
    places = {name: (index << 32) + torch.arange(len(matrix)) for index, (name, matrix) in enumerate(matrices.items())}
    targets = list(matrices.values())
    with torch.no_grad():
        for name, source, rows in _named(places, pruned, architecture):
            values = torch.from_numpy(stored(name)) / _scaling(pruned, source)[1]
            for index in (rows >> 32).unique().tolist():  # some are made of several
                own = rows >> 32 == index
                targets[index][rows[own] & 0xFFFFFFFF] = values[own]
    return model


def _matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights by Hugging Face's names, matrices as `outputs x inputs`; writing to them writes to the model."""
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, Conv1D):
            state[f"{name}.weight"] = matrix_of(module).detach()
    return state


def _named(state: Mapping[str, Tensor], pruned: Pruned, architecture: str) -> Iterator[tuple[str, str, Tensor]]:
    """GGUF's names, Hugging Face's, and rows in llama.cpp's order.

    Args:
        state: Weights or their rows' numbers, by Hugging Face's names.
    """
    config, layers = pruned.model.config, pruned.anatomy.layers_of(pruned.model)
    names = gguf.get_tensor_name_map(
        next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture), len(layers)
    )
    for name, values in _arranged(state, pruned, architecture):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise UnsupportedExport(f"llama.cpp's '{architecture}' has no tensor for '{name}'.")
        yield found, name, values


def _scaling(pruned: Pruned, name: str) -> tuple[float, float]:
    """What llama.cpp wants added to a weight and then multiplied by."""
    family, module = pruned.anatomy.family.model_type, name.split(".")[-2]
    if not family.startswith("gemma") or not module.endswith(("norm", "q_proj")):
        return 0.0, 1.0
    scaled = module == ("q_proj" if family == "gemma2" else "q_norm")
    return float(module.endswith("norm")), attention_scale(pruned) if scaled else 1.0


def attention_scale(pruned: Pruned) -> float:
    """What Gemma multiplies its queries by, as a share of what llama.cpp does, which tells the largest models by their depth."""
    layers, sizes = len(pruned.anatomy.layers_of(pruned.model)), pruned.anatomy
    heads = sizes.attention.columns_at(max(pruned.architecture.units("attention"))) // sizes.head_dim
    largest = {"gemma2": 46, "gemma3_text": 62}[sizes.family.model_type]
    divisor = sizes.hidden_size // heads if layers == largest else sizes.head_dim
    return float((divisor / pruned.model.config.query_pre_attn_scalar) ** 0.5)


def _arranged(state: Mapping[str, Tensor], pruned: Pruned, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's names and rows, with projections fused or split, and rows ordered, as in llama.cpp."""
    anatomy, head_dim = pruned.anatomy, pruned.anatomy.head_dim
    layers = [index for index in range(anatomy.num_hidden_layers) if pruned.architecture.keeps_layer(index)]
    for name, values in state.items():
        parent, _, kind = name.rpartition(".")
        owner, _, module = parent.rpartition(".")
        if module == "qkv_proj":  # Phi-3
            width = pruned.architecture.units("attention")[layers[int(owner.split(".")[-2])]]
            keys = units_of(width) * head_dim
            q, k, v = values.split([anatomy.attention.columns_at(width), keys, keys])
            yield from zip(
                (f"{owner}.{part}_proj.{kind}" for part in "qkv"),
                (_interleaved(q, head_dim), _interleaved(k, head_dim), v),
                strict=True,
            )
        elif module == "gate_up_proj":
            gate, up = values.chunk(2)
            yield from ((f"{owner}.gate_proj.{kind}", gate), (f"{owner}.up_proj.{kind}", up))
        elif module == "query_key_value":  # GPT-NeoX keeps query, key and value of a head together
            yield name, values.unflatten(0, (-1, 3, head_dim)).transpose(0, 1).flatten(0, 2)
        elif architecture == "openelm" and module in ("q_proj", "k_proj", "v_proj"):
            if module == "q_proj":
                yield f"{owner}.qkv_proj.{kind}", torch.cat([state[f"{owner}.{part}_proj.{kind}"] for part in "qkv"])
        elif architecture in ("llama", "deci") and module in ("q_proj", "k_proj"):
            yield name, values if anatomy.family.model_type in PAIRWISE else _interleaved(values, head_dim)
        else:
            yield name, values


def _interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Rows i and i + head_dim/2 of every head, which rotate together, next to each other."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def stand_ins(anatomy: Anatomy, architecture: str, attention: bool, mlp: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of blocks of zeros, by their names in a layer."""
    hidden, head = anatomy.hidden_size, anatomy.head_dim
    queries, found = head * anatomy.queries_per_group, dict[str, tuple[int, ...]]()
    if attention:
        found |= {"attn_norm": (hidden,), "attn_output": (hidden, queries)}
        if architecture == "openelm":
            found |= {"attn_qkv": (queries + 2 * head, hidden), "attn_q_norm": (head,), "attn_k_norm": (head,)}
        else:
            found |= {"attn_q": (queries, hidden), "attn_k": (head, hidden), "attn_v": (head, hidden)}
    if mlp:
        found |= {
            "ffn_norm": (hidden,),
            "ffn_gate": (THIN, hidden),
            "ffn_up": (THIN, hidden),
            "ffn_down": (hidden, THIN),
        }
    return {f"{name}.weight": shape for name, shape in found.items()}


def zeros(pruned: Pruned, architecture: str) -> Iterator[tuple[str, Array]]:
    """Blocks of zeros where llama.cpp cannot do without one; they add nothing to the residual stream."""
    pairs = zip(pruned.architecture.kv_groups, pruned.architecture.neurons, strict=True)
    stored = stored_widths(pruned.anatomy, pruned.architecture, architecture)
    for position, (real, (groups, _)) in enumerate(zip([pair for pair in pairs if any(pair)], stored, strict=True)):
        found = stand_ins(pruned.anatomy, architecture, bool(groups and not real[0]), not real[1])
        for name, shape in found.items():
            yield f"blk.{position}.{name}", (np.ones if len(shape) == 1 else np.zeros)(shape, dtype=np.float32)


def _turns_otherwise(pruned: Pruned, architecture: str) -> bool:
    """Whether the file tells rotary frequencies that are not the plain ones."""
    rope = getattr(pruned.model.config, "rope_parameters", None) or {}
    return architecture in ("llama", "deci") and rope.get("rope_type", "default") not in UNSCALED


def _rotary_factors(pruned: Pruned) -> Array:
    """What llama.cpp divides the plain rotary frequencies by, `head_dim / 2`."""
    rope, dim = pruned.model.config.rope_parameters, pruned.anatomy.head_dim
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    actual = pruned.model.get_decoder().rotary_emb.inv_freq.cpu().double()
    factors: Array = (plain / actual).float().numpy()
    return factors
