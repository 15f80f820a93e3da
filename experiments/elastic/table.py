"""Which arm is better, as Markdown tables: KL at each share and hypervolume over all of them, and what changes against `none`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llmbo.comparison.statistics import band
from llmbo.search.pareto import hypervolume

Seeds = dict[str, list[float]]  # by seed: KL at each share, and hypervolume


def table(entries: Mapping[str, Any], shares: Sequence[str]) -> str:
    """A row for each text and arm: means over the seeds that have it at all shares, 95 % intervals; then changes against `none`, paired
    by seed. `one` is beside the others as they were.

    Args:
        entries: By `SEED SHARE ARM`, as the result file has them.
    """
    found = _found(entries, shares)
    if not found:
        return "No arm is finished at all shares yet."
    titles = [*(f"KL at {share}" for share in shares), "hypervolume"]
    lines = _lines(titles, found, _mean)
    changes: dict[tuple[str, str], Seeds] = {}
    for (text, arm), own in found.items():
        plain = found.get((text, "none"), {})
        pairs = {
            seed: [
                after / before - 1 if before else math.nan for after, before in zip(own[seed], plain[seed], strict=True)
            ]
            for seed in own.keys() & plain.keys()
        }
        if arm != "none" and pairs:
            changes[text, arm] = pairs
    if changes:
        lines += ["", "Against `none`, paired by seed:", "", *_lines(titles, changes, _percent)]
    return "\n".join(lines)


def _found(entries: Mapping[str, Any], shares: Sequence[str]) -> dict[tuple[str, str], Seeds]:
    """By text and arm, of the seeds that have all shares."""
    kl: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # text and arm: seed: KL by share
    for key, entry in entries.items():
        seed, share, arm = key.split()
        for text, judged in entry["texts"].items():
            kl.setdefault((text, arm), {}).setdefault(seed, {})[share] = judged["kl"]
    found: dict[tuple[str, str], Seeds] = {}
    for (text, arm), seeds in sorted(kl.items()):
        if arm == "one":
            seeds = {seed: {**kl.get((text, "none"), {}).get(seed, {}), **healed} for seed, healed in seeds.items()}
        worst = max(
            one for (other, _), own in kl.items() if other == text for by in own.values() for one in by.values()
        )
        for seed, by_share in seeds.items():
            if set(shares) <= by_share.keys():
                own = {share: by_share[share] for share in shares}
                found.setdefault((text, arm), {})[seed] = [*own.values(), volume(own, worst)]
    return found


def _lines(
    titles: Sequence[str], rows: Mapping[tuple[str, str], Seeds], told: Callable[[Sequence[float]], str]
) -> list[str]:
    head = ["text", "arm", "seeds", *titles]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (text, arm), seeds in rows.items():
        cells = map(told, zip(*seeds.values(), strict=True))
        lines.append(f"| {' | '.join([text, arm, str(len(seeds)), *cells])} |")
    return lines


def volume(kl: Mapping[str, float], worst: float) -> float:
    """What models of these shares dominate, up to the dense model's size and the worst KL that any arm has; more is better, 1 is all."""
    points = torch.tensor([[-float(share), -value / worst] for share, value in kl.items()], dtype=torch.float64)
    return hypervolume(points, torch.tensor([-1.0, -1.0], dtype=torch.float64))


def _mean(values: Sequence[float]) -> str:
    own = band(values)
    return f"{own.mean:.4f}" if own.high is None else f"{own.mean:.4f} ± {own.high - own.mean:.4f}"


def _percent(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return "–"
    own = band(values)
    return f"{own.mean:+.1%}" + ("" if own.high is None else f" ± {own.high - own.mean:.1%}")
