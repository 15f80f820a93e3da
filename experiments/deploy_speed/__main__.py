"""Dense against exported models side by side: prefill and decode apart, in transformers and in llama.cpp.

    python -m experiments.deploy_speed runs/llama --threads 2

For each share the run's front point nearest to it is cut and exported. Speed depends on shapes alone, so ranking and
compensation are left out. Models take turns in every repetition, and a speed-up is the median over repetitions of the
dense model's time by the exported one's in the same repetition, with the quartiles: a busy machine slows both. Batch size is 1.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from llama_cpp import Llama
from transformers import PreTrainedModel

from experiments.speeds import Times, cells
from llmbo.models.loading import load_model
from llmbo.models.placement import DTYPES
from llmbo.models.silence import silence_libraries
from llmbo.run.rebuild import read_run
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.cost import cost_of
from pruning.export import Pruned
from pruning.export.gguf_file import write_gguf
from pruning.export.quantise import FILE_TYPES, Mixture
from pruning.export.rebuild import rebuilt
from pruning.shrinking import shrink_to


def main() -> None:
    silence_libraries()
    options = _options()
    torch.set_num_threads(options.threads)
    report = read_run(options.run)
    loaded = load_model(report.run.settings["model"], options.dtype, "cpu")
    anatomy = anatomy_of(loaded.model)
    points = [Architecture.from_dict(point.architecture.model_dump()) for point in report.front]
    chosen = {"dense": Architecture.full(anatomy)}
    for share in options.shares:
        nearest = min(points, key=lambda point: abs(cost_of(anatomy, point).share - share))
        chosen[f"{cost_of(anatomy, nearest).share:.1%}"] = nearest
    prompt = torch.randint(anatomy.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, dict[str, Callable[[], Times]]] = {"transformers": {}, "llama.cpp": {}}
        sizes: dict[str, dict[str, int]] = {"transformers": {}, "llama.cpp": {}}
        for name, architecture in chosen.items():
            pruned = Pruned(shrink_to(loaded.model, architecture), anatomy, architecture)
            path = Path(folder, f"{name}.gguf")
            write_gguf(pruned, path, Mixture.of(options.gguf_dtype), name)
            sizes["llama.cpp"][name] = path.stat().st_size
            hf = rebuilt(pruned.model, anatomy, architecture)
            sizes["transformers"][name] = sum(weight.numel() * weight.element_size() for weight in hf.parameters())
            runners["transformers"][name] = _in_transformers(hf, prompt, options.tokens)
            runners["llama.cpp"][name] = _in_llama_cpp(path, prompt[0].tolist(), options.tokens, options.threads)
        times = _measure(runners, options.repeats)
    result = {
        "settings": vars(options) | {"batch": 1, "out": str(options.out)},
        "versions": {name: version(name) for name in ("torch", "transformers", "llama-cpp-python")},
        "platform": platform.platform(),
        "models": {name: architecture.to_dict() for name, architecture in chosen.items()},
        "bytes": sizes,
        "seconds": times,
    }
    print(
        f"batch 1, {options.threads} threads, prompt {options.prompt}, {options.tokens} decoded tokens, {options.repeats} repetitions"
    )
    print(
        f"transformers in {options.dtype}, llama.cpp in {options.gguf_dtype}; speed-ups are medians of paired ratios (quartiles)\n"
    )
    print(_table(times, sizes, options.prompt))
    options.out.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="finished run: a folder, or a name below runs/")
    parser.add_argument(
        "--shares", type=lambda text: [float(part) for part in text.split(",")], default=[0.8, 0.65, 0.5]
    )
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prefill")
    parser.add_argument("--tokens", type=int, default=24, help="decoded tokens")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of transformers")
    parser.add_argument("--gguf-dtype", choices=list(FILE_TYPES), default="f16")
    parser.add_argument("--out", type=Path, default=Path("deploy_speed.json"), help="JSON file for every measured time")
    return parser.parse_args()


def _in_transformers(model: PreTrainedModel, prompt: torch.Tensor, tokens: int) -> Callable[[], Times]:
    @torch.inference_mode()
    def run() -> Times:
        with stopwatch() as prefill:
            out = model(prompt, use_cache=True, logits_to_keep=1)
        with stopwatch() as decode:
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return prefill[0], decode[0] / tokens

    return run


def _in_llama_cpp(path: Path, prompt: list[int], tokens: int, threads: int) -> Callable[[], Times]:
    model = Llama(
        str(path), n_ctx=len(prompt) + tokens, n_batch=len(prompt), n_ubatch=len(prompt), n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip

    def run() -> Times:
        model.reset()
        with stopwatch() as prefill:
            model.eval(prompt)
        with stopwatch() as decode:
            for index in range(tokens):
                model.eval([prompt[index]])
        return prefill[0], decode[0] / tokens

    return run


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A list that holds the seconds spent inside, afterwards."""
    spent: list[float] = []
    start = time.perf_counter()
    yield spent
    spent.append(time.perf_counter() - start)


def _measure(runners: dict[str, dict[str, Callable[[], Times]]], repeats: int) -> dict[str, dict[str, list[Times]]]:
    """Times by engine and model, one entry for each repetition; a first round warms up and is not counted."""
    times: dict[str, dict[str, list[Times]]] = {
        engine: {name: [] for name in models} for engine, models in runners.items()
    }
    for repetition in range(repeats + 1):
        for engine, models in runners.items():
            for name, run in models.items():
                measured = run()
                if repetition:
                    times[engine][name].append(measured)
    return times


def _table(times: dict[str, dict[str, list[Times]]], sizes: dict[str, dict[str, int]], prompt: int) -> str:
    lines = [
        "| engine | model | file MB | prefill tok/s | speed-up | decode tok/s | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for engine, models in times.items():
        for name, measured in models.items():
            lines.append(
                f"| {engine} | {name} | {sizes[engine][name] / 1e6:.0f} | {cells(models['dense'], measured, prompt)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
