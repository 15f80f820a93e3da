"""What a few minutes of distillation give back to a pruned model, by what is trained: quality at equal minutes, or at equal tokens.

    python -m experiments.healing --minutes 20 --out healing.json --judge text:wikitext.txt --judge builtin --items arc_easy.jsonl

Cuts a model to each share along the allocation path, as `llmbo optimize` prepares it, refits it in sequence, and trains that in each way;
the dense model, trained alike, is the control. A table is printed at the end. Everything that is finished is in --out, and is not done
again by the same command, which goes on with a training that was stopped. See README.md.
"""

import argparse
import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.healing.table import table
from experiments.quiet import Quiet
from llmbo.config import RunConfig
from llmbo.evaluation.items import Exam, read_item_files
from llmbo.models.loading import load_model
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import prepared
from llmbo.problem.texts import load_windows, searched
from llmbo.report.files import replace_file
from llmbo.training.learner import Learner
from llmbo.training.lessons import Student, course_for, windows_for
from llmbo.training.plan import RANK, Length, Plan
from llmbo.training.trainer import autocast, train
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import fresh_windows
from pruning.likelihood import DenseDistribution, dense_distribution, quality
from pruning.masks import PruningMask
from pruning.sequential import SequentialRefits, sequential_refit
from pruning.shrinking import shrink
from pruning.text import read_text

METHODS = ("lora", "refit-lora", "norms", "all")
Judge = Callable[[PreTrainedModel], dict[str, Any]]
Cut = tuple[PreTrainedModel, Architecture]


def main() -> None:
    silence_libraries()
    options = _options()
    start = time.perf_counter()
    results = Results(options)
    for seed in options.seeds:
        pending = [key for key in _keys(seed, options) if key not in results.entries]
        if not pending:
            continue
        study = Study(options, seed, results.work)
        for key in pending:
            if time.perf_counter() - start > 60 * options.within:
                print(f"{options.within:g} minutes are over: the same command goes on with {key}.", flush=True)
                print(table(results.entries))
                return
            share, method = key.split()[1:]
            results.add(key, study.untrained(share) if method == "none" else study.trained(share, method))
            shutil.rmtree(study.work(key), ignore_errors=True)
    shutil.rmtree(results.work, ignore_errors=True)
    print(table(results.entries))


def _keys(seed: int, options: argparse.Namespace) -> list[str]:
    """`SEED SHARE METHOD` in the order in which they are done: the most telling first."""
    rows = [(share, "none") for share in ("1", *options.shares)]
    rows += [(share, method) for method in options.methods for share in options.shares]
    return [f"{seed} {share} {method}" for share, method in [*rows, ("1", options.methods[0])]]


class Results:
    """The file, written anew behind every entry."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._file: Path = options.out
        self.work = self._file.with_name(f"{self._file.name}.work")
        self._settings = {name: value for name, value in vars(options).items() if name in KEPT}
        self.entries: dict[str, Any] = {}
        if self._file.is_file():
            found = json.loads(self._file.read_text(encoding="utf-8"))
            if found["settings"] != json.loads(json.dumps(self._settings)):
                raise SystemExit(f"'{self._file}' holds results of other settings: move it away, then run again.")
            self.entries = found["entries"]

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        self.entries[key] = entry
        replace_file(
            self._file, (json.dumps({"settings": self._settings, "entries": self.entries}, indent=1) + "\n").encode()
        )
        judged = "  ".join(
            f"{name} KL {v['kl']:.4f} perplexity {math.exp(v['loss']):.2f}" for name, v in entry["texts"].items()
        )
        items = "  ".join(f"{name} {v['acc']:.3f}" for name, v in entry["items"].items())
        print(f"{key:24} {entry['seconds']:6.1f} s  {judged}  {items}", flush=True)


class Study:
    """A seed's models and windows.

    Args:
        work: Folder for what a stopped command goes on from.
    """

    def __init__(self, options: argparse.Namespace, seed: int, work: Path) -> None:
        self._options, self._seed = options, seed
        device = choose_device(options.device)
        self._loaded = load_model(options.model, "float32", device)
        self._loaded.model.requires_grad_(False)
        self._dtype = choose_dtype(options.dtype, device, self._loaded.model.config)
        self._config = RunConfig(
            options.model, text=options.cut_text, calibration_tokens=options.calibration, window=256, seed=seed,
            device=device, dtype="float32", heldout_text="none",
        )  # fmt: skip
        self._work = work / f"seed-{seed}"
        self._work.mkdir(parents=True, exist_ok=True)
        self._windows = load_windows(self._config, self._loaded)
        self._cuts: dict[str, Cut] = self._cut()
        self._judge = self._judging()

    def work(self, key: str) -> Path:
        """Where a training leaves its checkpoints."""
        return self._work / "-".join(key.split()[1:])

    def _cut(self) -> dict[str, Cut]:
        """Every share's model, refitted in sequence, and the dense one, in float32 on the CPU."""
        file, model = self._work / "cuts.pt", self._loaded.model
        if file.is_file():
            known: dict[str, Cut] = torch.load(file, weights_only=False)  # written by the same command
            return known
        refitted: dict[str, tuple[Architecture, SequentialRefits]] = {}
        with prepared(self._config, self._loaded, self._windows, Quiet()) as problem:
            for share in self._options.shares:
                architecture = problem.space.decode(problem.family.at(float(share)))
                refits = sequential_refit(problem.supernet, architecture, self._windows.calibration)
                refitted[share] = architecture, refits
        cuts = {"1": (copy.deepcopy(model).cpu(), Architecture.full(anatomy_of(model)))}
        for share, (architecture, refits) in refitted.items():
            mask = PruningMask.from_architecture(architecture, refits.ranking)
            cuts[share] = shrink(model, mask, refits).cpu(), architecture
        torch.save(cuts, file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)  # whole or not there
        return cuts

    def _judging(self) -> Judge:
        """Held-out KL and loss by text, and items' scores, of a model."""
        options, loaded = self._options, self._loaded
        texts: dict[str, tuple[torch.Tensor, DenseDistribution]] = {}
        data = {"sha256": self._windows.sha256, "sources": [asdict(s) for s in self._windows.sources]}
        for source in options.judge:
            text = read_text(source)
            seen = searched(self._config, data)
            windows = fresh_windows(text, loaded.tokenizer, options.judged // 256, 256, 0, seen).heldout
            texts[source] = windows, dense_distribution(loaded.model, windows)
        files = read_item_files(options.items, options.limit or None)
        exams = [Exam.of(file, loaded.model, loaded.tokenizer) for file in files]

        def judge(model: PreTrainedModel) -> dict[str, Any]:
            found = {name: asdict(quality(model, windows, dense)) for name, (windows, dense) in texts.items()}
            with autocast(loaded.device, self._dtype):
                return {"texts": found, "items": {exam.name: exam.taken_by(model) for exam in exams}}

        return judge

    def _model(self, share: str) -> tuple[PreTrainedModel, Architecture]:
        model, architecture = self._cuts[share]
        made = copy.deepcopy(model)
        return nn.Module.to(made, self._loaded.device), architecture

    def untrained(self, share: str) -> dict[str, Any]:
        model, architecture = self._model(share)
        return {
            "seconds": 0.0,
            "params": model.num_parameters(),
            "architecture": architecture.to_dict(),
            **self._judge(model),
        }

    def trained(self, share: str, method: str) -> dict[str, Any]:
        options, loaded = self._options, self._loaded
        model, architecture = self._model(share)
        tokenizer, device = loaded.tokenizer, loaded.device
        student = Student(model, tokenizer, device, self._dtype, loaded.model, architecture)
        plan = Plan(
            0, options.batch, method, options.rank, lr=options.lr, every=0, distil=True, seed=self._seed, patience=10**6
        )
        work = self.work(f"{self._seed} {share} {method}")
        windows = windows_for(student, options.text, options.window, plan, options.validation, self._work)
        learns = sum(
            parameter.numel() for parameter in Learner.of(copy.deepcopy(model), plan, student.refitter).trained.values()
        )
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        length = Length(tokens=options.tokens) if options.tokens else Length(minutes=options.minutes)
        course = course_for(student, windows, plan, length, work, Quiet())
        trained, progress = train(model, course.lesson, course.plan, work, tell=print)
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
        told = {
            "learns": learns,
            "plan": asdict(course.plan),
            "tokens": progress.step * course.plan.batch * options.window,
            "history": progress.history,
            "fault": progress.fault,
            "peak_bytes": peak,
        }
        return {"seconds": seconds, **told, **self._judge(trained)}


KEPT = (
    "model",
    "text",
    "cut_text",
    "judge",
    "items",
    "limit",
    "tokens",
    "minutes",
    "rank",
    "batch",
    "window",
    "lr",
    "dtype",
    "calibration",
    "judged",
    "validation",
)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--shares", nargs="+", default=["0.8", "0.65"], help="of the blocks' parameters")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--text", default="self", help="to train on; should hold no judged domain")
    parser.add_argument("--cut-text", default="python", help="to cut and refit by")
    parser.add_argument(
        "--judge", action="append", default=[], help="text to measure on, e.g. text:FILE; several are given one by one"
    )
    parser.add_argument(
        "--items", action="append", default=[], help="JSONL file of items; several are given one by one"
    )
    parser.add_argument("--limit", type=int, default=0, help="items per file; 0 takes all")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="of each training, the dense model's predictions included"
    )
    parser.add_argument("--tokens", type=int, default=0, help="of each training, instead of minutes")
    parser.add_argument("--rank", type=int, default=RANK, help="of adapters")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--calibration", type=int, default=16384, help="tokens to cut by")
    parser.add_argument("--judged", type=int, default=16384, help="tokens of each judged text")
    parser.add_argument("--validation", type=int, default=24, help="windows")
    parser.add_argument("--dtype", default="auto", help="of the products while training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--within", type=float, default=1e6, help="minutes after which nothing new is begun")
    parser.add_argument("--out", type=Path, default=Path("healing.json"))
    options = parser.parse_args()
    options.judge = options.judge or ["builtin"]
    if learned := [text for text in options.judge if text in options.text]:
        parser.error(f"--judge {learned[0]} is what --text {options.text} trains on: judge by another text.")
    return options


if __name__ == "__main__":
    main()
