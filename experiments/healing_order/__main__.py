"""What tells before healing which of several models of one size will be best after it?

    python -m experiments.healing_order --out order.json --text python --judge builtin

At each share some candidates of equal size are scored, cut, healed alike and measured on held-out text: the allocation path's member, and
others with more and more widths exchanged at random. Scores are KL from the dense model, correlation of gradients with the dense model's
in the space of low-rank changes (after TraceNAS, arXiv:2602.02891), the norm of these gradients, and the number of parameters; beside them
KL on the held-out text before healing. Printed is Kendall's tau of each with the order after healing, within sizes, with a bootstrapped
95 % interval, and how much worse than the best healed one its favourites are. Finished candidates are in --out and are not done again by
the same command. See README.md.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.quiet import Quiet
from experiments.studies import Judges, Results, one_line_errors, parsed, parser_of, settings_of, teacher_of
from llmbo.models.loading import load_model
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import Problem, prepared
from llmbo.problem.space import SearchSpace
from llmbo.problem.texts import load_windows
from llmbo.training.elastic import Task, dealt_windows
from llmbo.training.lessons import Student, course_for
from llmbo.training.plan import Length, Plan
from llmbo.training.trainer import train
from pruning.architecture import Architecture
from pruning.distillation import divergence, next_tokens
from pruning.elastic import adapt, take_out
from pruning.likelihood import Head, last_hidden
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.supernet import Supernet

EQUAL = 0.004  # of the blocks' parameters; sizes closer than that are one
DRAWS = 2000  # of the bootstrap
RANK = 8  # of the space that gradients are compared in
BETTER = {"kl": -1, "trace": 1, "norm": -1, "params": 1, "unhealed": -1}  # sign of a score that promises more
Scores = dict[str, float]


@one_line_errors()
def main() -> None:
    silence_libraries()
    options, start = _options(), time.perf_counter()
    results = Results(options.out, settings_of(options, "minutes"))
    keys = [f"{share} {number}" for number in range(options.candidates) for share in options.shares]
    if pending := [key for key in keys if key not in results.entries]:
        with tempfile.TemporaryDirectory(prefix="order-") as work:
            for key, entry in _measured(options, pending, Path(work)):
                results.add(key, entry)
                told = "  ".join(f"{name} {value:.5g}" for name, value in entry["scores"].items())
                print(f"{key:8} {entry['seconds']:6.1f} s  {told}  healed {entry['healed']:.4f}", flush=True)
                if time.perf_counter() - start > 60 * options.minutes:
                    break
    for name, (tau, low, high, loss) in forecasts(results.entries, options.shares).items():
        print(f"{name:8} tau {tau:+.2f}, 95 % {low:+.2f} to {high:+.2f}; its favourites {loss:.1%} worse than the best")


def _measured(options: argparse.Namespace, keys: Sequence[str], work: Path) -> Any:
    """Key and entry of one candidate after the other.

    Args:
        work: Folder for checkpoints and the teacher's logits.
    """
    device = choose_device(options.device)
    loaded = load_model(options.model, "float32", device)
    loaded.model.requires_grad_(False)
    dtype = choose_dtype(options.dtype, device, loaded.model.config)
    config = Task(
        options.model, work / "out", options.text, options.window, options.validation,
        calibration_tokens=options.calibration, device=device,
    ).config  # fmt: skip
    windows = load_windows(config, loaded)
    judges = Judges(options.judge, loaded, options.judged, config, windows, options.window)
    teacher = teacher_of(loaded.model, dtype)
    plan = Plan(0, options.batch, "lora", options.rank, options.lr, True, 0, 10**6)
    with prepared(config, loaded, windows, Quiet()) as problem:
        found = {key: drawn(problem, float(key.split()[0]), int(key.split()[1])) for key in keys}
        tried = windows.calibration[: max(1, options.scored // options.window)]
        scores = scored(problem, [problem.space.decode(x) for x in found.values()], tried)
        ranking, refits = problem.supernet.ranking, problem.supernet.compensation
    for (key, x), own in zip(found.items(), scores, strict=True):
        architecture = problem.space.decode(x)
        model = shrink(loaded.model, PruningMask.from_architecture(architecture, ranking), refits)
        start, before = time.perf_counter(), _judged(judges, model)
        student = Student(model, loaded.tokenizer, device, dtype, teacher, architecture)
        length = Length(tokens=options.tokens)
        training, _ = dealt_windows(student, config, plan, options.validation, work, length, Quiet())
        course = course_for(student, training, plan, length, work / key, Quiet(), work / "teacher")
        model, _ = train(model, course.lesson, course.plan, work / key, tell=print)
        healed = _judged(judges, model)
        seconds = time.perf_counter() - start
        yield key, {"scores": own, "unhealed": before, "healed": healed, "seconds": seconds, **architecture.to_dict()}


def _judged(judges: Judges, model: PreTrainedModel) -> float:
    """KL from the dense model, a mean over texts."""
    return fmean(found["kl"] for found in judges.of(model).values())


def drawn(problem: Problem, share: float, number: int) -> tuple[int, ...]:
    """The path's member of a share, with `number` times a tenth of its widths moved by a level; its size stays what it is."""
    space, rng = problem.space, random.Random(f"{share} {number}")
    x = list(problem.family.at(share))
    size = _share(space, x)
    for _ in range(number * max(1, space.d // 10)):
        for _ in range(1000):  # until one is found that fits
            y = list(x)
            for place, step in zip(rng.sample(range(space.d), 2), (1, -1), strict=True):
                y[place] = min(max(y[place] + step, 0), space.max_levels[place])
            legal = bool(space.legal(torch.tensor([y], dtype=torch.float64)))
            if y != x and legal and abs(_share(space, y) - size) < EQUAL:
                x = y
                break
    return tuple(x)


def _share(space: SearchSpace, x: Sequence[int]) -> float:
    return float(space.share(torch.tensor([x], dtype=torch.float64)))


def scored(problem: Problem, architectures: Sequence[Architecture], windows: Tensor) -> list[Scores]:
    """All scores of some sub-networks."""
    supernet, full = problem.supernet, Architecture.full(problem.space.anatomy)
    dense = supernet.distribution(windows)
    try:
        learning = adapt(supernet, RANK, 1.0, 0)
        whole, found = _gradients(supernet, full, windows, learning), []
        for architecture in architectures:
            own = _gradients(supernet, architecture, windows, learning)
            x = torch.tensor([problem.space.encode(architecture)], dtype=torch.float64)
            found.append(
                {
                    "kl": supernet.quality(architecture, windows, dense).kl or 0.0,
                    "trace": trace(whole, own),
                    "norm": float(sum(part.square().sum() for part in own).sqrt()),  # type: ignore[union-attr]
                    "params": float(problem.space.share(x)),
                }
            )
    finally:
        take_out(supernet)
    return found


def _gradients(
    supernet: Supernet, architecture: Architecture, windows: Tensor, learning: Sequence[nn.Parameter]
) -> list[Tensor]:
    """Of the text's loss by the upper factors, which are 0: the weights' own gradients, cast down at random. 0 where units are missing."""
    with supernet.active(architecture) as model:
        for batch in windows.split(4):
            batch = batch.to(model.device)
            divergence(last_hidden(model, batch), Head.of(model), next_tokens(batch)).backward()
    found = [torch.zeros_like(up) if up.grad is None else up.grad.clone() for up in learning[1::2]]
    for parameter in learning:
        parameter.grad = None
    return found


def trace(whole: Sequence[Tensor], own: Sequence[Tensor]) -> float:
    """Correlation (Pearson) of a sub-network's gradients with the dense model's: by projection, weighed by the rows that are left."""
    total = 0.0
    for one, other in zip(whole, own, strict=True):
        kept = float((other != 0).any(-1).double().mean())
        if kept:
            total += kept * float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])
    return total / len(own)


def forecasts(entries: Mapping[str, Any], shares: Sequence[str]) -> dict[str, tuple[float, float, float, float]]:
    """Of each score: Kendall's tau with the order after healing, a mean over sizes (1 is a perfect forecast), the ends of its interval, and
    how much more KL the candidate that it likes best has than the best one, after healing."""
    groups = [[entry for key, entry in entries.items() if key.split()[0] == share] for share in shares]
    groups = [group for group in groups if len(group) > 2]
    rng, found = np.random.default_rng(0), {}
    if not groups:
        return {}
    for name, sign in BETTER.items():
        promised = [[sign * (e["scores"] | {"unhealed": e["unhealed"]})[name] for e in group] for group in groups]
        healed = [[e["healed"] for e in group] for group in groups]
        pairs = [np.stack([own, np.negative(kl)], -1) for own, kl in zip(promised, healed, strict=True)]
        drawn = [_tau(p[rng.integers(len(p), size=(DRAWS, len(p)))]) for p in pairs]
        low, high = np.nanquantile(np.mean(drawn, axis=0), [0.025, 0.975])
        losses = [kl[int(np.argmax(own))] / min(kl) - 1 for own, kl in zip(promised, healed, strict=True)]
        found[name] = float(np.mean([_tau(p) for p in pairs])), float(low), float(high), fmean(losses)
    return found


def _tau(pairs: Any) -> Any:
    """Kendall's tau-b of `... x n x 2` numbers; no number where one of the two is always the same."""
    signs = np.sign(pairs[..., :, None, :] - pairs[..., None, :, :])
    one, other = signs[..., 0], signs[..., 1]
    with np.errstate(invalid="ignore"):
        return (one * other).sum((-2, -1)) / np.sqrt((one**2).sum((-2, -1)) * (other**2).sum((-2, -1)))


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, shares=["0.8", "0.65", "0.5"], tokens=20_000, out=Path("order.json"))
    parser.add_argument("--candidates", type=int, default=8, help="at each share")
    parser.add_argument("--scored", type=int, default=3072, help="tokens to score by")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which nothing new is begun")
    return parsed(parser)


if __name__ == "__main__":
    main()
