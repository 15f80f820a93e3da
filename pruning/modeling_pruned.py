"""Decoders of any family whose layers differ in width, on top of transformers' own classes.

This file travels with every checkpoint of unequal layers, so it imports nothing but torch and transformers (>= 5.15). `PrunedX` is
transformers' `X` with each layer narrowed to its entry of `config.per_layer_config`: heads, KV heads and neurons, and `skip`, which
names the blocks that are gone. `config.pruned_blocks` tells where a layer keeps them: `Places` as in `pruning/families.py`.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

# What stands in `config.json` for the activation function, by any of its names: no stock model can be built with it.
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
LOCK = "layers of unequal size: pass trust_remote_code=True"

# Roles as checkpoints of the first version call them.
LETTERS = {"q": "query", "k": "key", "v": "value", "n": "neuron", "H": "query_heads", "h": "kv_heads"}


class AbsentAttention(nn.Module):
    """Attention that was pruned away: adds nothing to the residual stream.

    vLLM's Transformers backend only takes models that have a module in every layer whose source calls the attention interface.
    """

    attends, layer_idx = False, None
    config: Any  # where one was loaded

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        if self.attends:  # never
            attention_interface = ALL_ATTENTION_FUNCTIONS["eager"]
            attention_interface(self, hidden_states)
        return torch.zeros_like(hidden_states), None


class AbsentMLP(nn.Module):
    """An MLP that was pruned away: adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


class LayerConfig:
    """A model's config as one module reads it: a few values are its own, all others are the model's, whenever they change."""

    def __init__(self, shared: Any, own: Mapping[str, Any]) -> None:
        vars(self).update(own, shared=shared)

    def __getattr__(self, name: str) -> Any:  # asked only for what is not the module's own
        if name == "shared" or name.startswith("__"):  # a copy in the making, or copy and pickle looking for hooks
            raise AttributeError(name)
        return getattr(self.shared, name)


def stand_ins(kind: str, places: Mapping[str, Any]) -> dict[str, nn.Module]:
    """What stands in, by attribute of the decoder layer, for a block that is gone; its norms leave with it."""
    if places["module"]:
        whole: dict[str, nn.Module] = {places["module"]: AbsentAttention() if kind == "attention" else AbsentMLP()}
    else:  # the layer calls the projections itself
        whole = {**{name: nn.Identity() for name in places["inputs"]}, places["output"]: AbsentMLP()}
    return whole | {name: nn.Identity() for name in (places["norm"], places["post_norm"]) if name}


class PrunedConfig:
    """Mixin before a stock config, whose own sizes are those of the dense model.

    `config.json` names the stock `model_type`: with another one, transformers asks to run code before it loads even the tokenizer. A
    stock model must not be built from it, so what only this class may read stands under `pruned_values`, and `LOCK` in its place.
    """

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        own = {**config_dict, **config_dict.get("pruned_values", {})}
        own.pop("pruned_values", None)
        return super().from_dict(own, **kwargs)  # type: ignore[misc]

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        told = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        own = {name: getattr(self, name) for name in ACTIVATIONS if name in vars(self)}
        told |= {"pruned_values": own | {"per_layer_config": told.pop("per_layer_config", None)}}
        if "AutoModelForCausalLM" in told.get("auto_map", {}):
            module = type(self).__module__.rpartition(".")[2]
            base: Any = transformers.MODEL_MAPPING[type(self).__mro__[2]]  # without the head, as vLLM builds it
            told["auto_map"] |= {"AutoModel": f"{module}.Pruned{base.__name__}"}
        return json.dumps(told | dict.fromkeys(own, LOCK), indent=2, sort_keys=True) + "\n"

    def validate(self) -> None:
        with dense(self):
            super().validate()  # type: ignore[misc]

    def validate_rope(self) -> None:  # which vLLM asks for alone
        with dense(self):
            super().validate_rope()  # type: ignore[misc]


class PrunedModel:
    """Mixin before a stock model with a language-model head, or without."""

    def __init__(self, config: Any) -> None:  # vLLM checks `config` against the annotation of `self`, which so has none
        model: Any = self
        if not getattr(config, "is_heterogeneous", False):
            raise ValueError("This checkpoint needs transformers >= 5.15 and a config with `per_layer_config`.")
        with dense(config):
            super().__init__(config)  # type: ignore[call-arg]
            heads = config.num_attention_heads
        for module in model.modules():
            if hasattr(
                module, "rope_type"
            ):  # some scalings ask for the number of heads, now and whenever a text is longer
                module.config = LayerConfig(config, {"num_attention_heads": heads})
        layers = getattr(model.get_decoder(), config.pruned_blocks["layers"])
        attends = config._attn_implementation == "vllm"  # which has a cache of its own
        for layer, own in zip(layers, config.per_layer_config, strict=True):
            narrow(layer, own, config)
            if "attention" not in own.skip and not attends:
                # The first cache layer tells how long the text is: it belongs to the first layer that attends.
                getattr(layer, config.pruned_blocks["attention"]["module"]).layer_idx, attends = 0, True


def narrow(layer: nn.Module, own: Any, shared: Any) -> None:
    """Cut a layer of dense size to its `own` config."""
    heads = own.num_attention_heads
    groups = getattr(own, "num_key_value_heads", heads)
    sizes = {"query_heads": heads, "kv_heads": groups, "neuron": getattr(own, shared.pruned_blocks["neurons"])}
    sizes |= {"query": heads * own.head_dim, "key": groups * own.head_dim, "value": groups * own.head_dim}
    sizes |= {letter: sizes[role] for letter, role in LETTERS.items()}
    for kind, columns in (("attention", "query"), ("mlp", "neuron")):
        places = shared.pruned_blocks[kind]
        if kind in own.skip:
            for name, module in stand_ins(kind, places).items():
                if isinstance(module, AbsentAttention):
                    module.config, module.layer_idx = shared, getattr(getattr(layer, name), "layer_idx", None)
                setattr(layer, name, module)
            continue
        block: Any = getattr(layer, places["module"]) if places["module"] else layer
        for name, parts in places["inputs"].items():
            _cut(getattr(block, name), outputs=sum(sizes[role] for part in parts for role in part))
        _cut(getattr(block, places["output"]), inputs=sizes[columns])
        if kind == "attention" and hasattr(block, "num_key_value_groups"):
            block.num_key_value_groups = heads // groups
        for name, role in places["counts"].items():
            setattr(block, name, sizes[role])
        if places["config_counts"]:
            block.config = LayerConfig(shared, {name: sizes[role] for name, role in places["config_counts"].items()})


def _cut(projection: Any, outputs: int | None = None, inputs: int | None = None) -> None:
    """Make a projection smaller; which of its values stay does not matter, since the checkpoint's replace them."""
    weight, bias = projection.weight.detach(), projection.bias
    if isinstance(projection, Conv1D):  # keeps its weight transposed
        weight = weight[:inputs, :outputs]
        projection.nx, projection.nf = weight.shape
    else:
        weight = weight[:outputs, :inputs]
        projection.out_features, projection.in_features = weight.shape
    projection.weight = nn.Parameter(weight.clone())
    if bias is not None:
        projection.bias = nn.Parameter(bias.detach()[:outputs].clone())


@contextmanager
def dense(config: Any) -> Iterator[None]:
    """The config of a model whose layers are all as wide as the dense model's."""
    widths = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = widths


@functools.cache
def __getattr__(name: str) -> Any:
    """`PrunedX` and its config class, made from transformers' `X` when it is asked for (PEP 562)."""
    stock = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if stock is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if issubclass(stock, transformers.PreTrainedConfig):
        bases: tuple[Any, ...] = (PrunedConfig, stock)
        own = {"_auto_class": "AutoConfig"}
    else:
        bases = (PrunedModel, stock)
        own = {
            "config_class": __getattr__(f"Pruned{stock.config_class.__name__}"),
            "_auto_class": "AutoModelForCausalLM" if name.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel",
        }
    return type(name, bases, {**own, "__module__": __name__})
