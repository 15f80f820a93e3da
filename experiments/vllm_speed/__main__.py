"""vLLM's two routes for models whose layers differ, timed side by side: its own DeciLM class, and its Transformers backend.

    python -m experiments.vllm_speed --python .venv-vllm/bin/python --shares 0.8 0.65 0.5

SmolLM2 dense, as vLLM's own Llama class serves it, and members of uniform MLPs that both routes hold: attention whole, or absent in some
layers. Each model has a process of its own, and these take turns in every repetition; a speed-up is the median over repetitions of the
dense model's time by the other one's in the same repetition, with the quartiles. Batch size is 1; vLLM compiles as it does by default,
unless `--eager`. `make .venv-vllm/.installed` makes the environment.
"""

import argparse
import json
import os
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from experiments.speeds import Times, cells
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.cost import cost_of
from pruning.export import Pruned
from pruning.export.rebuild import rebuilt
from pruning.export.vllm import decilm
from pruning.shrinking import shrink_to

STEP = 32  # neurons
GONE = 0.4  # of what is cut of the blocks, so much is attention of whole layers


class Timed:
    """A process that holds one model and computes on request."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.served_as: str = self._next()["ready"]

    def run(self) -> Times:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        prefill, decode = self._next()
        return prefill, decode

    def _next(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("{", "[")):  # vLLM prints, too
                return json.loads(line)
        raise SystemExit(f"vLLM ended with {self._process.wait()}: see above.")


def member(anatomy: Anatomy, share: float) -> Architecture:
    """Attention absent in evenly spread layers, then MLPs of one width: the largest such model of at most this share of the blocks."""
    layers, groups = anatomy.num_hidden_layers, anatomy.num_key_value_heads
    mlps = (anatomy.intermediate_size,) * layers
    one = (
        1 - cost_of(anatomy, Architecture((0,) + (groups,) * (layers - 1), mlps)).share
    )  # of the blocks, a layer's attention
    absent = round(GONE * (1 - share) / one)
    attention = [groups] * layers
    for index in range(absent):
        attention[(2 * index + 1) * layers // (2 * absent)] = 0
    for width in range(anatomy.intermediate_size, 0, -STEP):
        found = Architecture(tuple(attention), (width,) * layers)
        if cost_of(anatomy, found).share <= share:
            return found
    raise SystemExit(f"no model of {share:g} of the blocks")


def main() -> None:
    silence_libraries()
    options = _options()
    loaded = load_model("llama", options.dtype, "cpu")
    anatomy = anatomy_of(loaded.model)
    settings = {key: getattr(options, key) for key in ("prompt", "tokens", "dtype", "eager")}
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        timed: dict[tuple[str, str], Timed] = {}

        def start(name: str, route: str, model: PreTrainedModel) -> None:
            folder = scratch / f"{len(timed)}"
            model.save_pretrained(folder)
            words = [options.python, str(Path(__file__).with_name("timed.py")), str(folder), json.dumps(settings)]
            process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            stack.callback(process.kill)
            timed[name, route] = Timed(process)

        start("dense", "its own class", loaded.model)
        for share in options.shares:
            architecture = member(anatomy, share)
            pruned = Pruned(shrink_to(loaded.model, architecture), anatomy, architecture)
            name = f"{share:g}, {sum(units == 0 for units in architecture.kv_groups)} layers without attention"
            start(name, "DeciLM", decilm(pruned))
            start(name, "Transformers backend", rebuilt(pruned.model, anatomy, architecture))
        times: dict[tuple[str, str], list[Times]] = {key: [] for key in timed}
        for repetition in range(options.repeats + 1):
            for key, process in timed.items():
                measured = process.run()
                if repetition:
                    times[key].append(measured)
    print(
        "| of the blocks | served by | prefill tok/s | speed-up | decode tok/s | speed-up |\n|---|---|---|---|---|---|"
    )
    dense = times["dense", "its own class"]
    for (name, route), measured in times.items():
        told = cells(dense, measured, options.prompt)
        print(f"| {name} | {route} ({timed[name, route].served_as}) | {told} |")
    if options.out:
        kept = [{"model": key[0], "route": key[1], "seconds": measured} for key, measured in times.items()]
        options.out.write_text(json.dumps({"settings": settings, "times": kept}, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="of the environment that holds vLLM")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="of the blocks")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=24, help="decoded tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without compilation")
    parser.add_argument("--out", type=Path, help="JSON file for every measured time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
