"""What training brought, as a Markdown table: means over seeds, with half-widths of 95 % intervals where there are several."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import t as student

Entry = Mapping[str, Any]


def table(entries: Mapping[str, Entry]) -> str:
    """A row for each share and method, over the seeds that have it. Brackets hold what came back of what pruning had cost.

    Args:
        entries: By `SEED SHARE METHOD`, as the result file has them.
    """
    rows = list(dict.fromkeys(tuple(key.split()[1:]) for key in entries))
    if not rows:
        return "Nothing is finished yet."
    names = [name for name, _ in _measures(next(iter(entries.values())))]
    lines = [f"| share | trained | seeds | seconds | tokens | {' | '.join(names)} |", "|---" * (5 + len(names)) + "|"]
    for share, method in rows:
        seeds = [key.split()[0] for key in entries if key.split()[1:] == [share, method]]
        own = [entries[f"{seed} {share} {method}"] for seed in seeds]
        cells = []
        for name in names:
            values = [dict(_measures(entry))[name] for entry in own]
            cells.append(_mean(values) + _returned(entries, seeds, share, name, values))
        seconds, tokens = (sum(entry.get(what, 0) for entry in own) / len(own) for what in ("seconds", "tokens"))
        lines.append(f"| {share} | {method} | {len(own)} | {seconds:.0f} | {tokens:.0f} | {' | '.join(cells)} |")
    curves = [
        f"{key}: " + ", ".join(f"{step} {value:.4f}" for step, value in entry["history"])
        for key, entry in entries.items()
        if "history" in entry
    ]
    return "\n".join([*lines, "", "Validation KL by step:", *curves])


def _measures(entry: Entry) -> Iterator[tuple[str, float]]:
    for name, value in entry["texts"].items():
        yield f"KL {name}", value["kl"]
        yield f"perplexity {name}", math.exp(value["loss"])
    for name, value in entry["items"].items():
        yield name, value["acc"]


def _mean(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.4g}"
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:.4g} ± {student.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values)):.2g}"


def _returned(entries: Mapping[str, Entry], seeds: Sequence[str], share: str, name: str, after: Sequence[float]) -> str:
    """Of the distance between the dense model and the untrained one, the share that training took back."""
    found = []
    for seed in seeds:
        dense, before = (entries.get(f"{seed} {which} none") for which in ("1", share))
        if dense is None or before is None or share == "1":
            return ""
        found.append((dict(_measures(dense))[name], dict(_measures(before))[name]))
    lost = sum(before - dense for dense, before in found)
    won = sum(before for _, before in found) - sum(after)
    return f" ({won / lost:+.0%})" if lost and won else ""
