"""What refits gain that are fitted to the inputs of a pruned model, not of the dense one: held-out KL of candidates near it.

    python -m experiments.anchor_tables --text text:path/to/wikitext2-valid.txt
    python -m experiments.anchor_tables --anchors 0.6,0.8 --shares 0.45,0.55,0.6,0.65,0.8

An anchor is a member of the allocation path (`pruning.anchored`). Candidates are members of the path, each followed by one with every block
a level up, down or where it was, by chance.
"""

import argparse
import time
from dataclasses import replace

import torch

from experiments.quiet import Quiet
from llmbo.comparison.problems import undo_spacing
from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import Problem, prepared
from pruning.anchored import ANCHOR_RIDGE, Anchor, AnchoredRefits, fit_at
from pruning.architecture import Architecture
from pruning.calibration import cut_windows
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.text import Text, read_text


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--seed", type=int, default=0, help="deals out the windows")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--fitted", type=int, default=0, help="of these, so many fit the anchors' refits; 0: all")
    parser.add_argument("--judged", type=int, default=24, help="windows to judge by")
    parser.add_argument("--ridge", type=float, default=ANCHOR_RIDGE.times, help="times C / tokens")
    parser.add_argument("--anchors", default="0.5,0.65,0.8", help="shares by commas")
    parser.add_argument(
        "--shares", default="0.42,0.48,0.54,0.6,0.66,0.72,0.78,0.84,0.9", help="of candidates, by commas"
    )
    parser.add_argument("--served", action="store_true", help="skip what each anchor alone does to all candidates")
    options = parser.parse_args()
    loaded, text = load_model(options.model), read_text(options.text)
    config = RunConfig(options.model, text=options.text, seed=options.seed, calibration_tokens=options.tokens)
    counts = {"calibration": options.tokens // config.window, "proxy": 1, "heldout": options.judged}
    text = Text(text.source, undo_spacing(text.content))
    windows = cut_windows(text, loaded.tokenizer, counts, config.window, options.seed)
    fitted = windows.calibration[: (options.fitted or options.tokens) // config.window]
    ridge = replace(ANCHOR_RIDGE, times=options.ridge)
    with prepared(config, loaded, windows, Quiet()) as problem:
        supernet, judge = problem.supernet, problem.heldout()
        shares, candidates = zip(*candidates_at(problem, list(map(float, options.shares.split(",")))), strict=True)

        def kl(used: Supernet) -> list[float]:
            return [used.quality(x, windows.heldout, judge.dense).kl or 0.0 for x in candidates]

        first = kl(supernet)
        print("anchor".ljust(16) + "".join(f"{share:8.3f}" for share in shares))
        print("none: KL".ljust(16) + "".join(f"{value:8.4f}" for value in first), flush=True)
        anchors = []
        for share in map(float, options.anchors.split(",")):
            start = time.monotonic()
            anchor = problem.space.decode(problem.family.at(share))
            (refits,) = fit_at(supernet, [anchor], fitted, problem.space.widths, TensorFiles(None), ridge)
            title = f"{share:.2f} ({time.monotonic() - start:.0f} s)"
            anchors.append(Anchor(anchor, refits))
            if not options.served:
                tell(title, kl(supernet.using(refits)), first)
        served = kl(supernet.using(AnchoredRefits(supernet.anatomy, supernet.compensation, anchors)))
        tell("the one that serves", served, first)
        ratios = (
            torch.tensor([new / old for new, old in zip(served, first, strict=True)]).log().view(-1, 2).mean(0).exp()
        )
        print(f"KL, geometric mean: {ratios[0]:.4f} of the dense table's on the path, {ratios[1]:.4f} beside it")


def tell(title: str, found: list[float], first: list[float]) -> None:
    changes = (100 * (new / old - 1) for new, old in zip(found, first, strict=True))
    print(title.ljust(16) + "".join(f"{change:+7.1f}%" for change in changes), flush=True)


def candidates_at(problem: Problem, shares: list[float]) -> list[tuple[float, Architecture]]:
    """With their true shares: a member of the path and, beside it, one off the path."""
    space, found = problem.space, []
    rng, top = torch.Generator().manual_seed(1), torch.tensor(problem.space.max_levels)
    for share in shares:
        member = torch.tensor(problem.family.at(share))
        beside = (member + torch.randint(-1, 2, member.shape, generator=rng)).clamp_min(0).minimum(top)
        found += [(float(space.share(x[None].double())), space.decode(tuple(x.tolist()))) for x in (member, beside)]
    return found


if __name__ == "__main__":
    main()
