"""Held-out loss of the threshold families at fixed shares: how widths are best allocated without any search.

    python -m experiments.allocation experiments/configs/peers.toml --text text:path/to/wikitext2-valid.txt

The families are those of `llmbo.problem.preparation.Problem`: the default one, the same before width exchanges between blocks, Fisher
scores, and Taylor scores as in LLM-Pruner (arXiv:2305.11627); with and without compensation, on the config's held-out windows.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from experiments.quiet import Quiet
from llmbo.comparison.config import read_config
from llmbo.comparison.problems import opened
from llmbo.comparison.store import EvaluationStore
from llmbo.models.silence import silence_libraries

SHARES = (0.45, 0.55, 0.65, 0.75, 0.85)
FAMILIES = ("family", "threshold_family", "fisher_family", "taylor_family")


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--text", help="replaces the problem's text")
    parser.add_argument("--cache", type=Path, default=Path("comparisons/evaluations.db"))
    arguments = parser.parse_args()
    config = read_config(arguments.config, text=arguments.text)
    base = next(arm.problem for arm in config.arms if arm.label == config.method)
    print("family          compensation  " + "".join(f"{share:>8.2f}" for share in SHARES))
    with EvaluationStore.open(arguments.cache) as store:
        for compensation in (True, False):
            anchors = base.run.refit_anchors if compensation else 0  # they are refits
            wanted = replace(base, run=replace(base.run, compensation=compensation, refit_anchors=anchors))
            with opened(wanted, [wanted], config.margin, wanted.run.objectives, store, Quiet()) as problem:
                assert problem.judge is not None
                for name in FAMILIES:
                    family = getattr(problem.search, name)
                    losses = [problem.judge(family.at(share), name).values["loss"] for share in SHARES]
                    print(f"{name:16}{compensation!s:14}" + "".join(f"{loss:8.3f}" for loss in losses), flush=True)


if __name__ == "__main__":
    main()
