"""Train once and search after, or search and train each model? Quality at some sizes, at equal tokens.

    python -m experiments.elastic --out elastic.json --text python --judge builtin

Four arms at each share: `none` (cut and refitted in sequence), `elastic` (one adapter for all sizes, trained with --tokens before the
cut), `one` (each size healed with all of --tokens, as if no other was wanted) and `each` (--tokens divided among the sizes). A token
counts whenever it passes a model that learns, so the sandwich of two or three members sees fewer of the text. Finished entries are in
--out and are not done again by the same command. See README.md.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from experiments.quiet import Quiet
from experiments.studies import Cut, Judges, Results, parsed, parser_of, settings_of, teacher_of
from llmbo.config import RunConfig
from llmbo.models.loading import LoadedModel, load_model
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.silence import silence_libraries
from llmbo.problem.elastic import adapted, adapter_of
from llmbo.problem.preparation import prepared
from llmbo.problem.texts import load_windows
from llmbo.training.elastic import WHOLE, Task, dealt_windows, train_elastic
from llmbo.training.lessons import Student, course_for
from llmbo.training.plan import Length, Plan
from llmbo.training.trainer import train
from pruning.masks import PruningMask
from pruning.sequential import sequential_refit
from pruning.shrinking import shrink

PASSES = 2 + 1 / WHOLE  # of a window in a sandwich, on average
ARMS = ("none", "elastic", "one", "each")


def main() -> None:
    silence_libraries()
    options = _options()
    results = Results(options.out, settings_of(options, "seeds", "arms"))
    for seed in options.seeds:
        study = None
        for arm in options.arms:
            if all(f"{seed} {share} {arm}" in results.entries for share in options.shares):
                continue
            study = study or Study(options, seed)
            for share, entry in study.arm(arm).items():
                results.add(f"{seed} {share} {arm}", entry)
                judged = "  ".join(f"{name} {v['kl']:.4f} {v['loss']:.4f}" for name, v in entry["texts"].items())
                print(f"{seed} {share} {arm:8} {entry['seconds']:6.1f} s  {judged}", flush=True)


class Study:
    """A seed's models and windows."""

    def __init__(self, options: argparse.Namespace, seed: int) -> None:
        self._options, self._seed = options, seed
        device = choose_device(options.device)
        self._loaded = load_model(options.model, "float32", device)
        self._loaded.model.requires_grad_(False)
        self._dtype = choose_dtype(options.dtype, device, self._loaded.model.config)
        self._teacher = teacher_of(self._loaded.model, self._dtype)
        self._work = Path(tempfile.mkdtemp(prefix="elastic-"))
        self._task = Task(
            options.model, self._work / "adapter", options.text, options.window, options.validation,
            calibration_tokens=options.calibration, seed=seed, dtype=self._dtype, device=device,
        )  # fmt: skip
        self._config = self._task.config
        windows = load_windows(self._config, self._loaded)
        self._judges = Judges(options.judge, self._loaded, options.judged, self._config, windows, options.window)
        self._cuts = self._cut(self._config, self._loaded)

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
        loaded = adapted(adapter_of(config), load_model(config.model, "float32", config.device))
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
            student = Student(model, loaded.tokenizer, loaded.device, self._dtype, self._teacher, architecture)
            work = self._work / f"{share}-{tokens}"
            windows, _ = dealt_windows(student, self._config, plan, self._options.validation, work)
            course = course_for(student, windows, plan, Length(tokens=tokens), work, Quiet(), self._work / "teacher")
            model, progress = train(model, course.lesson, course.plan, work, tell=print)
            seconds, history = time.perf_counter() - start, progress.history
        return {"seconds": seconds, "history": history, **self._judge((model, architecture))}

    def _judge(self, cut: Cut) -> dict[str, Any]:
        model, architecture = cut
        nn.Module.to(model, self._loaded.device)
        return {
            "params": model.num_parameters(),
            "architecture": architecture.to_dict(),
            "texts": self._judges.of(model),
        }


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, tokens=200_000, out=Path("elastic.json"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    return parsed(parser)


if __name__ == "__main__":
    main()
