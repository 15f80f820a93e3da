"""What a row of the table of families says, in the field's words: where a decoder layer keeps its two blocks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from pruning.errors import InvalidFamily

# What a single unit owns: rows of its queries, keys and values, or a neuron's row; and how many heads a KV group is.
Role = Literal["query", "key", "value", "neuron", "query_heads", "kv_heads"]
Part = tuple[Role, ...]  # roles of the neighbouring rows of one unit, in their order
Inputs = Mapping[str, tuple[Part, ...]]


@dataclass(frozen=True)
class Places:
    """Where one kind of block lies, as attribute names.

    Args:
        module: The block in the decoder layer; empty when its projections are the layer's own.
        norm: The normalisation before the block, in the decoder layer. It leaves with the block. Empty where there is none, or
            where both blocks share one, which is `Family.norm`.
        inputs: Input projection -> its parts, one below the other. In a part the rows of a unit are neighbours.
        output: The projection back to the residual stream.
        post_norm: The normalisation between block and residual stream, if there is one. It leaves with the block.
        counts: Attributes of the block's module that its own forward pass takes for widths -> the role they count.
        config_counts: The same for attributes that it reads from the config, which all layers share.

    Raises:
        InvalidFamily: What should be roles is none.
    """

    module: str
    norm: str
    inputs: Inputs
    output: str
    post_norm: str = ""
    counts: Mapping[str, Role] = field(default_factory=dict)
    config_counts: Mapping[str, Role] = field(default_factory=dict)

    def __post_init__(self) -> None:
        roles = get_args(Role)
        for name, parts in self.inputs.items():
            if not all(isinstance(part, tuple) and part and {*part} <= {*roles} for part in parts):
                raise InvalidFamily(
                    f"`inputs` of '{name}' must be a tuple of parts, each a tuple of roles ({', '.join(roles)}), got {parts!r}."
                )
        for name, role in {**self.counts, **self.config_counts}.items():
            if role not in roles:
                raise InvalidFamily(f"'{name}' must count one of {', '.join(roles)}, got {role!r}.")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        model_type: The config's `model_type`.
        models: Models that users know it by.
        layers: Attribute of the decoder that holds its layers.
        intermediate_size: Config attribute for the number of neurons; where that is None there are 4 for each hidden unit.
        required: Config attributes of which any other value makes a model that is not supported.
        notes: What is particular about it, for the table in the documentation.
        norm: The normalisation that both blocks read, in the decoder layer. It leaves with the layer.
        whole_attention: Heads are normalised together, so that none can leave without the others: they are one unit.
        per_layer: Config attributes with one value for each layer, beside `layer_types`.
        residual_scale: Config attribute that multiplies what blocks add to the residual stream.
        logits_times, logits_over: Config attributes by which the head's logits are multiplied and divided.
    """

    model_type: str
    models: str
    attention: Places
    mlp: Places
    layers: str = "layers"
    intermediate_size: str = "intermediate_size"
    required: Mapping[str, Any] = field(default_factory=dict)
    notes: str = ""
    norm: str = ""
    whole_attention: bool = False
    per_layer: tuple[str, ...] = ()
    residual_scale: str = ""
    logits_times: str = ""
    logits_over: str = ""
