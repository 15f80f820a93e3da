"""What bits and what units are worth: KL from the dense model against bytes of the GGUF file, on windows that nothing else saw.

    python -m experiments.bits                              # SmolLM2, about ten minutes on two CPU cores
    python -m experiments.bits --text text:wikitext2.txt --shares 1.0 0.9 --types q8_0 q4_0
    python -m experiments.bits --shares 0.94 --types searched:80000000    # as `export --quantize` searches, at most so many bytes
    python -m experiments.bits --budgets 92 80 70 --keep bits    # an hour; goes on where it was stopped

Models of the allocation path with their refits, at each share, are written as each file type, and a model in torch that has the file's own
weights is measured in float32, so that only the weights' bits count: llama.cpp also rounds what goes into coarse matrices to 8 bits.
With --llama-cpp the last row is measured there as well, on some of the windows. The path knows nothing of bits, and refits are solved
before weights are quantised.

With --budgets, at each size of the file in MB: the best member of the path in each type ("uniform"); members with the cheapest type for
every block ("mixture"), with refits before quantising and after; the dense model so; and the cheapest width and type of every block
together ("joint"), around several members.
"""

import argparse
import tempfile
from pathlib import Path

from experiments.bits.arms import Problem, compare
from experiments.bits.files import Row, better, in_both, measured
from experiments.bits.prices import float32
from experiments.quiet import Quiet
from llmbo.comparison.problems import undo_spacing
from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import prepared
from pruning.anatomy import anatomy_of
from pruning.calibration import cut_windows
from pruning.export import Pruned
from pruning.export.quantise import Mixture
from pruning.export.searched import searched
from pruning.likelihood import dense_distribution
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.tensor_files import TensorFiles
from pruning.text import Text, read_text

IN_LLAMA_CPP = 4  # windows
CHOOSING = 8  # windows more, to choose by
HEADING = "   share  type                       MB      KL"


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.8, 0.65])
    parser.add_argument(
        "--types", type=Mixture.of, nargs="+", default=[Mixture.of(kind) for kind in ("q8_0", "q5_0", "q4_0")]
    )
    parser.add_argument("--judged", type=int, default=16, help="windows to judge by")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--llama-cpp", action="store_true", help="measure the last row there as well")
    parser.add_argument("--budgets", type=float, nargs="+", metavar="MB", help="compare at these sizes instead")
    parser.add_argument("--keep", type=Path, help="folder for what has been worked out; by default it is lost")
    options = parser.parse_args()
    config = RunConfig(model=options.model, text=options.text, seed=options.seed, calibration_tokens=16_384)
    loaded, text = load_model(options.model), read_text(options.text)
    counts = {"calibration": 16_384 // config.window, "proxy": 1, "heldout": options.judged + CHOOSING}
    cleaned = Text(text.source, undo_spacing(text.content))
    windows = cut_windows(cleaned, loaded.tokenizer, counts, config.window, options.seed)
    with prepared(config, loaded, windows, Quiet()) as problem:
        ranking, refits = problem.supernet.ranking, problem.supernet.compensation
        space, family = problem.space, problem.family
    dense = float32(loaded.model)  # the supernet, while open, keeps units in another order
    with tempfile.TemporaryDirectory() as folder:
        if options.budgets:
            keep = options.keep or Path(folder, "kept")
            keep.mkdir(parents=True, exist_ok=True)
            compare(
                Problem(dense, loaded.tokenizer, space, family, refits, windows, options.judged, TensorFiles(keep)),
                [round(1e6 * budget) for budget in options.budgets],
            )
            return
        print(HEADING, flush=True)
        path, heldout, rows = Path(folder, "file.gguf"), windows.heldout[: options.judged], list[Row]()
        expected = dense_distribution(dense, heldout)
        for share in options.shares:
            architecture = space.decode(family.at(share))
            small = shrink(loaded.model, PruningMask.from_architecture(architecture, ranking), refits)
            pruned = Pruned(small, anatomy_of(loaded.model), architecture, loaded.tokenizer)
            for mixture in options.types:
                of_file = pruned
                if mixture.size:
                    of_file, mixture, _ = searched(pruned, mixture.size, windows.calibration, "bits")
                rows.append(measured(of_file, path, mixture, heldout, expected, windows.calibration[:32]))
                print(rows[-1], flush=True)
        if options.llama_cpp:
            some = heldout[:IN_LLAMA_CPP]
            own, theirs = in_both(of_file, path, some, dense)
            print(f"the last row on {len(some)} windows, all of the vocabulary: {own:.4f}, in llama.cpp {theirs:.4f}")
    print("beaten by none:", ", ".join(f"{row.share:.2f} {row.kind}" for row in better(rows)))


if __name__ == "__main__":
    main()
