"""Decoders whose layers differ in width, on top of transformers' own classes.

This file travels with every checkpoint of unequal layers, so it imports nothing but torch and transformers. The config is
the stock one plus transformers' `per_layer_config`: heads, KV heads and neurons of each layer, and `skip`, which names the
blocks that are gone. Needs transformers >= 5.15.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer


class AbsentAttention(nn.Module):
    """Attention that was pruned away: adds nothing to the residual stream and has no KV cache."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """An MLP that was pruned away: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class PerLayerWidths:
    """Mixin before a stock `...ForCausalLM`: builds every layer from its own entry of `config.per_layer_config`."""

    layer_class: Any  # the stock decoder layer

    def __init__(self: Any, config: PreTrainedConfig) -> None:
        depth, widths = config.num_hidden_layers, config.to_dict().get("per_layer_config")
        if not getattr(config, "is_heterogeneous", False):
            raise ValueError("This checkpoint needs transformers >= 5.15 and a config with `per_layer_config`.")
        config.num_hidden_layers, config.per_layer_config = 0, None
        try:
            super().__init__(config)  # type: ignore[call-arg]  # everything but the layers
        finally:
            config.num_hidden_layers, config.per_layer_config = depth, widths
        self.model.layers.extend(self._build_layer(config, index) for index in range(depth))
        self._number_caches()
        self.post_init()

    def _build_layer(self: Any, config: PreTrainedConfig, index: int) -> nn.Module:
        widths: Any = config.per_layer_config[index]
        layer = self.layer_class(widths, index)
        for module in layer.modules():
            if hasattr(module, "config"):
                module.config = config  # one config for all, or `set_attn_implementation` would miss the layers
        if "attention" in widths.skip:
            layer.self_attn, layer.input_layernorm = AbsentAttention(), nn.Identity()
        if "mlp" in widths.skip:
            layer.mlp, layer.post_attention_layernorm = AbsentMLP(), nn.Identity()
        return layer

    def _number_caches(self: Any) -> None:
        """The first cache layer tells how long the text is: it belongs to the first layer that attends."""
        for layer in self.model.layers:
            if not isinstance(layer.self_attn, AbsentAttention):
                layer.self_attn.layer_idx = 0
                return


@strict
class PrunedLlamaConfig(LlamaConfig):
    model_type = "pruned_llama"

    def validate_architecture(self) -> None:
        """`head_dim` is given, so the heads of a layer need not divide the hidden size."""


class PrunedLlamaForCausalLM(PerLayerWidths, LlamaForCausalLM):
    config_class, layer_class = PrunedLlamaConfig, LlamaDecoderLayer


class PrunedMistralConfig(MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralForCausalLM(PerLayerWidths, MistralForCausalLM):
    config_class, layer_class = PrunedMistralConfig, MistralDecoderLayer


class PrunedQwen2Config(Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2ForCausalLM(PerLayerWidths, Qwen2ForCausalLM):
    config_class, layer_class = PrunedQwen2Config, Qwen2DecoderLayer


class PrunedQwen3Config(Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3ForCausalLM(PerLayerWidths, Qwen3ForCausalLM):
    config_class, layer_class = PrunedQwen3Config, Qwen3DecoderLayer
