"""The fronts of a finished comparison, judged on text of another domain than the one they were searched on.

    python -m experiments.transfer experiments/configs/problem_r_kl.toml --text text:path/to/wikitext2-valid.txt --on builtin

Rankings, refitted projections and searches are those of the comparison; its proposals and evaluations are read from the cache, so
only the other text's windows cost time. Hypervolume of the judged points by loss there, reference dense + margin, and the costs that the
method searches; and their mean gain over the threshold family's curve.
"""

import argparse
import statistics
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

from experiments.quiet import Quiet
from llmbo.comparison.arms import arm_part, measured_curves
from llmbo.comparison.config import Arm, read_config
from llmbo.comparison.problems import judged_objectives, opened
from llmbo.comparison.runner import Outcome, run_arm
from llmbo.comparison.session import arm_key
from llmbo.comparison.store import Evaluation, EvaluationStore
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.proxy import ProxyEvaluator
from pruning.calibration import cut_windows
from pruning.text import read_text


class Unwatched:
    """Implements `llmbo.comparison.runner.Watcher`."""

    def on_evaluation(self, arm: Arm, seed: int, done: int) -> None: ...

    def on_outcome(self, outcome: Outcome) -> None: ...


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--text", help="replaces the problem's text")
    parser.add_argument("--on", default="builtin", help="the other text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--cache", type=Path, default=Path("comparisons/evaluations.db"))
    arguments = parser.parse_args()
    config = read_config(arguments.config, text=arguments.text)
    base = next(arm.problem for arm in config.arms if arm.label == config.method)
    arms = [arm for arm in config.arms if arm.problem == base]
    loaded = load_model(base.run.model, base.run.dtype, base.run.device)
    counts = {"calibration": 1, "proxy": 1, "heldout": arguments.tokens // base.run.window}
    windows = cut_windows(read_text(arguments.on), loaded.tokenizer, counts, base.run.window, 0).heldout
    del loaded
    with (
        EvaluationStore.open(arguments.cache) as store,
        opened(base, [base], config.margin, (), store, Quiet()) as problem,
    ):
        other = ProxyEvaluator.on(windows, problem.space, problem.search.supernet)

        @cache
        def judge(x: tuple[int, ...], origin: str) -> Evaluation:
            return Evaluation(other.evaluate([x])[0], 0.0)

        dense = judge(problem.space.max_levels, "dense").values
        judged = judged_objectives(base.run.objectives, dense, problem.search.smallest, config.margin)
        problem = replace(problem, judge=judge, judged=judged)
        curves = measured_curves(problem, config)
        found = defaultdict(list)
        print(f"dense model on {arguments.on}: loss {dense['loss']:.3f}, {windows.numel()} tokens")
        print(f"{'strategy':20} seed  evaluations  hypervolume  mean gain (nats)")
        for arm in arms:
            for seed in config.seeds:
                outcome = run_arm(arm, seed, arm_key(arm, seed, config, problem), config, problem, store, Unwatched())
                for point in arm_part(outcome, problem, curves, config).checkpoints:
                    volume, gain = point.heldout_hypervolume or 0.0, point.heldout_gain or 0.0
                    found[arm.label, point.evaluations].append((volume, gain))
                    print(f"{arm.label:20} {seed:4}  {point.evaluations:11}  {volume:11.4f}  {gain:+.4f}", flush=True)
        for (label, evaluations), values in found.items():
            volumes, gains = zip(*values, strict=True)
            print(f"{label:20} mean  {evaluations:11}  {statistics.mean(volumes):11.4f}  {statistics.mean(gains):+.4f}")


if __name__ == "__main__":
    main()
