"""Statistics, ranking and the refits of a grid of widths, in one walk: fitted layer by layer, kept on disk, computed once.

A layer's Gram matrices are summed, factored, solved for every width of the grid and freed before the next layer comes. What has
been solved is a file for each layer (`pruning.tensor_files`), so that a walk that was stopped goes on at the layer it was in, and
one that was finished never takes place again.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.block import Block, BlockKind, expand_units
from pruning.compensation import CACHE_BYTES, RIDGE, Factor, Ridge
from pruning.errors import InvalidArchitecture
from pruning.importance import activation_ranking, order_of, within_groups
from pruning.masks import Ranking
from pruning.statistics import Statistics, collect_statistics, steps
from pruning.surgeon import surgeon_order
from pruning.tensor_files import TensorFiles
from pruning.walk import device_of
from pruning.widths import lacking_of, width_text

STATISTICS = "statistics"
Order = Literal[
    "surgeon", "activation"
]  # of a block's units: `pruning.surgeon.surgeon_order`, `pruning.importance.activation`


@dataclass(frozen=True)
class Fitted:
    """What a walk leaves behind. `refits` is None where none were asked for."""

    statistics: Statistics
    ranking: Ranking
    refits: "GridRefits | None"


class GridRefits:
    """Refitted output weights at the widths of a grid. Implements `pruning.compensation.Refits`.

    Memory: on the device up to `cache_bytes`, the least recently used leaving first; all others where `files` has them.
    """

    def __init__(
        self,
        files: TensorFiles,
        ranking: Ranking,
        device: torch.device | str,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.ranking = ranking
        self._files = files
        self._device = torch.device(device)
        self._cache: OrderedDict[tuple[int, str], tuple[Tensor, Tensor | None]] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached = 0

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        """The `hidden_size x block.columns_at(units)` weight whose columns follow the ranking.

        Raises:
            InvalidArchitecture: The width is not on the grid.
        """
        return self._of(layer, block, units)[0]

    def bias(self, layer: int, block: Block, units: int) -> Tensor | None:
        """The `hidden_size` bias that goes with it; None where the dense one, if any, stays.

        Raises:
            InvalidArchitecture: As `weight`.
        """
        return self._of(layer, block, units)[1]

    def _of(self, layer: int, block: Block, units: int) -> tuple[Tensor, Tensor | None]:
        key = layer, _key(block.kind, units)
        if key not in self._cache:
            kept = self._files.get(layer_name(layer)) or {}
            if key[1] not in kept:
                known = sorted(int(name.split(".")[1]) for name in kept if name.startswith(f"{block.kind}."))
                told = [width_text(width) if lacking_of(width) else width for width in known] or "none"
                raise InvalidArchitecture(
                    f"Layer {layer} has no refit for {width_text(units)} of {block.kind}: expected one of {told}."
                )
            weight, bias = kept[key[1]].to(self._device, non_blocking=True), kept.get(f"bias.{key[1]}")
            self._cached += weight.nbytes
            while self._cached > self._cache_bytes and self._cache:
                self._cached -= self._cache.popitem(last=False)[1][0].nbytes
            self._cache[key] = weight, None if bias is None else bias.to(self._device, non_blocking=True)
        self._cache.move_to_end(key)
        return self._cache[key]


def fit(
    model: PreTrainedModel,
    windows: Tensor,
    widths: Mapping[BlockKind, Sequence[int]] | None,
    files: TensorFiles,
    ridge: Ridge = RIDGE,
    order: Order = "surgeon",
    scored: int | None = None,
    batch_size: int = 2,
    on_layer: Callable[[int], None] | None = None,
    cache_bytes: int = CACHE_BYTES,
    queries: bool = False,
) -> Fitted:
    """Walk through the dense model, or take what an earlier walk has left in `files`.

    Memory on the device, beyond what `pruning.walk.Walk` says: one layer's Gram matrices (`C x C` float32, C the columns of its output
    projection), twice as much for the order of its units, then its factor, and one weight at a time. On the host: nothing, unless the
    disk is full.

    Args:
        windows: `num_windows x length` token ids.
        widths: Units by kind to refit to; what is dense or dropped needs no refit. None for no refits at all.
        files: Empty, or with what the same call has left there: the caller sees to that. What has other shapes is made anew.
        order: Of the units, which all widths keep prefixes of. Without refits it is always "activation": the other presumes them.
        scored: As for `collect_statistics`.
        on_layer: Called with the number of layers done, out of `steps(...)`.
        cache_bytes: Of refits that are kept on the device, once they are asked for.
        queries: Whether query heads are ranked too, which widths that lack some of them need.
    """
    anatomy, device = anatomy_of(model), device_of(model)
    layers = range(anatomy.num_hidden_layers)

    def missing(index: int) -> bool:
        if widths is None:
            return False
        kept = files.get(layer_name(index), _expected(anatomy, anatomy.layers_of(model)[index], widths, ridge, queries))
        return kept is None or not all(_is_order(kept[name]) for name in kept if name.startswith("order."))

    def solve(statistics: Statistics, index: int, layer: nn.Module) -> None:
        if widths is not None and missing(index):
            files.put(layer_name(index), _solved(statistics, index, layer, widths, ridge, order, queries))

    nothing = Statistics.empty(model, windows, len(windows) if scored is None else scored)
    stored = files.get(STATISTICS, nothing.to_tensors(), finite=True)
    if stored is not None and not any(map(missing, layers)):
        statistics = Statistics.from_tensors(anatomy, stored, device)
        if on_layer:
            on_layer(steps(anatomy.num_hidden_layers))
    else:
        statistics = collect_statistics(model, windows, batch_size, on_layer, scored, missing, solve)
        files.put(STATISTICS, statistics.to_tensors())
    ranking = activation_ranking(statistics, queries) if widths is None else _ranking_of(files, anatomy)
    return Fitted(statistics, ranking, None if widths is None else GridRefits(files, ranking, device, cache_bytes))


def layer_name(index: int) -> str:
    """What the refits of a layer are called among the files."""
    return f"layer_{index:03d}"


def names_of(anatomy: Anatomy) -> list[str]:
    """All that `fit` puts into its files."""
    return [*map(layer_name, range(anatomy.num_hidden_layers)), STATISTICS]


def _key(kind: BlockKind, units: int) -> str:
    return f"{kind}.{units}"


def _solved(
    statistics: Statistics,
    index: int,
    layer: nn.Module,
    widths: Mapping[BlockKind, Sequence[int]],
    ridge: Ridge,
    order: Order,
    queries: bool,
) -> dict[str, Tensor]:
    """The refits of a layer that is on the device, and the order of units that they follow; its Gram matrices are gone then."""
    solved: dict[str, Tensor] = {}
    for block in statistics.anatomy.blocks:
        sums, tokens = statistics.blocks[block.kind], statistics.num_tokens
        output = block.output_of(layer)
        gram = sums.gram.pop(index).div_(tokens)
        mean = sums.total[index] / tokens
        best, *alone = (
            surgeon_order(gram, mean, output, units, ridge, tokens)
            if order == "surgeon"
            else order_of(statistics, units, index)
            for units in ((block, block.by_query) if queries and block.kind == "attention" else (block,))
        )
        solved[f"order.{block.kind}"] = best.int()
        heads = expand_units(best, block.queries)
        if alone:
            heads = within_groups(alone[0], best, block.queries)
            solved["order.heads"] = heads.int()
        wanted = sorted(({*widths[block.kind]} - {0, block.units}), key=lacking_of, reverse=True)
        for lacking, some in groupby(wanted, lacking_of):  # one order of columns, and so one factor, for each
            by_unit = heads.view(block.units, block.queries)
            first = torch.cat([part.flatten() for part in by_unit.split([block.queries - lacking, lacking], dim=1)])
            columns = expand_units(first, block.columns_per_unit // block.queries)
            factor = Factor.of(gram.clone() if lacking else gram, mean, output, columns, ridge, tokens)
            for width in some:
                weight, bias = factor.solve(block.columns_at(width))
                solved[_key(block.kind, width)] = weight.to(output.weight).cpu().contiguous()
                if bias is not None:
                    solved[f"bias.{_key(block.kind, width)}"] = bias.to(output.weight).cpu().contiguous()
    return solved


def _expected(
    anatomy: Anatomy, layer: nn.Module, widths: Mapping[BlockKind, Sequence[int]], ridge: Ridge, queries: bool
) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what `_solved` gives, on the meta device."""
    expected: dict[str, Tensor] = {}
    for block in anatomy.blocks:
        output = block.output_of(layer)
        empty = partial(torch.empty, dtype=output.weight.dtype, device="meta")
        expected[f"order.{block.kind}"] = torch.empty(block.units, dtype=torch.int32, device="meta")
        if queries and block.kind == "attention":
            expected["order.heads"] = torch.empty(block.units * block.queries, dtype=torch.int32, device="meta")
        for width in {*widths[block.kind]} - {0, block.units}:
            expected[_key(block.kind, width)] = empty(anatomy.hidden_size, block.columns_at(width))
            if output.bias is not None and ridge.biases:
                expected[f"bias.{_key(block.kind, width)}"] = empty(anatomy.hidden_size)
    return expected


def _is_order(units: Tensor) -> bool:
    return torch.equal(units.sort().values, torch.arange(len(units), dtype=units.dtype))


def _ranking_of(files: TensorFiles, anatomy: Anatomy) -> Ranking:
    """As the refits have it: summing up again on another number of threads may order equals otherwise."""
    rows: dict[str, list[Tensor]] = {"attention": [], "mlp": [], "heads": []}
    for index in range(anatomy.num_hidden_layers):
        kept = files.get(layer_name(index))
        assert kept is not None  # `fit` has just seen to it
        for name in rows:
            if f"order.{name}" in kept:
                rows[name].append(kept[f"order.{name}"].long())
    return Ranking(*(torch.stack(orders) for orders in rows.values() if orders))
