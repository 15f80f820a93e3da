"""Where layers, KV groups and neurons sit in a Hugging Face decoder, by the names in `pruning.families`.

A decoder layer holds two residual *blocks*, attention and MLP. Both have the same shape for our purpose: some input
projections whose rows belong to *units* (a KV group, a neuron), and one output projection whose columns belong to
the same units. Everything else in this package works on `Block`, never on names such as `q_proj`.

    block       unit                         rows of a unit in its inputs              columns of a unit in its output
    attention   KV group (its queries too)   query: Q*head_dim, key, value: head_dim   Q*head_dim
    mlp         neuron                       1 in each                                 1

with Q the number of query heads that share a KV group (grouped-query attention, arXiv:2305.13245; Q = 1 is MHA). A *width* is a number of
units; of attention also one of KV groups that lack some of their query heads, see `pruning.widths`.

A *fused* projection holds several of these one below the other: it has one *part* for each, and within a part every
unit owns the same number of neighbouring rows. Phi-3's `qkv_proj` has three parts, Llama's `q_proj` has one; GPT-NeoX
keeps query, key and value of a head together, which is one part again.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pruning.block import Block, BlockKind, Rows, module_of
from pruning.errors import InvalidFamily, UnsupportedModel
from pruning.families import find_family, known_families
from pruning.family import Family, Places, Role
from pruning.projection import Projection, matrix_of
from pruning.refusals import refusal


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, in Hugging Face's terms."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads


@dataclass(frozen=True)
class Anatomy(Sizes):
    """Sizes and places of a decoder. Equal for every layer.

    Args:
        shared_parameters: Parameters of each layer that belong to both blocks and stay while one of them does.
        other_parameters: Parameters outside the decoder layers (embeddings, final norm, untied head).
        attention_spans: Tokens that each layer's attention can see, or None for all.
        residual_scale: What blocks give is multiplied by it before it is added to the residual stream.
        heads_as_one: KV heads of the model that are one here, see `Family.whole_attention`; `head_dim` is that of them together.
    """

    family: Family
    attention: Block
    mlp: Block
    shared_parameters: int
    other_parameters: int
    attention_spans: tuple[int | None, ...]
    residual_scale: float
    heads_as_one: int

    @property
    def blocks(self) -> tuple[Block, Block]:
        return self.attention, self.mlp

    @property
    def layer_parameters(self) -> int:
        """Parameters of one dense decoder layer."""
        blocks = sum(block.units * block.parameters_per_unit + block.fixed_parameters for block in self.blocks)
        return blocks + self.shared_parameters

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        return getattr(model.get_decoder(), self.family.layers)

    def set_layers(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        setattr(model.get_decoder(), self.family.layers, layers)


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model with this config.

    Raises:
        UnsupportedModel: No decoder of a known family, or a variant that does not fit it.
        InvalidFamily: A plug-in for it is broken.
    """
    family = find_family(config.model_type)
    if family is None or config.is_encoder_decoder:
        reason = refusal(config) or f"there is no row for it. Supported decoder families: {', '.join(known_families())}"
        raise UnsupportedModel(f"Model type '{config.model_type}' is not supported: {reason}.")
    for name, needed in family.required.items():
        if (found := getattr(config, name, needed)) != needed:
            raise UnsupportedModel(
                f"Models of type '{config.model_type}' are supported with {name}={needed}, this one has {name}={found}."
            )
    return family


def sizes_of(config: PretrainedConfig) -> Sizes:
    """Read the sizes from a config of a supported family.

    Raises:
        UnsupportedModel, InvalidFamily: See `family_of`.
    """
    return _sizes(config, family_of(config))


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Read the sizes of `model` and check that every layer has them.

    Raises:
        UnsupportedModel: Not a decoder of a known family, or layers of unequal size.
        InvalidFamily: See `family_of`; or the family's row names what the model has not.
    """
    family = family_of(model.config)
    try:
        return _anatomy(model, family)
    except AttributeError as error:
        raise InvalidFamily(
            f"The row of the family '{family.model_type}' does not fit a {type(model).__name__}: {error}."
        ) from error


def _anatomy(model: PreTrainedModel, family: Family) -> Anatomy:
    sizes = _sizes(model.config, family)
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"A {type(model).__name__} has no language-model head: load it as a causal language model."
        )
    queries = sizes.queries_per_group
    owned: dict[Role, int] = {
        "query": queries * sizes.head_dim, "key": sizes.head_dim, "value": sizes.head_dim, "neuron": 1,
        "query_heads": queries, "kv_heads": 1,
    }  # fmt: skip
    layers = list(getattr(model.get_decoder(), family.layers))
    attention = _block("attention", family, layers, owned, sizes.num_key_value_heads)
    mlp = _block("mlp", family, layers, owned, sizes.intermediate_size)
    shared = _count(getattr(layers[0], family.norm)) if family.norm else 0
    per_layer = shared + sum(
        block.units * block.parameters_per_unit + block.fixed_parameters for block in (attention, mlp)
    )
    for index, layer in enumerate(layers):
        if _count(layer) != per_layer:
            raise UnsupportedModel(
                f"Layer {index} has {_count(layer)} parameters where {per_layer} were expected: layers of unequal size."
            )
    return Anatomy(
        **asdict(sizes) | {"num_hidden_layers": len(layers)},
        family=family,
        attention=attention,
        mlp=mlp,
        shared_parameters=shared,
        other_parameters=_count(model) - len(layers) * per_layer,
        attention_spans=_attention_spans(model.config, len(layers)),
        residual_scale=getattr(model.config, family.residual_scale) if family.residual_scale else 1.0,
        heads_as_one=model.config.num_attention_heads // sizes.num_attention_heads,
    )


def _sizes(config: PretrainedConfig, family: Family) -> Sizes:
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    as_one = kv_heads if family.whole_attention else 1
    return Sizes(
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=heads // as_one,
        num_key_value_heads=kv_heads // as_one,
        head_dim=as_one * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        intermediate_size=getattr(config, family.intermediate_size) or 4 * config.hidden_size,
        vocab_size=config.vocab_size,
    )


def _block(kind: BlockKind, family: Family, layers: list[nn.Module], owned: Mapping[Role, int], units: int) -> Block:
    places: Places = getattr(family, kind)
    fused = any("query" in part and len(part) > 1 for parts in places.inputs.values() for part in parts)
    alone = not fused and not family.whole_attention
    heads = owned["query_heads"] if kind == "attention" and alone else 1
    inputs = {
        name: Rows(
            tuple(sum(owned[role] for role in part) for part in parts),
            units,
            tuple(heads if "query" in part else 1 for part in parts),
        )
        for name, parts in places.inputs.items()
    }
    columns_per_unit = owned["query" if kind == "attention" else "neuron"]
    _check_widths(places, layers, inputs, units * columns_per_unit)
    module = module_of(places, layers[0])
    output = getattr(module, places.output)
    projections = {name: getattr(module, name) for name in inputs}
    row = {name: matrix_of(each).shape[1] + (each.bias is not None) for name, each in projections.items()}
    columns = columns_per_unit * len(matrix_of(output))
    per_unit = columns + sum(rows.per_unit * row[name] for name, rows in inputs.items())
    of_queries = columns + sum(
        row[name] * own
        for name, rows in inputs.items()
        for own, queries in zip(rows.parts, rows.queries, strict=True)
        if queries > 1
    )
    modules = [module] if places.module else [*projections.values(), output]
    norms = [getattr(layers[0], name) for name in (places.norm, places.post_norm) if name]
    return Block(
        kind=kind,
        places=places,
        # attention is called by keywords, which hooks do not see; but nothing stands before it in the layer
        entrance=places.norm or family.norm or ("" if kind == "attention" else places.module),
        inputs=inputs,
        columns_per_unit=columns_per_unit,
        counts={name: owned[role] for name, role in places.counts.items()},
        config_counts={name: owned[role] for name, role in places.config_counts.items()},
        units=units,
        parameters_per_unit=per_unit,
        fixed_parameters=sum(_count(module) for module in (*modules, *norms)) - units * per_unit,
        queries=heads,
        parameters_per_query=of_queries // heads if heads > 1 else 0,
    )


def _check_widths(places: Places, layers: list[nn.Module], inputs: Mapping[str, Rows], columns: int) -> None:
    """The config of a pruned model still tells the dense widths, so they are read from the projections."""
    expected = {name: (0, rows.total) for name, rows in inputs.items()} | {places.output: (1, columns)}
    for index, layer in enumerate(layers):
        for name, (axis, width) in expected.items():
            projection = getattr(module_of(places, layer), name, None)
            found = matrix_of(projection).shape[axis] if isinstance(projection, Projection) else 0
            if found != width:
                raise UnsupportedModel(
                    f"Layer {index} has {found} {('rows', 'columns')[axis]} in '{name}' where the config says {width}: "
                    "layers of unequal size, or a model that is pruned already."
                )


def _attention_spans(config: PretrainedConfig, layers: int) -> tuple[int | None, ...]:
    """Sliding windows by layer; without `layer_types` one window holds for all."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
