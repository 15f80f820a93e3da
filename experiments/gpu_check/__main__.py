"""What preparation and candidates of a large model take on this device, beside what its matrix products would take alone.

    python -m experiments.gpu_check                           # Llama-3.1-8B's shape, random weights, all layers on the device
    python -m experiments.gpu_check --memory 24GB             # as on a smaller card
    python -m experiments.gpu_check --preset 1.5b --tokens 2048 --candidates 2 --device cpu

Weights are made on the spot, so that nothing is downloaded. Reported: the device's own rate at matrix products of the model's size,
bytes at the peak beside the formula's (`pruning/footprint.py`), seconds of preparation, and seconds of a candidate as a multiple of
its matrix products' at that rate.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.random_model import PRESETS, random_config, write_random_model
from llmbo.config import RunConfig
from llmbo.models.loading import LoadedModel, find_prunable, load_model
from llmbo.models.placement import DTYPES, choose_device
from llmbo.models.stored import anatomy_of_config
from llmbo.problem.residence import Machine, choose_residence, refit_cache
from llmbo.problem.space import SearchSpace, space_of
from llmbo.run.duration import Rates
from pruning.architecture import Architecture
from pruning.cost import cost_of
from pruning.memory import _Allocations
from pruning.refits import fit
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
    parser.add_argument("--memory", default="", help="most to take on the device, e.g. 24GB")
    parser.add_argument("--offload", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--model", type=Path, help="a folder that `experiments.random_model` wrote, instead of making one"
    )
    parser.add_argument("--out", type=Path, help="JSON file for every figure")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = check(options, Path(folder))
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
    config = RunConfig(
        str(source), window=options.window, calibration_tokens=options.tokens, proxy_tokens=options.proxy_tokens,
        memory=options.memory, offload=options.offload, device=device, dtype="bfloat16",
    )  # fmt: skip
    dtype = DTYPES[config.dtype]
    anatomy = anatomy_of_config(find_prunable(str(source)))
    residence = choose_residence(config, anatomy, dtype.itemsize, Machine.of(device))
    rates = Rates.measure(anatomy, dtype, device, 8 * options.window)
    loaded = load_model(str(source), config.dtype, device, residence.offload)
    weights = torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0
    space = space_of(config, anatomy)
    cached = refit_cache(config, anatomy, dtype.itemsize, Machine.of(device), residence.offload)
    preparation, first, again = _measured(loaded, config, space, folder / "prepared", options.candidates, cached)
    tokens = config.windows["proxy"] * config.window
    products = [2 * cost_of(anatomy, one).parameters * tokens for one in some_candidates(space, options.candidates)]
    floor = sum(products) / len(products) / rates.matmul
    return {
        "device": torch.cuda.get_device_name(device) if weights else device,
        "matrix products, TFLOP/s": round(rates.matmul / 1e12, 3),
        "layers wait": residence.offload,
        "weights on the device, GB": round(weights / 1e9, 3),
        "peak of preparation, GB": round((weights + preparation.bytes) / 1e9, 3),
        "peak of candidates, GB": round((weights + first.bytes) / 1e9, 3),
        "of these for refits, GB": round(cached / 1e9, 3),
        "peak by the formula, GB": round(residence.needed / 1e9, 3),
        "preparation, seconds": round(preparation.seconds, 2),
        "tokens": options.tokens,
        "its matrix products alone": round(floor, 3),
        **{
            f"a candidate, {when}": f"{one.seconds / options.candidates:.3f} s: {one.seconds / options.candidates / floor:.2f}"
            for when, one in (("refits from files", first), ("refits kept", again))
        },
    }


def some_candidates(space: SearchSpace, number: int) -> list[Architecture]:
    """About six tenths of the units, every block at a level of its own: what a search asks for shares few refits."""
    most = torch.tensor(space.max_levels)
    shares = 0.6 + 0.4 * (torch.rand(number, len(most), generator=torch.Generator().manual_seed(0)) - 0.5)
    return [space.decode(tuple(levels)) for levels in (shares * most).round().int().tolist()]


def _measured(
    loaded: LoadedModel, config: RunConfig, space: SearchSpace, folder: Path, candidates: int, cached: int
) -> tuple[Taken, Taken, Taken]:
    """Preparation up to the refits, so many candidates together, and the same ones again."""
    device, draw = torch.device(loaded.device), torch.Generator().manual_seed(0)
    calibration, proxy = (
        torch.randint(space.anatomy.vocab_size, (config.windows[part], config.window), generator=draw)
        for part in ("calibration", "proxy")
    )
    scored = min(len(calibration), 8192 // config.window)
    batch = 8 if device.type == "cuda" else 2

    def prepare() -> Supernet:
        files = TensorFiles(folder)
        fitted = fit(
            loaded.model, calibration, space.widths, files, scored=scored, batch_size=batch, cache_bytes=cached
        )
        return Supernet(loaded.model, fitted.ranking, fitted.refits, loaded.resident)

    supernet, preparation = _taken(device, prepare)
    with supernet:
        dense = supernet.distribution(proxy)
        supernet.qualities([Architecture.full(space.anatomy)], proxy, dense)  # what is made once and stays
        own = some_candidates(space, candidates)
        first, again = (_taken(device, lambda: supernet.qualities(own, proxy, dense))[1] for _ in range(2))
    return preparation, first, again


def _taken(device: torch.device, run: Callable[[], Any]) -> tuple[Any, Taken]:
    start = time.perf_counter()
    with _Allocations(device) as allocations:
        found = run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return found, Taken(seconds, allocations.peak)


if __name__ == "__main__":
    main()
