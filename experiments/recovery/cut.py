"""A SmolLM2 with 60 % of its block parameters, from the threshold family, as a folder to recover. See README.md.

python -m experiments.recovery.cut exports/p60
"""

import json
import sys
from pathlib import Path

from llmbo.models.loading import load_model
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.preparation import fitted
from llmbo.problem.space import SearchSpace
from pruning.anatomy import anatomy_of
from pruning.calibration import cut_windows
from pruning.export.hf import Pruned, save_hf
from pruning.importance import fisher
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.text import read_text

SHARE = 0.6


def main(out: Path) -> None:
    loaded, text = load_model("llama"), read_text("builtin")
    counts = {"calibration": 32, "proxy": 1, "heldout": 1}
    windows = cut_windows(text, loaded.tokenizer, counts, length=256, seed=0)
    anatomy = anatomy_of(loaded.model)
    space = SearchSpace(anatomy)
    found, _ = fitted(loaded, windows.calibration, space)
    family = ThresholdFamily.from_importance(space, fisher(found.statistics))
    architecture = space.decode(family.at(SHARE))
    small = shrink(loaded.model, PruningMask.from_architecture(architecture, found.ranking), found.refits)
    details = {"base_model": {"name": "llama"}, "text": {"sha256": text.sha256}}
    check = save_hf(Pruned(small, anatomy, architecture, loaded.tokenizer), out, {"llmbo.json": json.dumps(details)})
    print(f"{out}: {small.num_parameters() / 1e6:.1f}M parameters, difference when loaded again {check.difference:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
