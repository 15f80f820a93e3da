"""A shrunk model -> the same weights under a config that tells its shapes, which is what can be saved and loaded again."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import pruning.export.modeling_pruned as pruned
from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport

MODELS: dict[str, type[Any]] = {
    "llama": pruned.PrunedLlamaForCausalLM,
    "mistral": pruned.PrunedMistralForCausalLM,
    "qwen2": pruned.PrunedQwen2ForCausalLM,
    "qwen3": pruned.PrunedQwen3ForCausalLM,
}
for _model in MODELS.values():  # the modelling file goes along wherever such a model is saved
    _model.register_for_auto_class("AutoModelForCausalLM")
    _model.config_class.register_for_auto_class()

_DERIVED = ("model_type", "architectures", "auto_map", "transformers_version")
_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "head_dim", "per_layer_config")


def layer_widths(anatomy: Anatomy, architecture: Architecture) -> list[dict[str, Any]]:
    """Every kept layer in transformers' terms, as an entry of `per_layer_config`.

    A layer without attention carries the head counts of the first one that attends: it shares its slot in a static KV cache.
    """
    kept = [index for index in range(len(architecture.neurons)) if architecture.keeps_layer(index)]
    slot = next(architecture.kv_groups[index] for index in kept if architecture.kv_groups[index])
    widths = []
    for index in kept:
        groups, neurons = architecture.kv_groups[index], architecture.neurons[index]
        absent = [name for name, units in (("attention", groups), ("mlp", neurons)) if units == 0]
        widths.append(
            {
                "num_attention_heads": (groups or slot) * anatomy.queries_per_group,
                "num_key_value_heads": groups or slot,
                "intermediate_size": neurons or anatomy.intermediate_size,
                **({"skip": absent} if absent else {}),
            }
        )
    return widths


def is_uniform(architecture: Architecture) -> bool:
    """Whether all kept layers are equal and whole, so that a stock config can tell their sizes."""
    pairs = zip(architecture.kv_groups, architecture.neurons, strict=True)
    kept = {(groups, neurons) for groups, neurons in pairs if groups or neurons}
    return len(kept) == 1 and all(kept.pop())


def config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What a config says, but for the widths and what transformers writes by itself."""
    return {key: value for key, value in config.to_dict().items() if key not in (*_DERIVED, *_WIDTHS)}


def local_class(folder: Path) -> type[Any] | None:
    """The class of `MODELS` that a saved folder needs; None if a stock one will do."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    return MODELS.get(kind.removeprefix("pruned_")) if kind.startswith("pruned_") else None


def unequal_class(model_type: str) -> type[Any]:
    """The model class for layers of unequal size.

    Raises:
        UnsupportedExport: This family has none.
    """
    if model_type not in MODELS:
        raise UnsupportedExport(
            f"Layers of unequal size cannot be saved for models of type '{model_type}': only for {', '.join(sorted(MODELS))}. "
            "Search with --uniform, or export --format padded."
        )
    return MODELS[model_type]


def described(config: PreTrainedConfig, anatomy: Anatomy, architecture: Architecture) -> PreTrainedConfig:
    """A copy of a shrunk model's `config` that tells the widths: of the stock class if it can hold them.

    Raises:
        UnsupportedExport: A family without a model class for unequal layers.
    """
    fields = {**config_fields(config), "head_dim": anatomy.head_dim}
    widths = layer_widths(anatomy, architecture)
    if is_uniform(architecture):
        try:
            return type(config)(**{**fields, **widths[0]})
        except StrictDataclassClassValidationError:  # Llama wants heads that divide the hidden size
            pass
    model_class = unequal_class(anatomy.family.model_type)
    dense = {
        "num_attention_heads": anatomy.num_attention_heads,
        "num_key_value_heads": anatomy.num_key_value_heads,
        "intermediate_size": anatomy.intermediate_size,
    }
    return model_class.config_class(**fields, **dense, per_layer_config=dict(enumerate(widths)))


def rebuilt(small: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of `small`, shared and not copied, in a model made by `config`.

    Raises:
        UnsupportedExport: The config cannot describe the shapes that the weights have.
    """
    is_stock = type(config) is type(small.config)
    model_class: Any = type(small) if is_stock else MODELS[small.config.model_type]
    with torch.device("meta"):
        model = model_class(config)
    try:
        model.load_state_dict(small.state_dict(), assign=True)
    except RuntimeError as error:  # the family ties its head size to the number of heads, or fuses projections
        raise UnsupportedExport(
            f"A stock '{config.model_type}' config cannot hold this architecture, and llmbo has no model class of its own for that "
            f"family (it has for {', '.join(sorted(MODELS))})."
        ) from error
    _share(model, small.named_buffers())
    model.tie_weights()
    model.generation_config = small.generation_config
    return model.eval()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Change the dtype of the weights in place. Not `model.to`: rotary frequencies are float32 whatever the weights are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _share(model: nn.Module, buffers: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Buffers that no state dict holds (rotary frequencies)."""
    for name, value in buffers:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
