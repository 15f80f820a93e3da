"""One of the two residual blocks of every decoder layer: which rows and columns of its projections belong to which of its units."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pruning.family import Places, Role
from pruning.modeling_pruned import LayerConfig
from pruning.projection import Projection
from pruning.widths import Width, lacking_of, units_of

BlockKind = Literal["attention", "mlp"]
BLOCK_KINDS: tuple[BlockKind, ...] = ("attention", "mlp")
QUERY_ROLES: tuple[Role, ...] = ("query", "query_heads")
REPEATS = "num_key_value_groups"  # what transformers calls the query heads of a KV group


@dataclass(frozen=True)
class Rows:
    """The rows of an input projection that belong to units.

    Args:
        parts: Rows that one unit owns in each part of the projection.
        units: Units in the dense projection.
        queries: For each part, how many query heads share a unit's rows, which are neighbours; 1 where no single head owns any.
    """

    parts: tuple[int, ...]
    units: int
    queries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "queries", self.queries or (1,) * len(self.parts))

    @property
    def per_unit(self) -> int:
        return sum(self.parts)

    @property
    def total(self) -> int:
        return self.units * self.per_unit

    @property
    def starts(self) -> list[int]:
        """The first row of each part."""
        return [self.units * sum(self.parts[:index]) for index in range(len(self.parts))]

    def prefix(self, width: int) -> list[slice]:
        """The first units, each with its first query heads: a run of rows in every part, or one for each unit where heads are missing."""
        units, lacking = units_of(width), lacking_of(width)
        found: list[slice] = []
        for start, rows, queries in zip(self.starts, self.parts, self.queries, strict=True):
            own = rows - lacking * rows // queries if queries > 1 else rows
            runs, length = (1, units * rows) if own == rows else (units, own)
            found += [slice(start + run * rows, start + run * rows + length) for run in range(runs)]
        return found

    def of(self, units: Tensor, heads: Tensor | None = None) -> Tensor:
        """Indices of the rows of these units, part by part, in their order: `n` -> `n * per_unit`.

        Args:
            heads: Those of their query heads that are kept, in the units' order; None for all.
        """
        parts = zip(self.starts, self.parts, self.queries, strict=True)
        return torch.cat(
            [
                start
                + (expand_units(units, rows) if queries == 1 or heads is None else expand_units(heads, rows // queries))
                for start, rows, queries in parts
            ]
        )


@dataclass(frozen=True)
class Block:
    """One of the two residual blocks of every decoder layer.

    Args:
        kind: "attention" or "mlp".
        places: Names of its modules.
        entrance: Attribute of the decoder layer whose input is the residual stream before the block; empty for the layer itself.
        inputs: Input projection -> its rows.
        columns_per_unit: Columns of the output projection that one unit owns.
        counts, config_counts: As in `Places`, with what one unit adds to each number.
        units: Units in the dense block.
        parameters_per_unit: Parameters that leave with one unit.
        fixed_parameters: Parameters that stay while any unit stays (norms, output bias).
        queries: Query heads of one unit, which share its columns; 1 in an MLP.
        parameters_per_query: Parameters that leave with one query head of one unit that stays.
    """

    kind: BlockKind
    places: Places
    entrance: str
    inputs: Mapping[str, Rows]
    columns_per_unit: int
    counts: Mapping[str, int]
    config_counts: Mapping[str, int]
    units: int
    parameters_per_unit: int
    fixed_parameters: int
    queries: int = 1
    parameters_per_query: int = 0

    @property
    def columns(self) -> int:
        """Columns of the dense output projection."""
        return self.units * self.columns_per_unit

    @property
    def by_query(self) -> "Block":
        """The same columns with a query head for a unit, for what ranks heads alone; an MLP as it is."""
        return replace(
            self, units=self.units * self.queries, columns_per_unit=self.columns_per_unit // self.queries, queries=1
        )

    def columns_at(self, width: int) -> int:
        """Columns of the output projection at a width."""
        return units_of(width) * (self.queries - lacking_of(width)) * (self.columns_per_unit // self.queries)

    def parameters_at(self, width: Width) -> Width:
        """Parameters of units at a width, without the fixed ones; elementwise."""
        return units_of(width) * (self.parameters_per_unit - lacking_of(width) * self.parameters_per_query)

    def columns_of(self, units: Tensor) -> Tensor:
        """Indices of the output projection's columns of these units, in their order."""
        return expand_units(units, self.columns_per_unit)

    def first_columns(self, columns: Tensor, width: int, held: int | None = None) -> Tensor:
        """Those of the output projection's columns, or inputs, that belong to the first units and query heads: views where no head lacks.

        Args:
            columns: `... x columns`, of a width that holds this one, units and heads sorted.
            held: That width; None for the dense one.
        """
        have, keep = (self.queries - lacking_of(each or 0) for each in (held, width))
        if have == keep:
            return columns[..., : self.columns_at(width)]
        heads = columns.unflatten(-1, (-1, have, self.columns_per_unit // self.queries))
        return heads[..., : units_of(width), :keep, :].flatten(-3)

    def per_unit(self, columns: Tensor) -> Tensor:
        """Values of the output projection's columns summed over the columns of each unit: `... x columns` -> `... x units`."""
        return columns.unflatten(-1, (self.units, self.columns_per_unit)).sum(-1)

    def module_of(self, layer: nn.Module) -> nn.Module:
        """The module that holds the projections: the layer itself in families without a module for the block."""
        return module_of(self.places, layer)

    def entrance_of(self, layer: nn.Module) -> nn.Module:
        """The module at the block's entrance, mostly its norm; what goes in is the residual stream."""
        return getattr(layer, self.entrance) if self.entrance else layer

    def output_of(self, layer: nn.Module) -> Projection:
        return getattr(self.module_of(layer), self.places.output)

    def update_of(self, layer: nn.Module) -> nn.Module:
        """The module whose result is added to the residual stream."""
        return getattr(layer, self.places.post_norm) if self.places.post_norm else self.output_of(layer)

    def inputs_of(self, layer: nn.Module) -> Iterator[tuple[Projection, Rows]]:
        """The block's input projections with the rows of its units."""
        for name, rows in self.inputs.items():
            yield getattr(self.module_of(layer), name), rows

    def attributes_at(self, layer: nn.Module, width: int) -> dict[str, Any]:
        """What the attributes of the block's module that tell its width must say at a width."""
        module, queries = self.module_of(layer), self.queries - lacking_of(width)

        def told(counts: Mapping[str, int], roles: Mapping[str, Role]) -> dict[str, Any]:
            heads = {name: queries if roles[name] in QUERY_ROLES else self.queries for name in counts}
            return {name: units_of(width) * count * heads[name] // self.queries for name, count in counts.items()}

        values = told(self.counts, self.places.counts)
        if self.config_counts:
            values["config"] = LayerConfig(module.config, told(self.config_counts, self.places.config_counts))
        if lacking_of(width) and hasattr(module, REPEATS):
            values[REPEATS] = queries
        return values


def expand_units(units: Tensor, width: int) -> Tensor:
    """Indices of the rows or columns that units own when each owns `width` consecutive ones: `n` -> `n * width`."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()


def module_of(places: Places, layer: nn.Module) -> nn.Module:
    """The module that holds a block's projections: the layer itself in families without one."""
    return getattr(layer, places.module) if places.module else layer
