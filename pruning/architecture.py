"""How many KV groups and neurons each layer keeps."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from pruning.anatomy import Anatomy, BlockKind
from pruning.errors import InvalidArchitecture


@dataclass(frozen=True)
class Architecture:
    """A sub-network by its widths. A layer with (0, 0) is dropped as a whole.

    Args:
        kv_groups: Key/value groups kept per layer; the query heads of a group stay and leave with it.
        neurons: MLP neurons kept per layer.

    Raises:
        InvalidArchitecture: Lengths differ, a width is no whole number >= 0, or no layer keeps attention
            (a decoder without any attention predicts from the last token alone and has no KV cache).
    """

    kv_groups: tuple[int, ...]
    neurons: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.kv_groups) != len(self.neurons):
            raise InvalidArchitecture(
                f"Expected one width per layer in both lists, got {len(self.kv_groups)} and {len(self.neurons)}."
            )
        for width in (*self.kv_groups, *self.neurons):
            if type(width) is not int or width < 0:
                raise InvalidArchitecture(f"A width must be a whole number >= 0, got {width!r}.")
        if not any(self.kv_groups):
            raise InvalidArchitecture("At least one layer must keep attention.")

    @classmethod
    def full(cls, anatomy: Anatomy) -> "Architecture":
        """The dense model."""
        layers = anatomy.num_hidden_layers
        return cls((anatomy.num_key_value_heads,) * layers, (anatomy.intermediate_size,) * layers)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name this architecture."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:16]

    def units(self, kind: BlockKind) -> tuple[int, ...]:
        """Units kept per layer in blocks of this kind."""
        return self.kv_groups if kind == "attention" else self.neurons

    def keeps_layer(self, layer: int) -> bool:
        return self.kv_groups[layer] > 0 or self.neurons[layer] > 0

    def check(self, anatomy: Anatomy) -> None:
        """Raise InvalidArchitecture unless this is a sub-network of a model with `anatomy`."""
        if len(self.kv_groups) != anatomy.num_hidden_layers:
            raise InvalidArchitecture(f"Expected {anatomy.num_hidden_layers} layers, got {len(self.kv_groups)}.")
        for block in anatomy.blocks:
            for layer, width in enumerate(self.units(block.kind)):
                if width > block.units:
                    raise InvalidArchitecture(
                        f"Layer {layer} has {block.units} units of {block.kind}, cannot keep {width}."
                    )

    def to_dict(self) -> dict[str, list[int]]:
        return {"kv_groups": list(self.kv_groups), "neurons": list(self.neurons)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Architecture":
        return cls(tuple(data["kv_groups"]), tuple(data["neurons"]))
