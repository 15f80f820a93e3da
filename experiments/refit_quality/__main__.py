"""What better refits gain: KL from the dense model on text that no part of the pipeline saw, four steps apart, same architectures.

    python -m experiments.refit_quality --text text:path/to/wikitext2-valid.txt
    python -m experiments.refit_quality --show
    python -m experiments.refit_quality --curve 8192,16384,32768,65536,131072 --out curve.json --picture tokens.svg
    python -m experiments.refit_quality --bases --text text:path/to/wikitext2-valid.txt --out bases.json

Steps: the table of the first version (16,384 tokens, ridge 0.03 of the mean, units by activation energy), the same with today's ridge,
with today's order of units (`pruning.surgeon`), with four times the tokens, and in sequence on those; or, as a curve, today's table and
refits in sequence at several numbers of tokens; or, as bases, today's table and what a search could put in its place before it begins:
other ridges, the other order, and built-in text among the calibration tokens or beside them. All are judged on the same windows. A seed
deals out the windows that calibrate and those that judge. Architectures are members of the allocation path that a run on the built-in
text prepares. Every figure is stored as soon as it is known, and what is stored is not measured anew, unless its step has another order
of units now.
"""

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from experiments.quiet import Quiet
from llmbo.comparison.problems import undo_spacing
from llmbo.comparison.statistics import band
from llmbo.config import RunConfig
from llmbo.models.aliases import cache_dir
from llmbo.models.loading import LoadedModel, load_model
from llmbo.models.placement import DTYPES
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import prepared
from llmbo.problem.texts import load_windows
from llmbo.report.picture import COLORS, MARKERS, as_svg
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS
from pruning.calibration import cut_windows
from pruning.compensation import FIRST_RIDGE, RIDGE, Ridge
from pruning.refits import Order, fit
from pruning.sequential import sequential_refit
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.text import Text, read_text

SHARES = (0.8, 0.65, 0.5)
WINDOW = 256
TOKENS = 16_384


class Step(NamedTuple):
    """What a table is made by.

    Args:
        tokens: Of the ranking and the refits.
        ridge: Of the table.
        order: Of the units.
        builtin: How many of the tokens are of the built-in text, in place of the one that is judged by.
    """

    tokens: int
    ridge: Ridge
    order: Order
    builtin: int = 0

    @property
    def own(self) -> int:
        """Tokens of the text that is judged by."""
        return self.tokens - self.builtin


STEPS = {
    "first version": Step(TOKENS, FIRST_RIDGE, "activation"),
    "ridge": Step(TOKENS, RIDGE, "activation"),
    "order": Step(TOKENS, RIDGE, "surgeon"),
    "tokens": Step(4 * TOKENS, RIDGE, "surgeon"),
    "sequence": Step(4 * TOKENS, RIDGE, "surgeon"),
}
OUT = Path(__file__).with_name("smollm2.json")


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default="builtin")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="figures are of one; auto takes the faster here"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", default=",".join(map(str, SHARES)), help="by commas")
    parser.add_argument("--judged", type=int, default=32, help="windows to judge by")
    parser.add_argument("--steps", default=",".join(STEPS), help="by commas")
    parser.add_argument("--curve", help="numbers of tokens by commas, in place of the steps")
    parser.add_argument("--bases", action="store_true", help="what a search could begin with, in place of the steps")
    parser.add_argument("--picture", type=Path, help="draw the curve here, as SVG")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so many")
    parser.add_argument("--out", type=Path, help=f"{OUT.name} beside this, of the steps")
    parser.add_argument("--show", action="store_true", help="print what is stored, measure nothing")
    options = parser.parse_args()
    if options.curve and options.bases:
        parser.error("--curve and --bases take the place of the steps: give one of them")
    if (options.curve or options.bases) and not options.out:
        parser.error(f"{OUT.name} holds figures of the steps: give --out")
    if options.bases and options.text == "builtin":
        parser.error("--bases puts built-in text among the calibration tokens: give another --text to judge by")
    if options.picture and not options.curve:
        parser.error("--picture draws a --curve: give one")
    options.out = options.out or OUT
    if options.curve or options.bases:
        steps = curve(map(int, options.curve.split(","))) if options.curve else bases()
        STEPS.clear()
        STEPS.update(steps)
        options.steps = ",".join(STEPS)
    stored = read(options.out)
    if not options.show:
        measure(options, stored)
    show(stored)
    if options.picture:
        options.picture.write_bytes(drawn(stored))


def curve(tokens: Iterable[int]) -> Iterator[tuple[str, Step]]:
    """Steps in pairs: a table, and refits in sequence."""
    for number in tokens:
        for kind in ("table", "sequence"):
            yield f"{kind} {number}", Step(number, RIDGE, "surgeon")


def bases() -> Iterator[tuple[str, Step]]:
    """Today's table first, then one thing changed at a time."""
    base = Step(TOKENS, RIDGE, "surgeon")
    yield "base", base
    for times in (0.5, 2.0, 4.0):
        yield f"{times:g} x ridge", base._replace(ridge=Ridge(times=times))
    yield "by energy", base._replace(order="activation")
    for part in (4, 2):
        yield f"1 in {part} built-in", base._replace(builtin=TOKENS // part)
    yield "built-in beside", base._replace(tokens=2 * TOKENS, builtin=TOKENS)


def read(out: Path) -> dict[str, Any]:
    """What is stored, without figures of a step that now has another order of units: those that name none are by energy."""
    stored: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}

    def stands(key: str, figure: dict[str, Any]) -> bool:
        return bool(figure.get("order", "activation") == STEPS[key.split("/")[2]].order)

    return stored | {"figures": {key: one for key, one in stored.get("figures", {}).items() if stands(key, one)}}


def measure(options: argparse.Namespace, stored: dict[str, Any]) -> None:
    """Fill `stored`, and its file after each figure."""
    start = time.monotonic()
    loaded = load_model(options.model, options.dtype)
    text = read_text(options.text)
    text = Text(text.source, undo_spacing(text.content))
    facts = {"model": loaded.fingerprint, "text": text.sha256, "judged": options.judged, "torch": torch.__version__}
    most = max(step.own for step in STEPS.values())
    most_builtin = max(step.builtin for step in STEPS.values())
    if most != 4 * TOKENS:  # windows are dealt out for the most demanding step
        facts["calibration"] = most
    if stored.setdefault("facts", facts) != facts:
        raise SystemExit(f"'{options.out}' holds figures of {stored['facts']}, not of {facts}: give another --out.")
    figures: dict[str, Any] = stored["figures"]

    def keep() -> None:  # beside other processes that do the same
        figures.update(read(options.out)["figures"] | figures)
        options.out.write_text(json.dumps(stored, indent=1) + "\n")

    if "architectures" not in stored:
        stored["architectures"] = {f"{share}": one.to_dict() for share, one in path_members(options.model, loaded)}
        keep()
    architectures = {name: Architecture.from_dict(one) for name, one in stored["architectures"].items()}
    for seed in range(options.seeds):
        counts = {"calibration": most // WINDOW, "proxy": 0, "heldout": options.judged}
        windows = cut_windows(text, loaded.tokenizer, counts, WINDOW, seed)
        builtin = windows.calibration[:0]
        if most_builtin:
            counts = {"calibration": most_builtin // WINDOW, "proxy": 0, "heldout": 0}
            builtin = cut_windows(read_text("builtin"), loaded.tokenizer, counts, WINDOW, seed).calibration
        for step in options.steps.split(","):
            missing = {s: architectures[s] for s in options.shares.split(",") if f"{seed}/{s}/{step}" not in figures}
            if not missing or time.monotonic() - start > 60 * options.minutes:
                continue
            folder = cache_dir() / "refit_quality" / f"{loaded.fingerprint}-{text.sha256[:8]}-{seed}"
            calibration = calibration_of(STEPS[step], windows.calibration, builtin)
            with opened(STEPS[step], loaded, calibration, architectures, folder) as supernet:
                dense = supernet.distribution(windows.heldout)
                for share, architecture in missing.items():
                    if time.monotonic() - start > 60 * options.minutes:
                        break
                    before, used = time.monotonic(), supernet
                    if step.startswith("sequence"):
                        used = supernet.using(sequential_refit(supernet, architecture, calibration))
                    seconds = time.monotonic() - before
                    quality = used.quality(architecture, windows.heldout, dense)
                    figure = {"kl": quality.kl, "loss": quality.loss, "seconds": seconds, "order": STEPS[step].order}
                    figures[f"{seed}/{share}/{step}"] = figure
                    keep()
                    print(f"seed {seed}, share {share}, {step}: KL {quality.kl:.4f} ({seconds:.0f} s)", flush=True)


def path_members(model: str, loaded: LoadedModel) -> Iterator[tuple[float, Architecture]]:
    """Share -> the allocation path's member there, as a run of the first version's size prepares it."""
    config = RunConfig(model=model, window=WINDOW, calibration_tokens=TOKENS, recipe="dense-prices")
    with prepared(config, loaded, load_windows(config, loaded), Quiet()) as problem:
        for share in SHARES:
            yield share, problem.space.decode(problem.family.at(share))


def calibration_of(step: Step, own: Tensor, builtin: Tensor) -> Tensor:
    """A step's windows of either text, `n x WINDOW`."""
    return torch.cat([own[: step.own // WINDOW], builtin[: step.builtin // WINDOW]])


@contextmanager
def opened(
    step: Step, loaded: LoadedModel, calibration: Tensor, architectures: dict[str, Architecture], folder: Path
) -> Iterator[Supernet]:
    """The supernet with a step's ranking and table of these windows, which are kept in a folder."""
    widths = {kind: sorted({w for one in architectures.values() for w in one.units(kind)}) for kind in BLOCK_KINDS}
    files = TensorFiles(folder / f"{step.own}-{step.builtin}-{step.ridge.share}-{step.ridge.times:g}-{step.order}")
    fitted = fit(loaded.model, calibration, widths, files, step.ridge, step.order, scored=0)
    with Supernet(loaded.model, fitted.ranking, fitted.refits) as supernet:
        yield supernet


def show(stored: dict[str, Any]) -> None:
    """A row for each share: means over seeds, and each step's ratio to the first with its Student-t interval over seeds."""
    print("| share | " + " | ".join(STEPS) + " |\n|" + "---|" * (1 + len(STEPS)))
    for share in stored.get("architectures", {}):
        print(f"| {share} | " + " | ".join(cell(stored["figures"], share, step) for step in STEPS) + " |")


def drawn(stored: dict[str, Any]) -> bytes:
    """The stored figures of a curve as an SVG: KL against tokens, means over the seeds, a line for each kind of refits and share."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[str, str], dict[int, list[float]]] = {}
    for key, one in stored["figures"].items():
        _, share, step = key.split("/")
        kind, tokens = step.split()
        lines.setdefault((kind, share), {}).setdefault(int(tokens), []).append(one["kl"])
    for index, ((kind, share), found) in enumerate(sorted(lines.items(), reverse=True)):
        style = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        tokens = sorted(found)
        label = f"{share} of the blocks, " + ("in sequence" if kind == "sequence" else "table")
        axes.plot(tokens, [mean(found[number]) for number in tokens], label=label, **style)
    every = sorted({number for found in lines.values() for number in found})
    axes.set_xscale("log", base=2)
    axes.set_xticks(every, [f"{number:,}" for number in every])
    axes.set(xlabel="calibration tokens", ylabel="KL from the dense model (nats per token)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    return as_svg(figure)


def cell(figures: dict[str, Any], share: str, step: str) -> str:
    """Mean KL over the seeds that know it, and its ratio to the first step's."""
    first, found = (
        {key.split("/")[0]: one["kl"] for key, one in figures.items() if key.split("/")[1:] == [share, name]}
        for name in (next(iter(STEPS)), step)
    )
    both = sorted(first.keys() & found.keys())
    if not both:
        return "-"
    average, ratio = mean(found[seed] for seed in both), band([found[seed] / first[seed] for seed in both])
    interval = "one seed" if ratio.low is None or ratio.high is None else f"{ratio.low:.3f} to {ratio.high:.3f}"
    return f"{average:.3f}" if first == found else f"{average:.3f}: {ratio.mean:.3f} ({interval})"


if __name__ == "__main__":
    main()
