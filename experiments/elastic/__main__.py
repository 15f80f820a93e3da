"""Train once and search after, or search and train each model? Quality at some sizes, at equal tokens.

    python -m experiments.elastic --out elastic.json --text python --judge builtin

Four arms at each share: `none` (cut and refitted in sequence), `elastic` (one adapter for all sizes, trained with --tokens before the
cut), `one` (each size healed with all of --tokens, as if no other was wanted) and `each` (--tokens divided among the sizes). A token
counts whenever it passes a model that learns, so the sandwich of two or three members sees fewer of the text. Finished entries are in
--out and are not done again by the same command. See README.md.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.quiet import Quiet
from llmbo.config import RunConfig
from llmbo.models.loading import LoadedModel, load_model
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.silence import silence_libraries
from llmbo.problem.elastic import adapted
from llmbo.problem.preparation import prepared
from llmbo.problem.texts import load_windows, searched
from llmbo.report.files import replace_file
from llmbo.training.elastic import WHOLE, Task, dealt_windows, train_elastic
from llmbo.training.lessons import Student, course_for
from llmbo.training.plan import Length, Plan
from llmbo.training.trainer import train
from pruning.architecture import Architecture
from pruning.calibration import fresh_windows
from pruning.likelihood import DenseDistribution, dense_distribution, quality
from pruning.masks import PruningMask
from pruning.sequential import sequential_refit
from pruning.shrinking import shrink
from pruning.text import read_text

PASSES = 2 + 1 / WHOLE  # of a window in a sandwich, on average
ARMS = ("none", "elastic", "one", "each")
Cut = tuple[PreTrainedModel, Architecture]


def main() -> None:
    silence_libraries()
    options = _options()
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "device", "seeds", "arms")}
    entries: dict[str, Any] = {}
    if options.out.is_file():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if found["settings"] != settings:
            raise SystemExit(f"'{options.out}' holds results of other settings: move it away, then run again.")
        entries = found["entries"]
    for seed in options.seeds:
        study = None
        for arm in options.arms:
            if all(f"{seed} {share} {arm}" in entries for share in options.shares):
                continue
            study = study or Study(options, seed)
            for share, entry in study.arm(arm).items():
                entries[f"{seed} {share} {arm}"] = entry
                judged = "  ".join(f"{name} {v['kl']:.4f} {v['loss']:.4f}" for name, v in entry["texts"].items())
                print(f"{seed} {share} {arm:8} {entry['seconds']:6.1f} s  {judged}", flush=True)
            replace_file(
                options.out, (json.dumps({"settings": settings, "entries": entries}, indent=1) + "\n").encode()
            )


class Study:
    """A seed's models and windows."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self._options, self._seed = options, seed
        device = choose_device(options.device)
        self._loaded = load_model(options.model, "float32", device)
        self._loaded.model.requires_grad_(False)
        self._dtype = choose_dtype(options.dtype, device, self._loaded.model.config)
        self._work = Path(tempfile.mkdtemp(prefix="elastic-"))
        self._task = Task(
            options.model, self._work / "adapter", options.text, options.window, options.validation,
            calibration_tokens=options.calibration, seed=seed, dtype=self._dtype, device=device,
        )  # fmt: skip
        self._config = self._task.config
        self._judged = self._judging()
        self._cuts = self._cut(self._config, self._loaded)

    def _judging(self) -> dict[str, tuple[Tensor, DenseDistribution]]:
        """Windows that nothing has seen by text, and what the dense model predicts there."""
        options, loaded, found = self._options, self._loaded, {}
        windows = load_windows(self._config, loaded)
        data = {"sha256": windows.sha256, "sources": [asdict(source) for source in windows.sources]}
        for source in options.judge:
            count, seen = options.judged // options.window, searched(self._config, data)
            fresh = fresh_windows(read_text(source), loaded.tokenizer, count, options.window, 0, seen).heldout
            found[source] = fresh, dense_distribution(loaded.model, fresh)
        return found

    def _cut(self, config: RunConfig, loaded: LoadedModel) -> dict[str, Cut]:
        """Every share's member of the path, refitted in sequence, in float32 on the CPU."""
        windows, cuts = load_windows(config, loaded), {}
        with prepared(config, loaded, windows, Quiet()) as problem:
            members = {share: problem.space.decode(problem.family.at(float(share))) for share in self._options.shares}
            refits = {s: sequential_refit(problem.supernet, a, windows.calibration) for s, a in members.items()}
        for share, architecture in members.items():
            mask = PruningMask.from_architecture(architecture, refits[share].ranking)
            cuts[share] = shrink(loaded.model, mask, refits[share]).cpu(), architecture
        return cuts

    def arm(self, arm: str) -> dict[str, dict[str, Any]]:
        """Entries by share."""
        options = self._options
        if arm == "elastic":
            return self._elastic()
        tokens = {"none": 0, "one": options.tokens, "each": options.tokens // len(options.shares)}[arm]
        return {share: self._healed(share, tokens) for share in options.shares}

    def _plan(self) -> Plan:
        options = self._options
        return Plan(0, options.batch, "lora", options.rank, options.lr, True, 0, 10**6, self._seed)

    def _elastic(self) -> dict[str, dict[str, Any]]:
        start, plan = time.perf_counter(), self._plan()
        length = Length(tokens=round(self._options.tokens / PASSES))
        told = train_elastic(self._task, plan, length, "python -m experiments.elastic", Quiet())
        seconds = time.perf_counter() - start
        config = replace(self._config, elastic=str(self._task.out))
        loaded = adapted(config, load_model(config.model, "float32", config.device))
        entries = {}
        for share, cut in self._cut(config, loaded).items():
            entries[share] = {"seconds": seconds, "history": told.progress.history, **self._judge(cut)}
        return entries

    def _healed(self, share: str, tokens: int) -> dict[str, Any]:
        model, architecture = copy.deepcopy(self._cuts[share][0]), self._cuts[share][1]
        nn.Module.to(model, self._loaded.device)
        seconds, history = 0.0, list[Any]()
        if tokens:
            loaded, plan, start = self._loaded, self._plan(), time.perf_counter()
            student = Student(model, loaded.tokenizer, loaded.device, self._dtype, loaded.model, architecture)
            work = self._work / f"{share}-{tokens}"
            windows, _ = dealt_windows(student, self._config, plan, self._options.validation, work)
            course = course_for(student, windows, plan, Length(tokens=tokens), work, Quiet(), self._work / "teacher")
            model, progress = train(model, course.lesson, course.plan, work, tell=print)
            seconds, history = time.perf_counter() - start, progress.history
        return {"seconds": seconds, "history": history, **self._judge((model, architecture))}

    def _judge(self, cut: Cut) -> dict[str, Any]:
        model, architecture = cut
        nn.Module.to(model, self._loaded.device)
        texts = {name: asdict(quality(model, *judged)) for name, judged in self._judged.items()}
        return {"params": model.num_parameters(), "architecture": architecture.to_dict(), "texts": texts}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--shares", nargs="+", default=["0.8", "0.65"], help="of the blocks' parameters")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--text", default="python", help="to cut, refit and train by; half of it is trained on")
    parser.add_argument("--judge", action="append", default=[], help="text to measure on; several are given one by one")
    parser.add_argument("--tokens", type=int, default=200_000, help="that pass a model in each arm")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--calibration", type=int, default=16384, help="tokens to cut by")
    parser.add_argument("--judged", type=int, default=16384, help="tokens of each judged text")
    parser.add_argument("--validation", type=int, default=12, help="windows")
    parser.add_argument("--dtype", default="auto", help="of the products while training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("elastic.json"))
    options = parser.parse_args()
    if learned := [text for text in options.judge if text in options.text]:
        parser.error(f"--judge {learned[0]} is what --text {options.text} trains on: judge by another text.")
    options.judge = options.judge or ["builtin"]
    return options


if __name__ == "__main__":
    main()
