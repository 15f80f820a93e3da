"""What bits and what units are worth: KL from the dense model against bytes of the GGUF file, on windows that nothing else saw.

    python -m experiments.bits                              # SmolLM2, about ten minutes on two CPU cores
    python -m experiments.bits --text text:wikitext2.txt --shares 1.0 0.9 --types q8_0 q4_0

Models of the allocation path with their refits, at each share, are written as each file type, and a model in torch that has the file's own
weights is measured in float32, so that only the weights' bits count: llama.cpp also rounds what goes into coarse matrices to 8 bits.
With --llama-cpp the last row is measured there as well, on some of the windows. The path knows nothing of bits, and refits are solved
before weights are quantised.
"""

import argparse
import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.quiet import Quiet
from llmbo.comparison.problems import undo_spacing
from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import prepared
from pruning.anatomy import anatomy_of
from pruning.calibration import cut_windows
from pruning.cost import cost_of
from pruning.export import Pruned
from pruning.export.gguf_file import write_gguf
from pruning.export.llama_cpp import with_weights_of
from pruning.export.quantise import FILE_TYPES, Mixture
from pruning.export.reader import reader
from pruning.export.rebuild import cast
from pruning.export.verify import expected_logits
from pruning.likelihood import DenseDistribution, dense_distribution, quality
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.text import Text, read_text

IN_LLAMA_CPP = 4  # windows


@dataclass(frozen=True)
class Row:
    """One file.

    Args:
        share: Of the decoder blocks' parameters.
        size: Bytes of the file.
        kl: Of its weights from the dense model, nats per token.
    """

    share: float
    kind: str
    size: int
    kl: float


def measured(
    pruned: Pruned, path: Path, kind: str, windows: Tensor, dense: DenseDistribution, calibration: Tensor
) -> Row:
    """The file of one type, written to `path`, and what its weights compute.

    Args:
        windows: To judge on, `num_windows x length`; `dense` was taken on them.
        calibration: For K-quants.
    """
    write_gguf(pruned, path, Mixture.of(kind), "bits", calibration)
    kl = quality(with_weights_of(pruned, path), windows, dense).kl
    assert kl is not None  # there is a dense model to compare with
    return Row(cost_of(pruned.anatomy, pruned.architecture).share, kind, path.stat().st_size, kl)


def better(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats in both, by size."""
    return sorted(
        (row for row in rows if not any(other.size <= row.size and other.kl < row.kl for other in rows)),
        key=lambda row: row.size,
    )


def in_both(pruned: Pruned, path: Path, windows: Tensor, dense: PreTrainedModel) -> tuple[float, float]:
    """KL over the whole vocabulary of what torch and llama.cpp compute from a file, nats per token."""
    with reader("reload_gguf.py") as read:
        found = read(path, {"tokens": windows, "text": torch.zeros(0, dtype=torch.uint8)})()["logits"]
    own, expected = (expected_logits(model, windows) for model in (with_weights_of(pruned, path), dense))
    first, second = (
        nn.functional.kl_div(
            logits[:, :-1].log_softmax(-1), expected[:, :-1].log_softmax(-1), reduction="sum", log_target=True
        )
        for logits in (own, found)
    )
    tokens = windows[:, 1:].numel()
    return float(first) / tokens, float(second) / tokens


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.8, 0.65])
    parser.add_argument("--types", choices=list(FILE_TYPES), nargs="+", default=["q8_0", "q5_0", "q4_0"])
    parser.add_argument("--judged", type=int, default=16, help="windows to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-cpp", action="store_true", help="measure the last row there as well")
    options = parser.parse_args()
    config = RunConfig(model=options.model, text=options.text, seed=options.seed, calibration_tokens=16_384)
    loaded, text = load_model(options.model), read_text(options.text)
    counts = {"calibration": 16_384 // config.window, "proxy": 1, "heldout": options.judged}
    cleaned = Text(text.source, undo_spacing(text.content))
    windows = cut_windows(cleaned, loaded.tokenizer, counts, config.window, options.seed)
    dense = copy.deepcopy(loaded.model)
    cast(dense, torch.float32)
    expected, rows = dense_distribution(dense, windows.heldout), list[Row]()
    print("   share  type          MB      KL", flush=True)
    with prepared(config, loaded, windows, Quiet()) as problem:
        ranking, refits = problem.supernet.ranking, problem.supernet.compensation
        chosen = [problem.space.decode(problem.family.at(share)) for share in options.shares]
    with tempfile.TemporaryDirectory() as folder:  # the supernet, while open, keeps units in another order
        path = Path(folder, "file.gguf")
        for architecture in chosen:
            small = shrink(loaded.model, PruningMask.from_architecture(architecture, ranking), refits)
            pruned = Pruned(small, anatomy_of(loaded.model), architecture, loaded.tokenizer)
            for kind in options.types:
                rows.append(measured(pruned, path, kind, windows.heldout, expected, windows.calibration[:32]))
                print(f"{rows[-1].share:8.3f}  {kind:8}  {rows[-1].size / 1e6:8.1f}  {rows[-1].kl:6.4f}", flush=True)
        if options.llama_cpp:
            some = windows.heldout[:IN_LLAMA_CPP]
            own, theirs = in_both(pruned, path, some, dense)
            print(f"the last row on {len(some)} windows, all of the vocabulary: {own:.4f}, in llama.cpp {theirs:.4f}")
    print("beaten by none:", ", ".join(f"{row.share:.2f} {row.kind}" for row in better(rows)))


if __name__ == "__main__":
    main()
