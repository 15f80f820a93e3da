"""What a few steps of training give back to a 60 % SmolLM2: all weights or adapters, text or distillation.

    python -m experiments.recovery --out recovery.json

The cut model is the same for all methods (see `cut.py`); validation and final comparison use windows that neither pruning nor training
has seen. With --interrupt every training is stopped after its first validation and started again, which must change nothing.
"""

import argparse
import json
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.quiet import Quiet
from experiments.recovery.cut import main as cut
from llmbo.models.silence import silence_libraries
from llmbo.training.recovery import Outcome, Task, recover
from llmbo.training.trainer import Plan, Progress

METHODS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"lora": 16},
    "distilled": {"distil": True},
    "LoRA distilled": {"lora": 16, "distil": True},
}


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of 4 x 256 tokens")
    parser.add_argument("--methods", default=",".join(METHODS), help="by commas")
    parser.add_argument("--interrupt", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("recovery.json"))
    options = parser.parse_args()
    plans = {name: Plan(options.steps, every=20, **changes) for name, changes in METHODS.items()}
    results: dict[str, dict[str, object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder, "small")
        cut(small)
        print("| method | seconds | held-out loss before | after | gain |\n|---|---|---|---|---|")
        for name in options.methods.split(","):
            start = time.perf_counter()
            outcome = trained(small, Path(folder, name), plans[name], options.interrupt)
            seconds = time.perf_counter() - start
            print(
                f"| {name} | {seconds:.0f} | {outcome.before:.3f} | {outcome.after:.3f} | {outcome.gain:+.3f} |",
                flush=True,
            )
            results[name] = {"plan": asdict(plans[name]), "seconds": seconds, "gain": outcome.gain, **asdict(outcome)}
            options.out.write_text(json.dumps(results, indent=2) + "\n")


def trained(small: Path, out: Path, plan: Plan, interrupt: bool) -> Outcome:
    task = Task(str(small), out, "builtin", 256, 12, "", "auto", "auto")
    if interrupt:
        with suppress(KeyboardInterrupt):
            recover(task, plan, "", Quiet(), stop_after_first)
    return recover(task, plan, "", Quiet())


def stop_after_first(progress: Progress) -> None:
    if len(progress.history) > 1:
        raise KeyboardInterrupt


if __name__ == "__main__":
    main()
