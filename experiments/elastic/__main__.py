"""Train once and search after, or search and train each model? Quality at some sizes, at equal tokens.

    python -m experiments.elastic --out elastic.json --text python --judge builtin

Cuts to five shares along the allocation path. Four arms: `none` (cut and refitted in sequence), `elastic` (one adapter for all sizes,
trained with --tokens before the cut), `one` (the size of --healed is healed with all of --tokens, the others stay as they are) and `each`
(--tokens divided among the sizes). A token counts whenever it passes a model that learns, so the sandwich of two or three members sees
fewer of the text. `elastic-small` and `elastic-random` draw other members (`draws.py`), where they are asked for. A table is printed at the
end. Finished entries are in --out and are not done again by the same command, which goes on with a training that was stopped. See README.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from experiments.elastic.draws import DRAWS
from experiments.elastic.table import table
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
from llmbo.models.adapter import ABOUT
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
SHARES = ("0.9", "0.8", "0.65", "0.5", "0.4")


@one_line_errors()
def main() -> None:
    silence_libraries()
    options = _options()
    settings = settings_of(options, "seeds", "arms", "healed")
    results, work = Results(options.out, settings), work_of(options.out, settings)
    for seed in options.seeds:
        study = None
        for arm in options.arms:
            shares = options.healed if arm == "one" else options.shares
            pending = [share for share in shares if f"{seed} {share} {arm}" not in results.entries]
            if not pending:
                continue
            study = study or Study(options, seed, work / f"seed-{seed}")
            for share, entry in study.arm(arm, pending):
                results.add(f"{seed} {share} {arm}", entry)
                judged = "  ".join(f"{name} {v['kl']:.4f} {v['loss']:.4f}" for name, v in entry["texts"].items())
                print(f"{seed} {share} {arm:8} {entry['seconds']:6.1f} s  {judged}", flush=True)
        shutil.rmtree(work / f"seed-{seed}", ignore_errors=True)
    shutil.rmtree(work.parent, ignore_errors=True)
    print(table(results.entries, options.shares))


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
        self._work = work
        work.mkdir(parents=True, exist_ok=True)
        self._task = Task(
            options.model, self._work, options.text, options.window, options.validation,
            calibration_tokens=options.calibration, seed=seed, dtype=self._dtype, device=device,
        )  # fmt: skip
        self._config = self._task.config
        windows = load_windows(self._config, self._loaded)
        self._judges = Judges(options.judge, self._loaded, options.judged, self._config, windows, options.window)

    def _cut(self, config: RunConfig, loaded: LoadedModel, share: str, kind: str = "plain") -> Cut:
        """A share's member of the path, refitted in sequence, in float32 on the CPU. All are cut at once, and kept."""
        files = {own: self._work / f"{kind}-{own}.pt" for own in self._options.shares}
        if not all(file.is_file() for file in files.values()):
            windows = load_windows(config, loaded)
            with prepared(config, loaded, windows, Quiet()) as problem:
                members = {own: problem.space.decode(problem.family.at(float(own))) for own in files}
                refits = {own: sequential_refit(problem.supernet, a, windows.calibration) for own, a in members.items()}
            for own, architecture in members.items():
                mask = PruningMask.from_architecture(architecture, refits[own].ranking)
                keep(files[own], (shrink(loaded.model, mask, refits[own]).cpu(), architecture))
        cut: Cut = kept(files[share])
        return cut

    def arm(self, arm: str, shares: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The entry of one share after the other."""
        options = self._options
        if arm in DRAWS:
            yield from self._elastic(arm, shares)
            return
        tokens = {"none": 0, "one": options.tokens, "each": options.tokens // len(options.shares)}[arm]
        for share in shares:
            yield share, self._healed(share, tokens)
            shutil.rmtree(self._training(share, tokens), ignore_errors=True)

    def _training(self, share: str, tokens: int) -> Path:
        return self._work / f"{share}-{tokens}"

    def _plan(self) -> Plan:
        options = self._options
        return Plan(0, options.batch, "lora", options.rank, options.lr, True, 0, 10**6, self._seed)

    def _elastic(self, arm: str, shares: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        start, out = time.perf_counter(), self._work / arm
        if not out.exists():
            length = Length(tokens=round(self._options.tokens / PASSES))
            task, command = replace(self._task, out=out), "python -m experiments.elastic"
            train_elastic(task, self._plan(), length, command, Quiet(), draw=DRAWS[arm])
        history = json.loads((out / ABOUT).read_text(encoding="utf-8"))["validation"]
        seconds = time.perf_counter() - start
        config = replace(self._config, elastic=str(out))
        loaded = adapted(adapter_of(config), load_model(config.model, "float32", config.device))
        for share in shares:
            yield share, {"seconds": seconds, "history": history, **self._judge(self._cut(config, loaded, share, arm))}

    def _healed(self, share: str, tokens: int) -> dict[str, Any]:
        model, architecture = self._cut(self._config, self._loaded, share)
        nn.Module.to(model, self._loaded.device)
        seconds, history = 0.0, list[Any]()
        if tokens:
            loaded, plan, start = self._loaded, self._plan(), time.perf_counter()
            student = Student(model, loaded.tokenizer, loaded.device, self._dtype, self._teacher, architecture)
            work = self._training(share, tokens)
            length = Length(tokens=tokens)
            windows, _ = dealt_windows(student, self._config, plan, self._options.validation, work, length, Quiet())
            course = course_for(student, windows, plan, length, work, Quiet(), self._work / "teacher")
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
    parser = parser_of(__doc__, shares=list(SHARES), tokens=200_000, out=Path("elastic.json"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(dict.fromkeys([*ARMS, *DRAWS])), default=list(ARMS))
    parser.add_argument(
        "--healed", nargs="+", help="shares that `one` heals, each with all tokens; by default the middle one"
    )
    options = parsed(parser)
    options.healed = options.healed or [options.shares[len(options.shares) // 2]]
    if strange := set(options.healed) - set(options.shares):
        parser.error(f"--healed {' '.join(sorted(strange))}: not among --shares {' '.join(options.shares)}.")
    return options


if __name__ == "__main__":
    main()
