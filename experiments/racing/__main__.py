"""Whole searches with and without racing: proxy time and tokens against final hypervolume, several seeds.

    python -m experiments.racing --model llama --budget 100 --seeds 5

All searches share one prepared model and its windows; both of a seed start alike. Their databases are thrown away.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from experiments.quiet import Quiet
from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.objectives import build_objectives, outcomes, ref_point
from llmbo.problem.preparation import Problem, prepared
from llmbo.problem.texts import load_windows
from llmbo.run.assemble import build_proposer, evaluator_of
from llmbo.run.store import TrialStore
from llmbo.search.loop import run_search
from llmbo.search.pareto import hypervolume_trace


class Unwatched:
    """Implements `llmbo.types.Observer`."""

    def on_trial_start(self, *event: object) -> None: ...

    def on_trial_end(self, *event: object) -> None: ...

    def on_proposing(self, *event: object) -> None: ...


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--strategy", default="qnehvi")
    parser.add_argument("--budget", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--proxy-tokens", type=int, default=3072)
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--heldout-tokens", type=int, default=1536)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    options = vars(parser.parse_args())
    seeds, out = options.pop("seeds"), options.pop("out")
    torch.set_num_threads(options.pop("threads"))
    config = RunConfig(**options)
    loaded = load_model(config.model, config.dtype, config.device)
    rows = []
    with prepared(config, loaded, load_windows(config, loaded), Quiet()) as problem:
        print("seed  racing  stopped  proxy s   tokens   hypervolume")
        for seed in range(seeds):
            for racing in (False, True):
                row = measure(problem, replace(config, seed=seed, racing=racing))
                rows.append({"seed": seed, "racing": racing, **row})
                print(
                    f"{seed:4}  {racing!s:6}  {row['stopped']:7.0f}  {row['seconds']:7.1f}  {row['tokens']:7.0f}"
                    f"  {row['hypervolume']:.4f}",
                    flush=True,
                )
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    for name in ("seconds", "tokens"):
        saved = [plain[name] / raced[name] for plain, raced in pairs]
        print(f"{name}: {statistics.mean(saved):.2f} times less with racing, from {min(saved):.2f} to {max(saved):.2f}")
    gained = [raced["hypervolume"] - plain["hypervolume"] for plain, raced in pairs]
    print(f"hypervolume: {statistics.mean(gained):+.4f} with racing, from {min(gained):+.4f} to {max(gained):+.4f}")
    if out:
        out.write_text(json.dumps({"settings": config.settings(), "rows": rows}, indent=2) + "\n")


def measure(problem: Problem, config: RunConfig) -> dict[str, float]:
    """One search from its first proposal to its last evaluation."""
    objectives = build_objectives(config.objectives, problem.dense, problem.smallest, config.reference_point)
    with tempfile.TemporaryDirectory() as folder:
        store = TrialStore.create(
            f"sqlite:///{folder}/study.db", "racing", problem.space, objectives, config.settings(), {}
        )
        evaluator = evaluator_of(config, problem, objectives, store)
        proposer = build_proposer(config.strategy, problem, objectives)
        run_search(proposer, evaluator, store, config.budget, config.batch, config.seed, Unwatched())
        complete = [trial for trial in store.trials() if trial.complete]
    whole = problem.windows.proxy.numel()
    return {
        "stopped": sum(trial.stopped for trial in complete),
        "seconds": sum(trial.seconds or 0.0 for trial in complete),
        "tokens": sum(trial.values.get("tokens", whole) for trial in complete),
        "hypervolume": hypervolume_trace(outcomes(complete, objectives), ref_point(objectives))[-1],
    }


if __name__ == "__main__":
    main()
