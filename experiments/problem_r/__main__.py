"""Problem R: the reference problem of this project, every strategy side by side in one run.

    python -m experiments.problem_r --text path/to/wikitext2-valid.txt --out problem_r.json

SmolLM2-135M, WikiText-2 validation text (Merity et al. 2016) for ranking, compensation, proxy and held-out windows (disjoint);
60 integers. Four problems:

    loss-raw    loss on 1536 tokens, no compensation, reference dense + 2.5, shares from 0.1
    loss        loss on 1536 tokens, compensation, reference dense + 1.0, shares from 0.4
    kl          KL from the dense model on 3072 tokens, compensation, reference 1.2, shares from 0.4
    allocation  no search: the threshold family by Taylor against Fisher scores, at fixed shares

A front is judged by the hypervolume of the proxy values it was chosen by and, for the problems named by --heldout, by that of
the loss on 8192 held-out tokens (reference dense + 1.0; dense + 2.5 for loss-raw), at 24 of its points spread evenly. Results
are added to the output file as they come in; finished parts are skipped when the command is run again.
"""

import argparse
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from llmbo.assemble import Problem, build_proposer, prepared
from llmbo.config import RunConfig
from llmbo.family import ThresholdFamily
from llmbo.loop import SEEDS_PER_RUN
from llmbo.models import LoadedModel, load_model, silence_libraries
from llmbo.objectives import build_objectives, ref_point, to_maximize
from llmbo.pareto import hypervolume, hypervolume_trace
from llmbo.report import front_of
from llmbo.types import Trial, TrialState
from pruning.calibration import Text, TokenWindows, cut_windows
from pruning.importance import collect_statistics, fisher, taylor

# WikiText is stored as words separated by spaces; a subword tokenizer wants the text as it was written.
UNDO = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" ,", ","),
    (" .", "."),
    (" ;", ";"),
    (" :", ":"),
    (" !", "!"),
    (" ?", "?"),
    (" 's", "'s"),
    (" n't", "n't"),
    ("( ", "("),
    (" )", ")"),
)

JUDGED_POINTS = 24  # of every front: equally many, because a longer list of points alone raises hypervolume


@dataclass(frozen=True)
class Setting:
    """One problem: what a candidate is judged by."""

    quality: str
    margin: float  # of the reference point over the dense loss, proxy and held-out alike; KL has its own default
    compensation: bool
    proxy_tokens: int
    min_share: float


SETTINGS = {
    "loss-raw": Setting("loss", 2.5, False, 1536, 0.1),
    "loss": Setting("loss", 1.0, True, 1536, 0.4),
    "kl": Setting("kl", 1.0, True, 3072, 0.4),
}


class Quiet:
    """Phases that nobody watches."""

    def phase(self, name: str, total: int | None = None) -> nullcontext:
        return nullcontext(lambda done: None)


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="validation split of WikiText-2, word-tokenised")
    parser.add_argument("--out", type=Path, default=Path("problem_r.json"))
    parser.add_argument("--model", default="llama")
    parser.add_argument("--settings", default="loss-raw,loss,kl", help="which problems, or 'allocation'")
    parser.add_argument("--strategies", default="threshold,qnehvi", help="threshold, qnehvi, random")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--checkpoints", default="20,40,100", help="numbers of evaluations; the last one is the budget")
    parser.add_argument("--heldout", default="kl", help="problems whose last front is also judged on held-out windows")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    results = Results(arguments.out)
    for name in arguments.settings.split(","):
        if name == "allocation":
            compare_allocations(loaded, arguments.text, results)
            continue
        setting = SETTINGS[name]
        config = RunConfig(
            model=arguments.model,
            min_share=setting.min_share,
            compensation=setting.compensation,
            proxy_tokens=setting.proxy_tokens,
            heldout_tokens=8192,
        )
        windows = windows_of(arguments.text, loaded, config)
        start = time.perf_counter()
        with prepared(config, loaded, windows, Quiet()) as problem:
            print(f"{name}: prepared in {time.perf_counter() - start:.1f} s", flush=True)
            judge = Judge(problem, setting, heldout=name in arguments.heldout.split(","))
            for strategy in arguments.strategies.split(","):
                # The threshold family ignores the seed.
                for seed in [0] if strategy == "threshold" else [int(seed) for seed in arguments.seeds.split(",")]:
                    key = f"{name}/{strategy}/{seed}"
                    if key not in results:
                        checkpoints = [int(count) for count in arguments.checkpoints.split(",")]
                        results.add(key, judge.run(strategy, seed, checkpoints, arguments.batch))
    print(table(results.values))


def windows_of(text: Path, loaded: LoadedModel, config: RunConfig) -> TokenWindows:
    content = text.read_text(encoding="utf-8")
    for old, new in UNDO:
        content = content.replace(old, new)
    return cut_windows(Text(f"text:{text.name}", content), loaded.tokenizer, config.windows, config.window, seed=0)


class Results:
    """A JSON file that grows by one entry at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def add(self, key: str, value: dict) -> None:
        self.values[key] = value
        self.path.write_text(json.dumps(self.values, indent=1) + "\n")
        print(key, json.dumps({k: v for k, v in value.items() if k not in ("trace", "front")}), flush=True)


class Judge:
    """Runs a strategy on a prepared problem; evaluations are shared by all strategies and seeds."""

    def __init__(self, problem: Problem, setting: Setting, heldout: bool) -> None:
        self.problem = problem
        dense = problem.dense
        reference = (1.2 if setting.quality == "kl" else dense["loss"] + setting.margin, 1.0)
        smallest = {"params_share": float(problem.family.shares[0])}
        self.objectives = build_objectives((setting.quality, "params_share"), dense, smallest, reference)
        self._heldout = problem.heldout() if heldout else None
        if self._heldout is not None:
            heldout_dense = self._heldout.evaluate(problem.space.max_levels)
            reference = (heldout_dense["loss"] + setting.margin, 1.0)
            self._heldout_objectives = build_objectives(("loss", "params_share"), heldout_dense, smallest, reference)
        self._measured: dict[tuple[int, ...], dict[str, float]] = {}
        self._judged: dict[tuple[int, ...], dict[str, float]] = {}

    def run(self, strategy: str, seed: int, checkpoints: Sequence[int], batch: int) -> dict:
        """Evaluate up to the last checkpoint; judge the front at each."""
        proposer = build_proposer(strategy, self.problem, self.objectives)
        trials: list[Trial] = []
        seconds: list[float] = []
        while len(trials) < checkpoints[-1]:
            round_number = trials[-1].round + 1 if trials else 0
            start = time.perf_counter()
            proposals = proposer.propose(
                trials, min(batch, checkpoints[-1] - len(trials)), seed * SEEDS_PER_RUN + round_number
            )
            seconds.append(time.perf_counter() - start)
            if not proposals:
                break
            for proposal in proposals:
                values = self._measure(proposal.x)
                trials.append(
                    Trial(len(trials), round_number, proposal.x, proposal.origin, TrialState.COMPLETE, values)
                )
        Y = to_maximize([trial.values for trial in trials], self.objectives)
        trace = hypervolume_trace(Y, ref_point(self.objectives))
        return {
            "hypervolume": {str(count): round(trace[min(count, len(trials)) - 1], 4) for count in checkpoints},
            "heldout_hypervolume": self._judge(trials),
            "last_proposal_seconds": round(seconds[-1], 2),
            "trace": [round(value, 5) for value in trace],
            "front": [
                {
                    "x": trial.x,
                    "share": trial.values["params_share"],
                    "proxy": dict(trial.values),
                    "heldout": self._judged.get(trial.x),
                }
                for trial in front_of(trials, self.objectives)
            ],
        }

    def _measure(self, x: tuple[int, ...]) -> dict[str, float]:
        if x not in self._measured:
            self._measured[x] = self.problem.proxy.evaluate(x)
        return self._measured[x]

    def _judge(self, trials: Sequence[Trial]) -> float | None:
        """Held-out hypervolume of the front that the proxy chose."""
        if self._heldout is None:
            return None
        front = front_of(trials, self.objectives)
        spread = {round(index * (len(front) - 1) / (JUDGED_POINTS - 1)) for index in range(JUDGED_POINTS)}
        values = []
        for trial in (front[index] for index in sorted(spread)):
            if trial.x not in self._judged:
                self._judged[trial.x] = self._heldout.evaluate(trial.x)
            values.append(self._judged[trial.x])
        return hypervolume(to_maximize(values, self._heldout_objectives), ref_point(self._heldout_objectives))


def compare_allocations(
    loaded: LoadedModel, text: Path, results: Results, shares: Sequence[float] = (0.45, 0.55, 0.65, 0.75, 0.85)
) -> None:
    """Held-out loss of the threshold family when widths are allocated by Taylor and by Fisher scores."""
    config = RunConfig(model=loaded.name, heldout_tokens=8192)
    windows = windows_of(text, loaded, config)
    statistics = collect_statistics(loaded.model, windows.calibration)
    scores = {"taylor": taylor(loaded.model, statistics), "fisher": fisher(loaded.model, statistics)}
    del statistics
    for compensation in (True, False):
        with prepared(replace(config, compensation=compensation), loaded, windows, Quiet()) as problem:
            heldout = problem.heldout()
            for name, importance in scores.items():
                family = ThresholdFamily.from_importance(problem.space, importance)
                losses = {share: round(heldout.evaluate(family.at(share))["loss"], 3) for share in shares}
                results.add(f"allocation/{name}/{'compensated' if compensation else 'raw'}", {"heldout_loss": losses})


def table(values: dict[str, dict]) -> str:
    """Means over seeds, one line for each problem and strategy."""
    groups: dict[str, list[dict]] = {}
    for key, value in values.items():
        if "hypervolume" in value:
            groups.setdefault(key.rpartition("/")[0], []).append(value)
    lines = [
        "problem/strategy     seeds  hypervolume at number of evaluations, mean over seeds (and of the last front, held-out)"
    ]
    for key, runs in groups.items():
        means = [
            f"{count}: {sum(run['hypervolume'][count] for run in runs) / len(runs):.4f}"
            for count in runs[0]["hypervolume"]
        ]
        judged = [run["heldout_hypervolume"] for run in runs if run["heldout_hypervolume"] is not None]
        means += [f"(held-out {sum(judged) / len(judged):.4f})"] if judged else []
        lines.append(f"{key:24}{len(runs):2}  {'  '.join(means)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
