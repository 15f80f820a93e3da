"""A shrunk model -> the same weights under a config that tells its shapes, which is what can be saved and loaded again."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pruning import modeling_decilm, modeling_pruned
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport, UnsupportedModel
from pruning.widths import lacking_of, units_of

# Rotary scalings that leave frequencies as they are up to `context_length`: "dynamic" starts beyond it.
UNSCALED = ("default", "dynamic")
_DERIVED = ("model_type", "architectures", "auto_map", "transformers_version", "per_layer_config")


def is_uniform(architecture: Architecture) -> bool:
    """Whether all kept layers are equal and whole, so that a stock config may be able to tell their sizes."""
    pairs = zip(architecture.units("attention"), architecture.neurons, strict=True)
    kept = {(groups, neurons) for groups, neurons in pairs if groups or neurons}
    return len(kept) == 1 and all(kept.pop())


def is_stock(model: PreTrainedModel) -> bool:
    """Whether `model` loads without the modelling file."""
    return not isinstance(model, modeling_pruned.PrunedModel)


def local_class(folder: Path) -> type[Any] | None:
    """The class that a saved folder with layers of unequal size needs; None if a stock one will do, or it is not one of ours."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "pruned_blocks" in config:
        found: type[Any] = getattr(modeling_pruned, config["architectures"][0])
        return found
    own = (
        modeling_decilm.DeciLMConfig
    )  # others' Nemotron-NAS models have a config class of that name, too, but in another file
    named = (config.get("auto_map") or {}).get("AutoConfig")
    return modeling_decilm.DeciLMForCausalLM if named == f"modeling_decilm.{own.__name__}" else None


def stock_config(small: PreTrainedModel, anatomy: Anatomy, attention: int, neurons: int) -> PreTrainedConfig | None:
    """A config of the family's own class for equal layers of these widths; None if it has no way to tell them.

    Some families tie the size of a head to the number of heads; Llama wants that number to divide the hidden size.
    """
    config_class: Any = type(small.config)
    try:
        config = config_class(**_fields(small.config) | _sizes(small.config, anatomy, attention, neurons))
        with torch.device("meta"):
            model = type(small)(config)
        anatomy_of(model)  # compares the modules with what the config says
    except (StrictDataclassClassValidationError, ValueError, UnsupportedModel):
        return None
    return config if _norms(small) <= _norms(model) else None


def _norms(model: PreTrainedModel) -> set[torch.Size]:
    """Shapes: a norm over a head goes by what the config says of heads, whatever `head_dim` says."""
    norms = (module for module in model.modules() if type(module).__name__.endswith("Norm"))
    return {parameter.shape for norm in norms for parameter in norm.parameters()}


def class_for(
    model: PreTrainedModel, anatomy: Anatomy, architecture: Architecture
) -> tuple[Any, PreTrainedConfig | None]:
    """The class whose config can tell these sizes: the stock one with its config, or the pruned one, for the sizes of each layer.

    Args:
        model: Dense or shrunk; of the latter the stock config counts the layers.

    Raises:
        UnsupportedExport: Its layers are unequal, and its class is not one of transformers' own.
    """
    config = None
    if is_uniform(architecture):
        config = stock_config(model, anatomy, max(architecture.units("attention")), max(architecture.neurons))
    if config is not None:
        return type(model), config
    name = type(model).__name__
    pruned_class = getattr(modeling_pruned, f"Pruned{name}", None)
    if pruned_class is None:
        raise UnsupportedExport(
            f"Layers of unequal size are saved for classes of transformers only, and it has no '{name}': keep the layers equal."
        )
    return pruned_class, None


def rebuilt(small: PreTrainedModel, anatomy: Anatomy, architecture: Architecture) -> PreTrainedModel:
    """The weights of `small`, shared and not copied, in a model whose config tells their sizes: of the stock class if it can.

    Args:
        small: The result of `shrink`.
        anatomy: Of the dense model.

    Raises:
        UnsupportedExport: See `class_for`.
    """
    model_class, config = class_for(small, anatomy, architecture)
    if config is None:
        config = _unequal_config(small.config, anatomy, architecture, model_class.config_class)
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(small.state_dict(), assign=True)
    _share(model, small.named_buffers())
    model.tie_weights()
    model.generation_config = small.generation_config
    return model.eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of the weights in place. Not `model.to`: rotary frequencies are float32 whatever the weights are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def context_length(config: Any) -> int:
    """Up to its sliding window a model attends to everything, which is all that other programs can do with a Llama that has one."""
    window = None if config.model_type.startswith("gemma") else getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window) if window else int(config.max_position_embeddings)


def _unequal_config(
    config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture, config_class: Any
) -> PreTrainedConfig:
    family = anatomy.family
    places: dict[str, Any] = {"layers": family.layers, "neurons": family.intermediate_size}
    places |= {block.kind: asdict(block.places) for block in anatomy.blocks}
    dense = _sizes(config, anatomy, anatomy.num_key_value_heads, anatomy.intermediate_size)
    widths = _layer_widths(config, anatomy, architecture)
    return config_class(**_fields(config) | dense, pruned_blocks=places, per_layer_config=dict(enumerate(widths)))


def _layer_widths(config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture) -> list[dict[str, Any]]:
    """Every kept layer in the family's own terms, as an entry of `per_layer_config`.

    A layer without attention carries the head counts of the first one that attends: it shares its slot in a static KV cache.
    """
    kept = [index for index in range(len(architecture.neurons)) if architecture.keeps_layer(index)]
    attention = architecture.units("attention")
    slot = next(attention[index] for index in kept if attention[index])
    widths = []
    for index in kept:
        width, neurons = attention[index], architecture.neurons[index]
        absent = [name for name, units in (("attention", width), ("mlp", neurons)) if units == 0]
        sizes = _sizes(config, anatomy, width or slot, neurons or anatomy.intermediate_size)
        widths.append(sizes | ({"skip": absent} if absent else {}))
    return widths


def _sizes(config: PreTrainedConfig, anatomy: Anatomy, attention: int, neurons: int) -> dict[str, Any]:
    """Config entries of a layer of these widths."""
    heads, head_dim = units_of(attention) * anatomy.heads_as_one, anatomy.head_dim // anatomy.heads_as_one
    queries = anatomy.queries_per_group - lacking_of(attention)
    sizes = {"num_attention_heads": heads * queries, anatomy.family.intermediate_size: neurons}
    if hasattr(config, "num_key_value_heads"):
        sizes["num_key_value_heads"] = heads
    return {config.attribute_map.get(name, name): size for name, size in sizes.items()} | {"head_dim": head_dim}


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says, but for what transformers writes by itself."""
    return {key: value for key, value in config.to_dict().items() if key not in _DERIVED}


def _share(model: nn.Module, buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Buffers that no state dict holds (rotary frequencies)."""
    for name, value in buffers:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
