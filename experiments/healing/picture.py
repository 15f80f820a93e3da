"""The validation curves of `experiments.healing` as a picture: KL against steps, at each share, by cut and by what was trained.

    python -m experiments.healing.picture healing.json --out healing.svg

Several files of the same settings are taken together. Lines are means over seeds.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

from experiments.healing.table import Entry, Key
from llmbo.report.picture import COLORS, MARKERS, as_svg

Curves = dict[tuple[str, str], dict[int, list[float]]]  # KL of the seeds by step, by cut and method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results of experiments.healing")
    parser.add_argument("--out", type=Path, default=Path("healing.svg"))
    options = parser.parse_args()
    options.out.write_bytes(drawn(read(options.files)))


def read(files: Sequence[Path]) -> dict[str, Entry]:
    """All entries.

    Raises:
        SystemExit: The files are of different settings.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    for file, one in zip(files, found, strict=True):
        if one["settings"] != found[0]["settings"]:
            raise SystemExit(f"'{file}' holds results of other settings than '{files[0]}': draw each by itself.")
    return {key: entry for one in found for key, entry in one["entries"].items()}


def curves(entries: Mapping[str, Entry]) -> dict[str, Curves]:
    """By share, of the models that were cut."""
    found: dict[str, Curves] = {}
    for key, entry in entries.items():
        _, share, method, *cut = key.split()
        if "history" in entry and share != "1":
            line = found.setdefault(share, {}).setdefault((Key("", share, method, *cut).cut, method), {})
            for step, value in entry["history"]:
                line.setdefault(step, []).append(value)
    return found


def drawn(entries: Mapping[str, Entry]) -> bytes:
    """An SVG."""
    found = curves(entries)
    if not found:
        raise SystemExit("Nothing was trained yet: there is no curve to draw.")
    methods = {method for lines in found.values() for _, method in lines}
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for axes, (share, lines) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for index, ((cut, method), line) in enumerate(sorted(lines.items())):
            steps, seeds = sorted(line), min(map(len, line.values()))
            label = f"{cut}{f', {method}' * (len(methods) > 1)} ({seeds} seed{'s' * (seeds > 1)})"
            style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 4}
            axes.plot(steps, [mean(line[step]) for step in steps], label=label, **style)
        axes.set(
            title=f"{share} of the blocks", xlabel="steps", ylabel="validation KL (nats per token)", ylim=(0, None)
        )
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return as_svg(figure)


if __name__ == "__main__":
    main()
