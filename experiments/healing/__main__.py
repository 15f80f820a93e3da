"""What a few minutes of distillation give back to a pruned model, by what is trained: quality at equal minutes, or at equal tokens.

    python -m experiments.healing --minutes 20 --out healing.json --judge text:wikitext.txt --judge builtin --items arc_easy.jsonl

Cuts a model to each share along the allocation path, as `llmbo optimize` prepares it, refits it in sequence, and trains that in each way;
`--cuts 2ssp flap` adds models that are cut to the same share by what others keep. The dense model, trained alike, is the control. A table
is printed at the end. Everything that is finished is in --out, and is not done again by the same command, which goes on with a training
that was stopped. See README.md.
"""

import argparse
import copy
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from experiments.healing.peers import PEERS
from experiments.healing.table import OURS, Key, table
from experiments.quiet import Quiet
from experiments.studies import (
    Cut,
    Judges,
    Results,
    keep,
    kept,
    one_line_errors,
    parsed,
    parser_of,
    settings_of,
    teacher_of,
    work_of,
)
from llmbo.config import RunConfig
from llmbo.evaluation.items import Exam, read_item_files
from llmbo.models.loading import load_model
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import prepared
from llmbo.problem.texts import load_windows
from llmbo.training.learner import Learner
from llmbo.training.lessons import Student, course_for, windows_for
from llmbo.training.plan import METHODS, Length, Plan
from llmbo.training.trainer import autocast, train
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.masks import PruningMask
from pruning.sequential import SequentialRefits, sequential_refit
from pruning.shrinking import shrink

Judge = Callable[[PreTrainedModel], dict[str, Any]]


@one_line_errors()
def main() -> None:
    silence_libraries()
    options = _options()
    start = time.perf_counter()
    settings = settings_of(options, "shares", "seeds", "methods", "cuts", "within")
    results, work = Results(options.out, settings), work_of(options.out, settings)
    for seed in options.seeds:
        pending = [key for key in _keys(seed, options) if str(key) not in results.entries]
        if not pending:
            continue
        study = Study(options, seed, work)
        for key in pending:
            if time.perf_counter() - start > 60 * options.within:
                print(f"{options.within:g} minutes are over: the same command goes on with {key}.", flush=True)
                print(table(results.entries))
                return
            entry = study.untrained(key) if key.method == "none" else study.trained(key)
            results.add(str(key), entry)
            print(f"{key!s:24} {_told(entry)}", flush=True)
            shutil.rmtree(study.work(key), ignore_errors=True)
    shutil.rmtree(work.parent, ignore_errors=True)
    print(table(results.entries))


def _keys(seed: int, options: argparse.Namespace) -> list[Key]:
    """In the order in which they are done: the most telling first."""
    dense = Key(str(seed), "1", "none")
    kinds = [(method, cut) for method in ("none", *options.methods) for cut in options.cuts]
    cut = [Key(str(seed), share, method, cut) for method, cut in kinds for share in options.shares]
    return [dense, *cut, *(dense._replace(method=method) for method in options.methods[:1])]


def _told(entry: dict[str, Any]) -> str:
    texts = [f"{name} KL {v['kl']:.4f} perplexity {math.exp(v['loss']):.2f}" for name, v in entry["texts"].items()]
    items = [f"{name} {v['acc']:.3f}" for name, v in entry["items"].items()]
    return "  ".join([f"{entry['seconds']:6.1f} s", *texts, *items])


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
        self._teacher = teacher_of(self._loaded.model, self._dtype)
        self._config = RunConfig(
            options.model, text=options.cut_text, calibration_tokens=options.calibration, window=options.window, seed=seed,
            device=device, dtype="float32", heldout_text="none",
        )  # fmt: skip
        self._work = work / f"seed-{seed}"
        self._work.mkdir(parents=True, exist_ok=True)
        self._windows = load_windows(self._config, self._loaded)
        self._judge = self._judging()

    def work(self, key: Key) -> Path:
        """Where a training leaves its checkpoints."""
        return self._work / "-".join(str(key).split()[1:])

    def _judging(self) -> Judge:
        """Held-out KL and loss by text, and items' scores, of a model."""
        options, loaded = self._options, self._loaded
        texts = Judges(options.judge, loaded, options.judged, self._config, self._windows, options.window)
        files = read_item_files(options.items, options.limit or None)
        exams = [Exam.of(file, loaded.model, loaded.tokenizer) for file in files]

        def judge(model: PreTrainedModel) -> dict[str, Any]:
            found = texts.of(model)
            with autocast(loaded.device, self._dtype):
                return {"texts": found, "items": {exam.name: exam.taken_by(model) for exam in exams}}

        return judge

    def _model(self, share: str, cut: str) -> Cut:
        """A cut model in float32, which is cut once and kept."""
        if share == "1":
            model = self._loaded.model
            return copy.deepcopy(model), Architecture.full(anatomy_of(model))
        file = self._cut_file(share, cut)
        if not file.is_file() and cut == OURS:
            self._cut()
        elif not file.is_file():
            model, architecture = PEERS[cut](self._loaded.model, float(share), self._windows.calibration)
            keep(file, (model.cpu(), architecture))
        model, architecture = kept(file)
        return nn.Module.to(model, self._loaded.device), architecture

    def _cut(self) -> None:
        """Every share's member of the allocation path, refitted in sequence."""
        refitted: dict[str, tuple[Architecture, SequentialRefits]] = {}
        with prepared(self._config, self._loaded, self._windows, Quiet()) as problem:
            for share in self._options.shares:
                architecture = problem.space.decode(problem.family.at(float(share)))
                refits = sequential_refit(problem.supernet, architecture, self._windows.calibration)
                refitted[share] = architecture, refits
        for share, (architecture, refits) in refitted.items():
            mask = PruningMask.from_architecture(architecture, refits.ranking)
            keep(self._cut_file(share, OURS), (shrink(self._loaded.model, mask, refits).cpu(), architecture))

    def _cut_file(self, share: str, cut: str) -> Path:
        return self._work / f"{cut}-{share}.pt"

    def untrained(self, key: Key) -> dict[str, Any]:
        model, architecture = self._model(key.share, key.cut)
        return {
            "seconds": 0.0,
            "params": model.num_parameters(),
            "architecture": architecture.to_dict(),
            **self._judge(model),
        }

    def trained(self, key: Key) -> dict[str, Any]:
        options, loaded = self._options, self._loaded
        model, architecture = self._model(key.share, key.cut)
        tokenizer, device = loaded.tokenizer, loaded.device
        student = Student(model, tokenizer, device, self._dtype, self._teacher, architecture)
        plan = Plan(
            0, options.batch, key.method, options.rank, options.lr, True, every=0, seed=self._seed, patience=10**6
        )
        work = self.work(key)
        length = Length(tokens=options.tokens) if options.tokens else Length(minutes=options.minutes)
        windows = windows_for(
            student, options.text, options.window, plan, options.validation, self._work, length, Quiet()
        )
        learns = sum(
            parameter.numel() for parameter in Learner.of(copy.deepcopy(model), plan, student.refitter).trained.values()
        )
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
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


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, text="self", tokens=0, validation=24, out=Path("healing.json"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--methods",
        nargs="*",
        choices=METHODS,
        default=list(METHODS),
        help="what is trained; nothing where none is named",
    )
    parser.add_argument("--cuts", nargs="+", choices=(OURS, *PEERS), default=[OURS], help="what chooses what is kept")
    parser.add_argument("--cut-text", default="python", help="to cut and refit by")
    parser.add_argument(
        "--items", action="append", default=[], help="JSONL file of items; several are given one by one"
    )
    parser.add_argument("--limit", type=int, default=0, help="items per file; 0 takes all")
    parser.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="of each training, the dense model's predictions included and the writing of its text (`self`) not, unless --tokens are given",
    )
    parser.add_argument("--within", type=float, default=1e6, help="minutes after which nothing new is begun")
    return parsed(parser)


if __name__ == "__main__":
    main()
