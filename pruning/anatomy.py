"""Where layers, KV groups and neurons sit in a Hugging Face decoder. The only file that knows module paths.

A decoder layer holds two residual *blocks*, attention and MLP. Both have the same shape for our purpose: some input
projections whose rows belong to *units* (a KV group, a neuron), and one output projection whose columns belong to
the same units. Everything else in this package works on `Block`, never on names such as `q_proj`.

    block       unit                         rows of a unit in its inputs        columns of a unit in its output
    attention   KV group (its queries too)   q: Q*head_dim, k, v: head_dim       o: Q*head_dim
    mlp         neuron                       gate: 1, up: 1                      down: 1

with Q the number of query heads that share a KV group (grouped-query attention, arXiv:2305.13245; Q = 1 is MHA).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from pruning.errors import UnsupportedModel

BlockKind = Literal["attention", "mlp"]
BLOCK_KINDS: tuple[BlockKind, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Family:
    """One row of the table of supported families: attribute names, relative to the decoder and to a decoder layer."""

    model_type: str
    layers: str = "layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    attention_output: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    mlp_inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_output: str = "down_proj"


FAMILIES = {
    family.model_type: family for family in (Family("llama"), Family("mistral"), Family("qwen2"), Family("qwen3"))
}


@dataclass(frozen=True)
class Block:
    """One of the two residual blocks of every decoder layer.

    Args:
        kind: "attention" or "mlp".
        module: Attribute of the block in the decoder layer.
        norm: Attribute of the normalisation before the block; it leaves with the block.
        rows_per_unit: Input projections and how many of their rows one unit owns.
        output: The projection back to the residual stream.
        columns_per_unit: Columns of `output` that one unit owns.
        units: Units in the dense block.
        parameters_per_unit: Parameters that leave with one unit.
        fixed_parameters: Parameters that stay while any unit stays (norms, output bias).
    """

    kind: BlockKind
    module: str
    norm: str
    rows_per_unit: Mapping[str, int]
    output: str
    columns_per_unit: int
    units: int
    parameters_per_unit: int
    fixed_parameters: int

    @property
    def columns(self) -> int:
        """Columns of the dense output projection."""
        return self.units * self.columns_per_unit

    def module_of(self, layer: nn.Module) -> nn.Module:
        return getattr(layer, self.module)

    def output_of(self, layer: nn.Module) -> nn.Linear:
        return getattr(self.module_of(layer), self.output)

    def inputs_of(self, layer: nn.Module) -> Iterator[tuple[nn.Linear, int]]:
        """The block's input projections with the number of rows that one unit owns in each."""
        for name, rows in self.rows_per_unit.items():
            yield getattr(self.module_of(layer), name), rows


@dataclass(frozen=True)
class Anatomy:
    """Sizes and places of a decoder, in Hugging Face's terms. Equal for every layer.

    Args:
        other_parameters: Parameters outside the decoder layers (embeddings, final norm, untied head).
    """

    family: Family
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    attention: Block
    mlp: Block
    other_parameters: int

    @property
    def blocks(self) -> tuple[Block, Block]:
        return self.attention, self.mlp

    @property
    def queries_per_group(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        return getattr(model.get_decoder(), self.family.layers)

    def set_layers(self, model: PreTrainedModel, layers: nn.ModuleList) -> None:
        setattr(model.get_decoder(), self.family.layers, layers)


def anatomy_of(model: PreTrainedModel) -> Anatomy:
    """Read the sizes of `model` and check that every layer has them.

    Raises:
        UnsupportedModel: Not a decoder of a family in `FAMILIES`, or layers of unequal size.
    """
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"Model type '{config.model_type}' is not supported. Supported decoder families: {', '.join(sorted(FAMILIES))}."
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModel(
            f"A {type(model).__name__} has no language-model head: load it as a causal language model."
        )
    layers = list(getattr(model.get_decoder(), family.layers))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    _check_widths(family, layers, config.num_attention_heads * head_dim, config.intermediate_size)
    queries = config.num_attention_heads // config.num_key_value_heads
    attention_rows = {family.query: queries * head_dim, family.key: head_dim, family.value: head_dim}
    attention = _block(
        "attention",
        layers[0],
        family.attention,
        family.attention_norm,
        attention_rows,
        family.attention_output,
        queries * head_dim,
        config.num_key_value_heads,
    )
    mlp = _block(
        "mlp",
        layers[0],
        family.mlp,
        family.mlp_norm,
        dict.fromkeys(family.mlp_inputs, 1),
        family.mlp_output,
        1,
        config.intermediate_size,
    )
    per_layer = sum(block.units * block.parameters_per_unit + block.fixed_parameters for block in (attention, mlp))
    for index, layer in enumerate(layers):
        if _count(layer) != per_layer:
            raise UnsupportedModel(
                f"Layer {index} has {_count(layer)} parameters where {per_layer} were expected: layers of unequal size."
            )
    return Anatomy(
        family=family,
        num_hidden_layers=len(layers),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        attention=attention,
        mlp=mlp,
        other_parameters=_count(model) - len(layers) * per_layer,
    )


def _check_widths(family: Family, layers: list[nn.Module], attention: int, mlp: int) -> None:
    """The config of a pruned model still tells the dense widths, so they are read from the projections."""
    for index, layer in enumerate(layers):
        for module, output, columns in (
            (family.attention, family.attention_output, attention),
            (family.mlp, family.mlp_output, mlp),
        ):
            projection = getattr(getattr(layer, module), output, None)
            found = 0 if projection is None else projection.in_features
            if found != columns:
                raise UnsupportedModel(
                    f"Layer {index} has {found} columns in '{module}.{output}' where the config says {columns}: "
                    "layers of unequal size, or a model that is pruned already."
                )


def _block(
    kind: BlockKind,
    layer: nn.Module,
    module: str,
    norm: str,
    rows_per_unit: Mapping[str, int],
    output: str,
    columns_per_unit: int,
    units: int,
) -> Block:
    block = getattr(layer, module)
    out = getattr(block, output)
    per_unit = columns_per_unit * out.out_features
    for name, rows in rows_per_unit.items():
        projection = getattr(block, name)
        per_unit += rows * (projection.in_features + (projection.bias is not None))
    total = _count(block) + _count(getattr(layer, norm))
    return Block(kind, module, norm, rows_per_unit, output, columns_per_unit, units, per_unit, total - units * per_unit)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
