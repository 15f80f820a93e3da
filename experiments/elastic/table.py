"""Which arm is better, as a Markdown table: KL at each share and hypervolume over all of them, means over seeds with 95 % intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmbo.comparison.statistics import band
from llmbo.search.pareto import hypervolume


def table(entries: Mapping[str, Any], shares: Sequence[str]) -> str:
    """A row for each text and arm, over the seeds that have it at all shares; `one` is beside the others as they were.

    Args:
        entries: By `SEED SHARE ARM`, as the result file has them.
    """
    found: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # text and arm: seed: KL by share
    for key, entry in entries.items():
        seed, share, arm = key.split()
        for text, judged in entry["texts"].items():
            found.setdefault((text, arm), {}).setdefault(seed, {})[share] = judged["kl"]
    titles = ["text", "arm", "seeds", *(f"KL at {share}" for share in shares), "hypervolume"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for (text, arm), seeds in sorted(found.items()):
        if arm == "one":
            seeds = {seed: {**found.get((text, "none"), {}).get(seed, {}), **healed} for seed, healed in seeds.items()}
        whole = [by_share for by_share in seeds.values() if set(shares) <= by_share.keys()]
        if not whole:
            continue
        worst = max(
            kl for (other, _), own in found.items() if other == text for one in own.values() for kl in one.values()
        )
        volumes = [volume({share: one[share] for share in shares}, worst) for one in whole]
        cells = [_mean([one[share] for one in whole]) for share in shares]
        lines.append(f"| {' | '.join([text, arm, str(len(whole)), *cells, _mean(volumes)])} |")
    return "\n".join(lines) if len(lines) > 2 else "No arm is finished at all shares yet."


def volume(kl: Mapping[str, float], worst: float) -> float:
    """What models of these shares dominate, up to the dense model's size and the worst KL that any arm has; more is better, 1 is all."""
    points = torch.tensor([[-float(share), -value / worst] for share, value in kl.items()], dtype=torch.float64)
    return hypervolume(points, torch.tensor([-1.0, -1.0], dtype=torch.float64))


def _mean(values: Sequence[float]) -> str:
    own = band(values)
    return f"{own.mean:.4f}" if own.high is None else f"{own.mean:.4f} ± {own.high - own.mean:.4f}"
