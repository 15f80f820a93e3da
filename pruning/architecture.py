"""How many KV groups, query heads and neurons each layer keeps."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pruning.anatomy import Anatomy
from pruning.block import BlockKind
from pruning.errors import InvalidArchitecture
from pruning.widths import attention_width, lacking_of, units_of


@dataclass(frozen=True)
class Architecture:
    """A sub-network by its widths. A layer with (0, 0) is dropped as a whole.

    Args:
        kv_groups: Key/value groups kept per layer; the query heads of a group leave with it.
        neurons: MLP neurons kept per layer.
        fewer_queries: Query heads that each of a layer's groups lacks, as many in every group; empty where none lacks any.

    Raises:
        InvalidArchitecture: Lengths differ, a width is no whole number >= 0, heads are missing in a layer without any, or no layer keeps
            attention (a decoder without any attention predicts from the last token alone and has no KV cache).
    """

    kv_groups: tuple[int, ...]
    neurons: tuple[int, ...]
    fewer_queries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.kv_groups) != len(self.neurons):
            raise InvalidArchitecture(
                f"Expected one width per layer in both lists, got {len(self.kv_groups)} and {len(self.neurons)}."
            )
        for width in (*self.kv_groups, *self.neurons, *self.fewer_queries):
            if type(width) is not int or width < 0:
                raise InvalidArchitecture(f"A width must be a whole number >= 0, got {width!r}.")
        if not any(self.fewer_queries):
            object.__setattr__(self, "fewer_queries", ())
        elif len(self.fewer_queries) != len(self.kv_groups):
            raise InvalidArchitecture(
                f"Expected query heads of {len(self.kv_groups)} layers, got {len(self.fewer_queries)}."
            )
        if any(fewer and not groups for groups, fewer in zip(self.kv_groups, self.fewer_queries, strict=False)):
            raise InvalidArchitecture("A layer without KV groups has no query heads to lack.")
        if not any(self.kv_groups):
            raise InvalidArchitecture("At least one layer must keep attention.")

    @classmethod
    def full(cls, anatomy: Anatomy) -> "Architecture":
        """The dense model."""
        layers = anatomy.num_hidden_layers
        return cls((anatomy.num_key_value_heads,) * layers, (anatomy.intermediate_size,) * layers)

    @classmethod
    def of(cls, attention: Sequence[int], neurons: Sequence[int]) -> "Architecture":
        """From the widths of all blocks, as `units` has them."""
        return cls(tuple(map(units_of, attention)), tuple(neurons), tuple(map(lacking_of, attention)))

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name this architecture."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:16]

    def units(self, kind: BlockKind) -> tuple[int, ...]:
        """Widths per layer of blocks of this kind, see `pruning.widths`."""
        if kind == "mlp":
            return self.neurons
        fewer = self.fewer_queries or (0,) * len(self.kv_groups)
        return tuple(map(attention_width, self.kv_groups, fewer))

    def keeps_layer(self, layer: int) -> bool:
        return self.kv_groups[layer] > 0 or self.neurons[layer] > 0

    def check(self, anatomy: Anatomy) -> None:
        """Raise InvalidArchitecture unless this is a sub-network of a model with `anatomy`."""
        if len(self.kv_groups) != anatomy.num_hidden_layers:
            raise InvalidArchitecture(f"Expected {anatomy.num_hidden_layers} layers, got {len(self.kv_groups)}.")
        for block in anatomy.blocks:
            for layer, width in enumerate(self.units(block.kind)):
                if units_of(width) > block.units:
                    raise InvalidArchitecture(
                        f"Layer {layer} has {block.units} units of {block.kind}, cannot keep {units_of(width)}."
                    )
                if lacking_of(width) >= block.queries and width:
                    raise InvalidArchitecture(
                        f"Layer {layer} has {block.queries} query heads in a KV group, cannot do without {lacking_of(width)}."
                    )

    def to_dict(self) -> dict[str, list[int]]:
        fewer = {"fewer_queries": list(self.fewer_queries)} if self.fewer_queries else {}
        return {"kv_groups": list(self.kv_groups), "neurons": list(self.neurons)} | fewer

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Architecture":
        return cls(tuple(data["kv_groups"]), tuple(data["neurons"]), tuple(data.get("fewer_queries", ())))
