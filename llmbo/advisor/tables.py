"""What is known of every block, as tables of small integers: a row for each layer, one table for attention and one for MLPs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.advisor.context import Context, z_scores
from llmbo.problem.family import Expansions
from pruning.block import BLOCK_KINDS, BlockKind

NAMES: dict[BlockKind, str] = {"attention": "kv", "mlp": "neurons"}
SHARES = 6  # sizes at which the path is told
PRICED: dict[BlockKind, Sequence[float]] = {
    "attention": (0, 0.5, 1),
    "mlp": (0, 0.25, 0.5, 0.75, 1),
}  # parts of a block's height
MOST = 99  # of a price in tenths
BY_SIZE = 0.5**0.5  # the share at which what a recipe says `by_size` counts for nothing
Columns = tuple[str, str, list[list[str]]]  # name, places, and cells by layer


@dataclass(frozen=True)
class Table:
    """`names`: of the columns, each of which has as many cells as `header` has places behind it."""

    names: tuple[str, ...]
    header: str
    rows: tuple[str, ...]


def block_tables(context: Context) -> list[Table]:
    """Attention's and the MLPs'; nothing if the context's level tells no tables."""
    return [_table(context, kind) for kind in BLOCK_KINDS] if "tables" in context.setting.tells else []


def _table(context: Context, kind: BlockKind) -> Table:
    order, columns = context.setting.order, list(_columns(context, kind))
    heads = [f"{name}{places}" for name, places, _ in columns]
    rows = [
        " | ".join([str(layer), *(" ".join(cells[order[layer]]) for _, _, cells in columns)])
        for layer in range(len(order))
    ]
    return Table(tuple(name for name, _, _ in columns), " | ".join([f"{NAMES[kind]} layer", *heads]), tuple(rows))


def _columns(context: Context, kind: BlockKind) -> Iterator[Columns]:
    family, marginals, statistics = context.setting.family, context.marginals, context.setting.statistics
    space, prices, expansions = family.space, family.prices, family.expansions
    L = space.num_layers
    own = slice(0, L) if kind == "attention" else slice(L, 2 * L)
    if prices is not None:
        top = int(space.bounds[1, own.start])
        levels = sorted({max(1, round(top * part)) for part in PRICED[kind]})
        share = torch.tensor([BY_SIZE], dtype=torch.float64)
        logs = prices.log_prices_of(family.recipe, share)[0, own]
        yield "price", _at(levels), _integers(10 * logs[:, [level - 1 for level in levels]].T)
    low = float(family.shares[0])
    members = list(dict.fromkeys(family.at(low + (1 - low) * part / SHARES) for part in range(SHARES)))
    points = torch.tensor(members, dtype=torch.float64)
    yield "keeps", _at(_shares(space.share(points))), _integers(points[:, own])
    if prices is not None and len(prices.anchors) > 1:
        yield "dearer", _at(_shares(prices.anchors[:-1])), _integers(10 * prices.corrections[:-1, own])
    if expansions is not None and len(expansions.shares) > 1:
        middle = (len(expansions.shares) - 1) // 2
        changes = [_text(column[own], 10000) for column in _less_and_more(expansions, middle, space.bounds[1])]
        yield "less,more", _at(_shares(expansions.shares[middle : middle + 1])), _by_layer(changes)
    if marginals is not None:
        there = _shares(space.share(torch.tensor([marginals.x], dtype=torch.float64)))
        yield "lost,has", _at(there), _by_layer([_text(marginals.cost[own], 10000), [str(x) for x in marginals.x[own]]])
    if statistics is not None and prices is None:  # prices are made of what it knows
        scores = {"taylor": statistics.taylor, "act": statistics.activation, "infl": statistics.influence}
        told = {
            name: _text(z_scores(score[kind]), 10)
            for name, score in scores.items()
            if (kind, name) != ("attention", "act")
        }
        yield ",".join(told), "", _by_layer(list(told.values()))


def _less_and_more(expansions: Expansions, member: int, top: Tensor) -> tuple[list[float | None], list[float | None]]:
    """What a level less and a level more of each block alone change there, nats; None where there is no such level."""
    changes = expansions.changes[member]
    levels = changes.abs().argmin(-1)  # where the member stands nothing changes
    rows = range(len(levels))
    less = [float(changes[i, levels[i] - 1]) if levels[i] > 0 else None for i in rows]
    more = [float(changes[i, levels[i] + 1]) if levels[i] < top[i] else None for i in rows]
    return less, more


def _at(places: Sequence[object]) -> str:
    return f"@{','.join(map(str, places))}"


def _shares(shares: Tensor) -> list[str]:
    return [f"{share:.2f}" for share in shares.tolist()]


def _integers(columns: Tensor) -> list[list[str]]:
    """`columns x layers` numbers as cells by layer."""
    return [[str(round(max(-MOST, min(MOST, value)))) for value in row] for row in columns.T.tolist()]


def _text(values: Sequence[float | None], scale: float) -> list[str]:
    return ["?" if value is None else str(round(scale * value)) for value in values]


def _by_layer(columns: Sequence[Sequence[str]]) -> list[list[str]]:
    return [list(cells) for cells in zip(*columns, strict=True)]
