"""Importance per layer, as advisors and reports read it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pruning.block import BLOCK_KINDS, BlockKind


@dataclass(frozen=True)
class LayerStatistics:
    """Importance per layer, summed over a block's units: `taylor`, `activation` and `influence` by kind, `L` each."""

    taylor: Mapping[BlockKind, tuple[float, ...]]
    activation: Mapping[BlockKind, tuple[float, ...]]
    influence: Mapping[BlockKind, tuple[float, ...]]

    @classmethod
    def of(cls, layers: Mapping[str, Mapping[str, Tensor]]) -> "LayerStatistics":
        """From `pruning.importance.layer_scores`."""

        def per_kind(method: str) -> dict[BlockKind, tuple[float, ...]]:
            return {kind: tuple(layers[method][kind].tolist()) for kind in BLOCK_KINDS}

        return cls(per_kind("taylor"), per_kind("activation"), per_kind("block_influence"))
