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
from pruning.compensation import CACHE_BYTES, RIDGE, Factor, Refits, Ridge
from pruning.errors import InvalidArchitecture
from pruning.importance import activation_ranking, order_of, within_groups
from pruning.masks import Ranking
from pruning.projection import Projection
from pruning.statistics import Statistics, collect_statistics, steps
from pruning.surgeon import surgeon_order
from pruning.tensor_files import TensorFiles
from pruning.transfers import Coming, PinnedMemory
from pruning.walk import device_of, windows_at_once
from pruning.widths import lacking_of, width_text

STATISTICS = "statistics"
Order = Literal[
    "surgeon", "activation"
]  # of a block's units: `pruning.surgeon.surgeon_order`, `pruning.importance.activation`


def layer_name(index: int) -> str:
    """What the refits of a layer are called among the files."""
    return f"layer_{index:03d}"


def key_of(kind: BlockKind, units: int) -> str:
    """What a width's weight is called in a layer's file."""
    return f"{kind}.{units}"


@dataclass(frozen=True)
class Fitted:
    """What a walk leaves behind. `refits` is None where none were asked for."""

    statistics: Statistics
    ranking: Ranking
    refits: "GridRefits | None"


class RefitCache:
    """Refits that were asked for: up to `most` bytes on the device, the least recently used leaving first, and of those that have to leave
    up to `waiting` bytes in memory that a CUDA device copies from directly, as long as `spare` bytes of the host's stay free.
    """

    def __init__(self, most: int = CACHE_BYTES, waiting: int = 0, spare: int = 0) -> None:
        self.most = most
        self.held = 0
        self.kept: OrderedDict[tuple[str, str], tuple[Coming, int]] = OrderedDict()
        self._memory = PinnedMemory(waiting, spare)
        self._waiting: dict[tuple[str, str], list[Tensor | None]] = {}

    def get(
        self, key: tuple[str, str], read: Callable[[], tuple[Tensor, Tensor | None]], device: torch.device
    ) -> Coming:
        """What is kept by that name; else what `read` gives, on its way to the device."""
        if key not in self.kept:
            waiting = self._waiting.get(key) or self._read(key, read)
            size = sum(each.nbytes for each in waiting if each is not None)
            self.held += size
            while self.held > self.most and self.kept:
                gone, left = self.kept.popitem(last=False)[1]
                gone.here()  # its room is written to until then
                self.held -= left
            self.kept[key] = Coming(waiting, device), size
        self.kept.move_to_end(key)
        return self.kept[key][0]

    def _read(self, key: tuple[str, str], read: Callable[[], tuple[Tensor, Tensor | None]]) -> list[Tensor | None]:
        weight, bias = read()
        if (pinned := self._memory.keep(weight)) is not None:
            self._waiting[key] = [pinned, bias]
            return self._waiting[key]
        return [weight, bias]


class GridRefits(Refits):
    """Refitted output weights at the widths of a grid.

    Memory: on the device what `cache` keeps, which several may share; all others where `files` has them.

    Args:
        name_of: What the refits of a layer are called among the files.
    """

    def __init__(
        self,
        files: TensorFiles,
        ranking: Ranking,
        device: torch.device | str,
        cache: RefitCache | None = None,
        name_of: Callable[[int], str] = layer_name,
    ) -> None:
        self._ranking = ranking
        self._files = files
        self._device = torch.device(device)
        self.cache = RefitCache() if cache is None else cache
        self._name_of = name_of

    @property
    def ranking(self) -> Ranking:
        return self._ranking

    def named(self, name_of: Callable[[int], str]) -> "GridRefits":
        """Others of the same files, on the same device, in the same cache."""
        return GridRefits(self._files, self._ranking, self._device, self.cache, name_of)

    def weight(self, layer: int, block: Block, units: int) -> Tensor:
        """The `hidden_size x block.columns_at(units)` weight whose columns follow the ranking.

        Raises:
            InvalidArchitecture: The width is not on the grid.
        """
        weight = self._of(layer, block, units).here()[0]
        assert weight is not None
        return weight

    def bias(self, layer: int, block: Block, units: int) -> Tensor | None:
        """The `hidden_size` bias that goes with it; None where the dense one, if any, stays.

        Raises:
            InvalidArchitecture: As `weight`.
        """
        return self._of(layer, block, units).here()[1]

    def expect(self, layer: int, block: Block, units: int) -> None:
        """Begin to bring what `weight` and `bias` will be asked for."""
        self._of(layer, block, units)

    def _of(self, layer: int, block: Block, units: int) -> Coming:
        name, key = self._name_of(layer), key_of(block.kind, units)

        def read() -> tuple[Tensor, Tensor | None]:
            kept = self._files.get(name) or {}
            if key not in kept:
                known = sorted(int(name.split(".")[1]) for name in kept if name.startswith(f"{block.kind}."))
                told = [width_text(width) if lacking_of(width) else width for width in known] or "none"
                raise InvalidArchitecture(
                    f"Layer {layer} has no refit for {width_text(units)} of {block.kind}: expected one of {told}."
                )
            return kept[key], kept.get(f"bias.{key}")

        return self.cache.get((name, key), read, self._device)


def fit(
    model: PreTrainedModel,
    windows: Tensor,
    widths: Mapping[BlockKind, Sequence[int]] | None,
    files: TensorFiles,
    ridge: Ridge = RIDGE,
    order: Order = "surgeon",
    scored: int | None = None,
    batch_size: int | None = None,
    on_layer: Callable[[int], None] | None = None,
    cache: RefitCache | None = None,
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
        batch_size: Windows, by default `pruning.walk.windows_at_once`.
        on_layer: Called with the number of layers done, out of `steps(...)`.
        cache: For refits that are asked for.
        queries: Whether query heads are ranked too, which widths that lack some of them need.
    """
    anatomy, device = anatomy_of(model), device_of(model)
    batch_size = batch_size or windows_at_once(device, windows.shape[1], few=2)
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
    return Fitted(statistics, ranking, None if widths is None else GridRefits(files, ranking, device, cache))


def names_of(anatomy: Anatomy) -> list[str]:
    """All that `fit` puts into its files."""
    return [*map(layer_name, range(anatomy.num_hidden_layers)), STATISTICS]


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
        factor_of = partial(_factor_of, gram, mean, output, ridge, tokens)
        solved |= solve_widths(block, widths[block.kind], heads, factor_of, output.weight)
    return solved


def _factor_of(
    gram: Tensor, mean: Tensor, output: Projection, ridge: Ridge, tokens: int, columns: Tensor, last: bool
) -> Factor:
    return Factor.of(gram if last else gram.clone(), mean, output, columns, ridge, tokens)


def solve_widths(
    block: Block, widths: Sequence[int], heads: Tensor, factor_of: Callable[[Tensor, bool], Factor], like: Tensor
) -> dict[str, Tensor]:
    """The refits of one block to all widths of a grid, on the CPU, in the dtype of `like`.

    Args:
        heads: All query heads of the block, sorted, unit by unit; in an MLP its units.
        factor_of: Factors the block's moments with columns in that order, and is told when for the last time.
    """
    solved: dict[str, Tensor] = {}
    wanted = sorted(({*widths} - {0, block.units}), key=lacking_of, reverse=True)
    for lacking, some in groupby(wanted, lacking_of):  # one order of columns, and so one factor, for each
        by_unit = heads.view(block.units, block.queries)
        first = torch.cat([part.flatten() for part in by_unit.split([block.queries - lacking, lacking], dim=1)])
        columns = expand_units(first, block.columns_per_unit // block.queries)
        widths_now = list(some)
        factor = factor_of(columns, widths_now[-1] == wanted[-1])
        for width in widths_now:
            weight, bias = factor.solve(block.columns_at(width))
            solved[key_of(block.kind, width)] = weight.to(like).cpu().contiguous()
            if bias is not None:
                solved[f"bias.{key_of(block.kind, width)}"] = bias.to(like).cpu().contiguous()
    return solved


def _expected(
    anatomy: Anatomy, layer: nn.Module, widths: Mapping[BlockKind, Sequence[int]], ridge: Ridge, queries: bool
) -> dict[str, Tensor]:
    """Names, shapes and dtypes of what `_solved` gives, on the meta device."""
    expected = expected_widths(anatomy, layer, widths, ridge)
    for block in anatomy.blocks:
        expected[f"order.{block.kind}"] = torch.empty(block.units, dtype=torch.int32, device="meta")
        if queries and block.kind == "attention":
            expected["order.heads"] = torch.empty(block.units * block.queries, dtype=torch.int32, device="meta")
    return expected


def expected_widths(
    anatomy: Anatomy, layer: nn.Module, widths: Mapping[BlockKind, Sequence[int]], ridge: Ridge
) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a layer's refits, on the meta device."""
    expected: dict[str, Tensor] = {}
    for block in anatomy.blocks:
        output = block.output_of(layer)
        empty = partial(torch.empty, dtype=output.weight.dtype, device="meta")
        for width in {*widths[block.kind]} - {0, block.units}:
            expected[key_of(block.kind, width)] = empty(anatomy.hidden_size, block.columns_at(width))
            if output.bias is not None and ridge.biases:
                expected[f"bias.{key_of(block.kind, width)}"] = empty(anatomy.hidden_size)
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
