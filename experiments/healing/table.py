"""What training brought, as a Markdown table: means over seeds, with half-widths of 95 % intervals where there are several."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.stats import t as student

Entry = Mapping[str, Any]


OURS = "llmbo"


class Key(NamedTuple):
    """Of an entry. As text `SEED SHARE METHOD`, and the cut behind it where it is another's."""

    seed: str
    share: str
    method: str
    cut: str = OURS

    def __str__(self) -> str:
        return " ".join(self if self.cut != OURS else self[:-1])


def table(entries: Mapping[str, Entry]) -> str:
    """A row for each share, cut and method, over the seeds that have it. Brackets hold what came back of what pruning had cost.

    Args:
        entries: By `Key`, as the result file has them.
    """
    found = {Key(*key.split()): entry for key, entry in entries.items()}
    rows = list(dict.fromkeys(key[1:] for key in found))
    if not rows:
        return "Nothing is finished yet."
    names = [name for name, _ in _measures(next(iter(found.values())))]
    titles = ["share", "cut", "trained", "seeds", "seconds", "tokens", *names]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        keys = [key for key in found if key[1:] == row]
        own = [found[key] for key in keys]
        cells = []
        for name in names:
            values = [dict(_measures(entry))[name] for entry in own]
            cells.append(_mean(values) + _returned(found, keys, name, values))
        seconds, tokens = (sum(entry.get(what, 0) for entry in own) / len(own) for what in ("seconds", "tokens"))
        share, method, cut = row
        told = [share, cut if share != "1" else "", method, str(len(own)), f"{seconds:.0f}", f"{tokens:.0f}", *cells]
        lines.append(f"| {' | '.join(told)} |")
    curves = [
        f"{key!s}: " + ", ".join(f"{step} {value:.4f}" for step, value in entry["history"])
        for key, entry in found.items()
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


def _returned(entries: Mapping[Key, Entry], keys: Sequence[Key], name: str, after: Sequence[float]) -> str:
    """Of the distance between the dense model and the untrained one, the share that training took back."""
    found = []
    for key in keys:
        dense, before = entries.get(Key(key.seed, "1", "none")), entries.get(key._replace(method="none"))
        if dense is None or before is None or key.share == "1":
            return ""
        found.append((dict(_measures(dense))[name], dict(_measures(before))[name]))
    lost = sum(before - dense for dense, before in found)
    won = sum(before for _, before in found) - sum(after)
    return f" ({won / lost:+.0%})" if lost and won else ""
