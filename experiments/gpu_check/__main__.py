"""What preparation and candidates of a large model take on this device, beside what its matrix products would take alone.

    python -m experiments.gpu_check                                  # Llama-3.1-8B's shape, random weights, all layers on the device
    python -m experiments.gpu_check --memory none 24GB               # candidates also as on a smaller card
    python -m experiments.gpu_check --preset llama-3.1-70b --layers 8 --offload cpu    # layers wait on the host
    python -m experiments.gpu_check --preset 1.5b --tokens 2048 --candidates 2 --device cpu
    python -m experiments.gpu_check --end-to-end llama    # and a search of a real model by the defaults

Weights are made on the spot, so that nothing is downloaded. Reported: the device's own rate at matrix products of the model's size,
bytes at the peak beside the formula's (`pruning/footprint.py`), seconds of preparation, and for every limit of memory seconds of a
candidate as a multiple of its matrix products' at that rate: when its refits are asked for first, and when they were asked for before.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.random_model import PRESETS, random_config, write_random_model
from llmbo import optimize
from llmbo.config import RunConfig
from llmbo.models.loading import LoadedModel, find_prunable, load_model
from llmbo.models.placement import DTYPES, choose_device
from llmbo.models.stored import anatomy_of_config
from llmbo.problem.method import DEFAULT
from llmbo.problem.residence import Machine, choose_residence, refit_cache
from llmbo.problem.space import SearchSpace, space_of
from llmbo.run.duration import Rates, wait_for
from pruning.architecture import Architecture
from pruning.cost import Serving, cost_of
from pruning.memory import _Allocations
from pruning.refits import GridRefits, RefitCache, fit
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles


@dataclass(frozen=True)
class Taken:
    """What a part took: seconds, and bytes on the device beyond what lay there before."""

    seconds: float
    bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the preset has, for a look in minutes")
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration")
    parser.add_argument("--proxy-tokens", type=int, default=3072)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument(
        "--memory", nargs="+", default=["none"], help="most to take on the device, e.g. 24GB; the first one prepares"
    )
    parser.add_argument("--offload", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--model", type=Path, help="a folder that `experiments.random_model` wrote, instead of making one"
    )
    parser.add_argument("--end-to-end", metavar="MODEL", help="also search this one")
    parser.add_argument("--budget", type=int, default=40, help="candidates of that search")
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = check(options, Path(folder))
        if options.end_to_end:
            found |= end_to_end(options.end_to_end, Path(folder), budget=options.budget, device=options.device)
    print("\n".join(f"{name:28} {value}" for name, value in found.items()))
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def check(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures by name."""
    device = choose_device(options.device)
    source = options.model or folder / "model"
    if options.model is None:
        sizes = PRESETS[options.preset] | ({"layers": options.layers} if options.layers else {})
        write_random_model(random_config(**sizes), source, device=device)
    configs = {
        memory: RunConfig(
            str(source), window=options.window, calibration_tokens=options.tokens, proxy_tokens=options.proxy_tokens,
            memory="" if memory == "none" else memory, offload=options.offload, device=device, dtype="bfloat16",
        )
        for memory in options.memory
    }  # fmt: skip
    config = next(iter(configs.values()))
    dtype = DTYPES[config.dtype]
    anatomy = anatomy_of_config(find_prunable(str(source)))
    residence = choose_residence(config, anatomy, dtype.itemsize, Machine.of(device))
    rates = Rates.measure(anatomy, dtype, device, config.windows["proxy"] * config.window)
    loaded = load_model(str(source), config.dtype, device, residence.offload)
    weights = torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0
    space, batch = space_of(config, anatomy), options.candidates
    bench = Bench(loaded, config, space, folder / "prepared")
    found = {
        "device": torch.cuda.get_device_name(device) if weights else device,
        "matrix products, TFLOP/s": round(rates.matmul / 1e12, 3),
        **({"copies from the host, GB/s": round(rates.link / 1e9, 2)} if rates.link else {}),
        "layers wait": residence.offload,
        "weights on the device, GB": round(weights / 1e9, 3),
        "peak of preparation, GB": round((weights + bench.preparation.bytes) / 1e9, 3),
        "peak by the formula, GB": round(residence.needed / 1e9, 3),
        "preparation, seconds": round(bench.preparation.seconds, 2),
        "tokens": options.tokens,
    }
    tokens, serving = config.windows["proxy"] * config.window, Serving(context=(config.window + 1) // 2)
    candidates = some_candidates(space, batch)
    floor = sum(cost_of(anatomy, one, serving).flops for one in candidates) * tokens / batch / rates.matmul
    found["a candidate's products alone"] = f"{floor:.4f} s"
    for memory, limited in configs.items():
        cache = refit_cache(limited, anatomy, dtype.itemsize, Machine.of(device), residence.offload)
        first, *again = bench.candidates(candidates, cache)
        best = min(again, key=lambda taken: taken.seconds)
        told = {"first": first, "again": best}
        found |= {
            f"--memory {memory}, refits kept, GB": round(cache.most / 1e9, 3),
            f"--memory {memory}, peak, GB": round((weights + first.bytes) / 1e9, 3),
            **{
                f"--memory {memory}, a candidate, {when}": f"{one.seconds / batch:.4f} s: {one.seconds / batch / floor:.2f}"
                for when, one in told.items()
            },
        }
    return found


def end_to_end(model: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """A search of a real model, and what it found."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    start = time.perf_counter()
    with chdir(folder):
        run = optimize(model, show="nothing", **settings)
    seconds = time.perf_counter() - start
    trials, front = run.report.trials, run.report.front
    return {
        f"{model}, from loading to the page": f"{seconds:.1f} s",
        "candidates": f"{sum(trial.state == 'complete' for trial in trials)}, {len(front)} on the front",
        "hypervolume": run.report.hypervolume.final,
    }


def some_candidates(space: SearchSpace, number: int) -> list[Architecture]:
    """About six tenths of the units, every block at a level of its own: what a search asks for shares few refits."""
    most = torch.tensor(space.max_levels)
    shares = 0.6 + 0.4 * (torch.rand(number, len(most), generator=torch.Generator().manual_seed(0)) - 0.5)
    return [space.decode(tuple(levels)) for levels in (shares * most).round().int().tolist()]


class Bench:
    """A model that is prepared up to its refits, which was measured."""

    def __init__(self, loaded: LoadedModel, config: RunConfig, space: SearchSpace, folder: Path) -> None:
        self._loaded, self._device = loaded, torch.device(loaded.device)
        self._files, draw = TensorFiles(folder), torch.Generator().manual_seed(0)
        calibration, self._proxy = (
            torch.randint(space.anatomy.vocab_size, (config.windows[part], config.window), generator=draw)
            for part in ("calibration", "proxy")
        )
        scored = min(len(calibration), DEFAULT.scored_tokens // config.window)
        self._fitted, self.preparation = _taken(
            self._device, lambda: fit(loaded.model, calibration, space.widths, self._files, scored=scored)
        )

    def candidates(self, own: Sequence[Architecture], cache: RefitCache, repeats: int = 3) -> list[Taken]:
        """So many candidates one after the other, as a search has them, and the same ones again."""
        loaded = self._loaded
        refits = GridRefits(self._files, self._fitted.ranking, self._device, cache)
        with Supernet(loaded.model, self._fitted.ranking, refits, loaded.resident) as supernet:
            dense = supernet.distribution(self._proxy)

            def judge() -> None:
                for some in [own] if not loaded.resident else [[one] for one in own]:
                    supernet.qualities(some, self._proxy, dense)

            supernet.quality(Architecture.full(supernet.anatomy), self._proxy, dense)  # what is made once and stays
            return [_taken(self._device, judge)[1] for _ in range(repeats)]


def _taken(device: torch.device, run: Callable[[], Any]) -> tuple[Any, Taken]:
    start = time.perf_counter()
    with _Allocations(device) as allocations:
        found = run()
        wait_for(device)
        seconds = time.perf_counter() - start
    return found, Taken(seconds, allocations.peak)


if __name__ == "__main__":
    main()
