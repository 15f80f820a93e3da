"""What a candidate's evaluation costs and how well it orders candidates, side by side in one run.

    python -m experiments.proxy_cost --threads 2            # an hour or two; --quick: minutes, to try it

Cost: seconds per candidate by the supernet, against the obvious way (the Hugging Face model in float32, removed units
zeroed, full logits), against a freshly shrunk model in the supernet's dtype (with and without the cutting), and against
the floor: the linear layers of that candidate alone, at the rate measured here for their shapes. Medians after a warm-up.

Order: Kendall's tau of each proxy by number of tokens against float32 loss on many more held-out tokens, over
architectures of all sizes, over all pairs within 0.1 nats of each other, and among close neighbours of family members.

Growth: seconds by tokens and by parameters with straight lines fitted, and resident memory over many candidates, which
must not grow. Everything goes into proxy_cost.json and cost.png in --out.
"""

import argparse
import copy
import itertools
import json
import os
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.space import SearchSpace
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS
from pruning.calibration import TokenWindows, cut_windows
from pruning.compensation import CompensationTable
from pruning.cost import block_parameters
from pruning.importance import fisher
from pruning.likelihood import DenseDistribution, dense_distribution, quality, window_qualities
from pruning.masks import PruningMask, Ranking, masked
from pruning.shrinking import shrink
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet
from pruning.surgeon import surgeon_ranking
from pruning.text import read_text

BATCH = 4  # windows at a time, in every way
CLOSE = 0.1  # nats
MIN_SHARE = 0.3
GROWTH_BYTES = 16 << 20  # what the allocator may keep beyond the warm-up; one candidate's weights take more


def main() -> None:
    silence_libraries()
    options = _options()
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    full = load_model(options.model, "float32", "cpu")
    fast = load_model(options.model, options.dtype, "cpu")
    windows = _windows(options, full.tokenizer)
    collected = collect_statistics(full.model, windows.calibration)
    ranking = surgeon_ranking(full.model, collected)
    space = SearchSpace(anatomy_of(full.model), MIN_SHARE)
    family = ThresholdFamily.from_importance(space, fisher(collected))
    exact_table = CompensationTable(full.model, copy.deepcopy(collected), ranking)
    table = CompensationTable(fast.model, collected, ranking)
    table.fill({kind: widths[1:-1] for kind, widths in space.widths.items()})
    result: dict[str, Any] = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "dtype": fast.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "platform": platform.platform(),
    }
    rng = random.Random(options.seed)
    timed = [space.decode(family.at(float(share))) for share in np.linspace(MIN_SHARE, 1, options.timed)]
    result["cost"] = measure_cost(options, full.model, fast.model, ranking, table, windows.proxy, timed)
    with Supernet(fast.model, ranking, table) as supernet:
        dense = dense_distribution(fast.model, windows.proxy)
        result["growth"] = measure_growth(options, supernet, space, family, windows.proxy, dense)
        result["memory"] = measure_memory(options, supernet, space, family, windows.proxy, dense, rng)
        spread = [scattered(space, family, share, rng) for share in np.linspace(MIN_SHARE, 1, options.architectures)]
        groups = [neighbours(space, family.at(share), options.neighbours, rng) for share in (0.45, 0.6, 0.75)]
        points = [*spread, *itertools.chain(*groups)]
        seen = [_by_window(supernet, space, x, windows.proxy, dense) for x in points]
    with Supernet(full.model, ranking, exact_table) as supernet:
        truth = [supernet.loss(space.decode(x), windows.heldout) for x in _progress(points, "reference")]
    result["order"] = orders(options.window, seen, truth, [len(spread), *map(len, groups)])
    (options.out / "proxy_cost.json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(result, options.out / "cost.png")
    print(_tables(result))
    if result["memory"]["growth_bytes"] > GROWTH_BYTES:
        raise SystemExit(f"Resident memory grew by {result['memory']['growth_bytes']} bytes.")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest sizes that run through, to try it")
    quick = parser.parse_known_args()[0].quick

    def size(flag: str, usual: int, small: int, text: str) -> None:
        parser.add_argument(flag, type=int, default=small if quick else usual, help=f"{text} (default {usual})")

    parser.add_argument("--model", default="llama")
    parser.add_argument("--dtype", default="auto", help="of the supernet and the shrunk model")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    size("--window", 256, 64, "tokens per window")
    size("--calibration-tokens", 8192, 512, "for ranking and compensation")
    size("--proxy-tokens", 6144, 256, "most tokens of a proxy; it is also judged on 1/12, 1/6, 1/4 and 1/2 of them")
    size("--reference-tokens", 49152, 512, "held-out tokens of the float32 reference")
    size("--timed", 8, 2, "architectures whose cost is measured")
    size("--repeats", 5, 1, "repetitions of every timing")
    size("--architectures", 60, 6, "architectures of all sizes whose order is judged")
    size("--neighbours", 12, 3, "close neighbours of each of three family members")
    size("--evaluations", 500, 20, "candidates over which memory must not grow")
    parser.add_argument("--out", type=Path, default=Path("build/proxy_cost"))
    return parser.parse_args()


def _windows(options: argparse.Namespace, tokenizer: Any) -> TokenWindows:
    tokens = {
        "calibration": options.calibration_tokens, "proxy": options.proxy_tokens, "heldout": options.reference_tokens,
    }  # fmt: skip
    counts = {name: max(1, count // options.window) for name, count in tokens.items()}
    return cut_windows(read_text(options.text), tokenizer, counts, options.window, options.seed)


def scattered(space: SearchSpace, family: ThresholdFamily, share: float, rng: random.Random) -> tuple[int, ...]:
    """A legal point around the family's member of that size: every other block is moved by up to two levels."""
    while True:
        x = tuple(
            min(most, max(0, level + rng.choice((0, 0, 0, -2, -1, 1, 2))))
            for level, most in zip(family.at(float(share)), space.max_levels, strict=True)
        )
        if bool(space.legal(torch.tensor([x], dtype=torch.float64))):
            return x


def neighbours(space: SearchSpace, x: tuple[int, ...], n: int, rng: random.Random) -> list[tuple[int, ...]]:
    """`n` distinct points (fewer in a tiny space) that have a level or two moved between blocks of the same kind in `x`."""
    found: dict[tuple[int, ...], None] = {}
    for _ in range(100 * n):
        if len(found) == n:
            break
        moved = list(x)
        first = space.num_layers if rng.random() < 0.7 else 0
        steps = rng.choice(((-1, 1), (-1, -1, 1, 1)))
        for index, step in zip(rng.sample(range(first, first + space.num_layers), len(steps)), steps, strict=True):
            moved[index] += step
        if bool(space.legal(torch.tensor([moved], dtype=torch.float64))):
            found[tuple(moved)] = None
    return list(found)


def measure_cost(
    options: argparse.Namespace, full: PreTrainedModel, fast: PreTrainedModel, ranking: Ranking, table: CompensationTable,
    windows: Tensor, architectures: list[Architecture],
) -> list[dict[str, float]]:  # fmt: skip
    """Median seconds of each way for each architecture, on the proxy's default of half the windows."""
    windows = windows[: max(1, len(windows) // 2)]
    anatomy, supernet = anatomy_of(full), Supernet(fast, ranking, table)
    dense = dense_distribution(fast, windows)
    shapes = MatmulTimes(fast, options.repeats)
    rows = []
    for architecture in _progress(architectures, "cost"):
        mask = PruningMask.from_architecture(architecture, ranking)
        small = shrink(fast, mask, table)
        floor, flops = shapes.floor(anatomy, architecture, len(windows), windows.shape[1])

        def obvious(mask: PruningMask = mask) -> None:
            with masked(full, mask) as candidate, torch.no_grad():
                for batch in windows.split(BATCH):
                    logits = candidate(batch, use_cache=False).logits
                    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

        with supernet:
            supernet_seconds = _median(
                lambda a=architecture: supernet.quality(a, windows, dense, BATCH), options.repeats
            )
        ways: dict[str, Callable[[], object]] = {
            "obvious": obvious,
            "shrunk": lambda small=small: quality(small, windows, dense, BATCH),
            "cutting": lambda mask=mask: shrink(fast, mask, table),
        }
        seconds = {name: _median(way, options.repeats) for name, way in ways.items()}
        parameters = sum(parameter.numel() for parameter in small.parameters())
        rows.append({"parameters": parameters, "supernet": supernet_seconds, **seconds, "floor": floor, "flops": flops})
    return rows


class MatmulTimes:
    """Seconds of `rows x inputs @ inputs x outputs` in the model's dtype, measured once per shape."""

    def __init__(self, model: PreTrainedModel, repeats: int) -> None:
        self._dtype, self._repeats = model.dtype, repeats
        self._seconds: dict[tuple[int, int, int], float] = {}
        self._head = tuple(model.get_output_embeddings().weight.shape)

    def floor(self, anatomy: Anatomy, architecture: Architecture, count: int, length: int) -> tuple[float, float]:
        """Seconds and FLOPs of all linear layers of an architecture on `count` windows of `length` tokens."""
        shapes: Counter[tuple[int, int, int]] = Counter()
        batches = [BATCH] * (count // BATCH) + [count % BATCH] * (count % BATCH > 0)
        for batch in batches:
            for block in anatomy.blocks:
                for units in architecture.units(block.kind):
                    if units:
                        for rows in block.inputs.values():
                            shapes[batch * length, anatomy.hidden_size, units * rows.per_unit] += 1
                        shapes[batch * length, units * block.columns_per_unit, anatomy.hidden_size] += 1
            shapes[batch * (length - 1), self._head[1], self._head[0]] += 1
        seconds = sum(times * self._measured(shape) for shape, times in shapes.items())
        return seconds, 2.0 * sum(times * rows * i * o for (rows, i, o), times in shapes.items())

    def _measured(self, shape: tuple[int, int, int]) -> float:
        if shape not in self._seconds:
            rows, inputs, outputs = shape
            x, weight = torch.randn(rows, inputs).to(self._dtype), torch.randn(outputs, inputs).to(self._dtype)
            parts = x.split(256) if outputs > 8192 else (x,)  # of the head, by chunks, as everybody does it

            def multiply() -> None:
                for part in parts:
                    F.linear(part, weight)

            self._seconds[shape] = _median(multiply, max(3, self._repeats))
        return self._seconds[shape]


def measure_growth(
    options: argparse.Namespace, supernet: Supernet, space: SearchSpace, family: ThresholdFamily, windows: Tensor,
    dense: DenseDistribution,
) -> dict[str, list[tuple[float, float]]]:  # fmt: skip
    """(tokens, seconds) for one architecture and (parameters, seconds) for one number of tokens."""
    x = family.at(0.6)
    counts = sorted({max(1, round(len(windows) * part)) for part in (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)})

    def seconds(x: tuple[int, ...], count: int) -> float:
        part = dense.rows(0, count)
        return _median(lambda: supernet.quality(space.decode(x), windows[:count], part, BATCH), options.repeats)

    sizes = [family.at(float(share)) for share in np.linspace(MIN_SHARE, 1, max(3, options.timed))]
    half = max(1, len(windows) // 2)
    widths = [space.decode(x) for x in sizes]
    groups, neurons = (torch.tensor([a.units(kind) for a in widths]) for kind in BLOCK_KINDS)
    params = (space.anatomy.other_parameters + block_parameters(space.anatomy, groups, neurons)).tolist()
    return {
        "tokens": [(count * windows.shape[1], seconds(x, count)) for count in counts],
        "parameters": [(size, seconds(x, half)) for size, x in zip(params, sizes, strict=True)],
    }


def measure_memory(
    options: argparse.Namespace, supernet: Supernet, space: SearchSpace, family: ThresholdFamily, windows: Tensor,
    dense: DenseDistribution, rng: random.Random,
) -> dict[str, float]:  # fmt: skip
    """Resident bytes after a tenth of the candidates and after all, each another architecture, on one window."""
    resident = []
    for _ in _progress(range(options.evaluations), "memory"):
        x = scattered(space, family, rng.uniform(MIN_SHARE, 1), rng)
        supernet.quality(space.decode(x), windows[:1], dense.rows(0, 1))
        resident.append(_resident_bytes())
    tenth = max(1, len(resident) // 10)
    before, after = max(resident[:tenth]), max(resident[-tenth:])
    return {"candidates": len(resident), "before": before, "after": after, "growth_bytes": after - before}


def orders(
    window: int, seen: list[dict[str, Tensor]], truth: list[float], sizes: list[int]
) -> list[dict[str, float | str]]:
    """Kendall's tau of every proxy by tokens.

    Args:
        sizes: Of the groups that `seen` and `truth` list one after another: architectures of all sizes, then neighbours.
    """
    windows = len(seen[0]["loss"])
    counts = sorted({max(1, round(windows * part)) for part in (1 / 12, 1 / 6, 1 / 4, 1 / 2, 1)})
    edges = [0, *itertools.accumulate(sizes)]
    groups = [slice(first, last) for first, last in itertools.pairwise(edges)]
    rows: list[dict[str, float | str]] = []
    for name, count in itertools.product(("loss", "kl"), counts):
        proxy = [measured[name][:count].mean().item() for measured in seen]
        whole, *close = (float(kendalltau(proxy[group], truth[group]).statistic) for group in groups)
        rows.append(
            {
                "proxy": name,
                "tokens": count * window,
                "whole range": whole,
                f"within {CLOSE} nats": _close_tau(proxy, truth),
                "neighbours": statistics.mean(close),
            }
        )
    return rows


def _close_tau(proxy: list[float], truth: list[float]) -> float:
    """Kendall's tau over the pairs that the reference sets less than CLOSE apart."""
    signs = [
        np.sign((truth[i] - truth[j]) * (proxy[i] - proxy[j]))
        for i, j in itertools.combinations(range(len(truth)), 2)
        if 0 < abs(truth[i] - truth[j]) <= CLOSE
    ]
    return float(np.mean(signs)) if signs else float("nan")


def _by_window(
    supernet: Supernet, space: SearchSpace, x: tuple[int, ...], windows: Tensor, dense: DenseDistribution
) -> dict[str, Tensor]:
    with supernet.active(space.decode(x)) as model:
        found = window_qualities(model, windows, dense, BATCH)
    assert found.kl is not None
    return {"loss": found.loss, "kl": found.kl}


def _median(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _progress(items: Any, name: str) -> Iterator[Any]:
    for index, item in enumerate(items):
        print(f"\r{name} {index + 1}/{len(items)}", end="", flush=True)
        yield item
    print()


def _fit(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope, offset and R^2 of a straight line."""
    x, y = np.array(points).T
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset), float(1 - np.var(y - slope * x - offset) / np.var(y))


def _tables(result: dict[str, Any]) -> str:
    cost = result["cost"]
    lines = [
        "| parameters | supernet s | obvious / supernet | shrunk / supernet | with cutting | share of the floor | GFLOP/s |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for row in cost:
        own = row["supernet"]
        lines.append(
            f"| {row['parameters'] / 1e6:.1f}M | {own:.3f} | {row['obvious'] / own:.2f} | {row['shrunk'] / own:.2f} | "
            f"{(row['shrunk'] + row['cutting']) / own:.2f} | {row['floor'] / own:.0%} | {row['flops'] / own / 1e9:.0f} |"
        )
    means = [statistics.mean(row[way] / row["supernet"] for row in cost) for way in ("obvious", "shrunk", "floor")]
    lines.append(f"| mean | | {means[0]:.2f} | {means[1]:.2f} | | {means[2]:.0%} | |\n")
    names = list(result["order"][0])
    lines += ["Kendall's tau", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in result["order"]:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append(f"| {' | '.join(cells)} |")
    for name, points in result["growth"].items():
        slope, offset, r2 = _fit(points)
        lines.append(f"\nseconds = {offset:.3f} + {slope:.3g} x {name}, R^2 {r2:.3f}")
    memory = result["memory"]
    lines.append(f"\nresident memory over {memory['candidates']} candidates: {memory['growth_bytes'] / 1e6:+.1f} MB")
    return "\n".join(lines)


def _plot(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (name, points) in zip(axes, result["growth"].items(), strict=True):
        x, y = np.array(points).T
        slope, offset, r2 = _fit(points)
        axis.plot(x, y, "o")
        axis.plot(x, offset + slope * x, label=f"R² = {r2:.3f}")
        axis.set(xlabel=name, ylabel="seconds per candidate", ylim=(0, None), xlim=(0, None))
        axis.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
