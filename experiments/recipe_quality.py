"""What a recipe is worth: KL of its path's members over KL of the path of dense prices at equal size, on windows that nothing else saw.

    python -m experiments.recipe_quality --text builtin --text text:path/to/wikitext2-valid.txt --seeds 3
    python -m experiments.recipe_quality --recipe mine.json

Each path is prepared as a run with that recipe prepares it: with what was measured at members of its own (`llmbo.problem.expansion`). A
seed deals out the windows. The mean of the logarithms over all sizes is one value for each text and seed; its interval over them is
Student's.
"""

import argparse
import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from experiments.quiet import Quiet
from llmbo.comparison.problems import undo_spacing
from llmbo.comparison.statistics import band
from llmbo.config import RunConfig
from llmbo.models.loading import LoadedModel, load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.method import DEFAULT
from llmbo.problem.preparation import prepared
from llmbo.problem.proxy import ProxyEvaluator
from llmbo.problem.recipe import DENSE_PRICES, AllocationRecipe, recipe_of
from llmbo.search.gain import EPSILON, FamilyCurve
from pruning.calibration import TokenWindows, cut_windows
from pruning.text import Text, read_text

SHARES = torch.tensor([0.44, 0.5, 0.57, 0.64, 0.71, 0.78, 0.85, 0.92], dtype=torch.float64)


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", action="append", help="may be given several times (builtin)")
    parser.add_argument("--recipe", default="default", help="as of `llmbo optimize`")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--judged", type=int, default=24, help="windows to judge by")
    options = parser.parse_args()
    recipe_of(options.recipe)  # refused before anything is loaded
    loaded = load_model(options.model)
    values = []
    print("text, seed".ljust(24) + "".join(f"{share:>7.2f}" for share in SHARES.tolist()) + "   mean", flush=True)
    for name in options.text or ["builtin"]:
        for seed in range(options.seeds):
            ratios = log_ratios(loaded, name, seed, options.judged, options.recipe)
            values.append(sum(ratios) / len(ratios))
            row = "".join(f"{math.exp(ratio):7.3f}" for ratio in [*ratios, values[-1]])
            print(f"{name[-20:]}, {seed}".ljust(24) + row, flush=True)
    if len(values) > 1:
        found = band(values)
        low, middle, high = (math.exp(value) for value in (found.low, found.mean, found.high))
        print(f"all: {middle:.3f} ({low:.3f} to {high:.3f})")


@dataclass(frozen=True)
class Members:
    """Measured members of a path: `n` shares, and KL on every window, `n x windows`."""

    shares: Tensor
    kl: Tensor

    @classmethod
    def of(cls, evaluator: ProxyEvaluator, rows: Tensor) -> Self:
        """Measure `n x d` levels."""
        found = evaluator.evaluate([tuple(row) for row in rows.int().tolist()])
        kl = torch.tensor([one.windows["kl"] for one in found], dtype=torch.float64)
        return cls(evaluator.space.share(rows), kl)

    def log_ratios(self, reference: "Members") -> Tensor:
        """log KL, `EPSILON` added, less that of the reference at equal size: `n`, lower is better."""
        curve = FamilyCurve.through(reference.shares, reference.kl.mean(-1))
        return (self.kl.mean(-1) + EPSILON).log() - curve(self.shares)

    def pseudo_values(self, reference: "Members") -> Tensor:
        """The jackknife's, of the mean of `log_ratios`: one for each of at least two windows, which vary as the mean does."""
        n = self.kl.shape[1]
        without = [
            replace(self, kl=_but(self.kl, i)).log_ratios(replace(reference, kl=_but(reference.kl, i)))
            for i in range(n)
        ]
        return n * self.log_ratios(reference).mean() - (n - 1) * torch.stack(without).mean(-1)


def _but(kl: Tensor, window: int) -> Tensor:
    return torch.cat([kl[:, :window], kl[:, window + 1 :]], dim=1)


def log_ratios(loaded: LoadedModel, name: str, seed: int, judged: int, recipe: str) -> list[float]:
    """At every share; a recipe is named as by `--recipe`."""
    config = RunConfig(model=loaded.name, text=name, seed=seed, calibration_tokens=16_384)
    text = read_text(name)
    counts = {"calibration": 16_384 // config.window, "proxy": 1, "heldout": judged}
    windows = cut_windows(Text(text.source, undo_spacing(text.content)), loaded.tokenizer, counts, config.window, seed)
    dense_prices = measured(config, loaded, windows, DENSE_PRICES)
    return measured(config, loaded, windows, recipe_of(recipe)).log_ratios(dense_prices).tolist()


def measured(config: RunConfig, loaded: LoadedModel, windows: TokenWindows, recipe: AllocationRecipe) -> Members:
    """A path at `SHARES` on held-out windows, prepared for itself: exchanges hold for the path they were measured along."""
    with prepared(config, loaded, windows, Quiet(), method=replace(DEFAULT, allocation=recipe)) as problem:
        return Members.of(problem.heldout(), problem.prices.members_of(recipe, SHARES))


if __name__ == "__main__":
    main()
