"""A Llama whose layers differ in the width of their MLP, or lack a block: what vLLM serves as `DeciLMForCausalLM`.

This file travels with every checkpoint for vLLM, which takes the config class from it and has the model built in; transformers takes
both. It imports nothing but torch and transformers. `config.block_configs` has an entry for every layer:

    {"attention": {"no_op", "n_heads_in_group"}, "ffn": {"no_op", "intermediate_size"}}
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class AbsentBlock(nn.Module):
    """Stands where a block is gone: adds nothing to the residual stream."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self.attention else nothing


class Entry(dict[str, Any]):
    """A dict whose values are attributes too, as vLLM reads them."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    """A Llama's config, with an entry for every layer. `qkv_bias`: query, key and value alone have biases."""

    model_type = "nemotron-nas"
    _auto_class = "AutoConfig"

    def __init__(self, block_configs: Sequence[Any] = (), qkv_bias: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [Entry({kind: Entry(own) for kind, own in block.items()}) for block in block_configs]
        if qkv_bias is not None:
            self.qkv_bias = qkv_bias


class DeciLMForCausalLM(LlamaForCausalLM):
    """A Llama cut to its `block_configs`."""

    config_class = DeciLMConfig
    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        attends = False
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            own: Any = layer
            if block.attention.no_op:
                own.self_attn, own.input_layernorm = AbsentBlock(attention=True), nn.Identity()
            elif not attends:  # the first slot of a cache tells how long the text is
                own.self_attn.layer_idx, attends = 0, True
            if block.ffn.no_op:
                own.mlp, own.post_attention_layernorm = AbsentBlock(attention=False), nn.Identity()
                continue
            hidden, neurons, bias = config.hidden_size, block.ffn.intermediate_size, config.mlp_bias
            own.mlp.gate_proj = nn.Linear(hidden, neurons, bias)
            own.mlp.up_proj = nn.Linear(hidden, neurons, bias)
            own.mlp.down_proj = nn.Linear(neurons, hidden, bias)
        if getattr(config, "qkv_bias", False):
            for name, old in list(self.named_modules()):
                if name.endswith(("q_proj", "k_proj", "v_proj")):
                    self.set_submodule(name, nn.Linear(old.in_features, old.out_features))
