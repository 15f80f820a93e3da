"""What refits gain that are fitted to the inputs of a pruned model, not of the dense one: held-out KL of candidates near it.

    python -m experiments.anchor_tables --text text:path/to/wikitext2-valid.txt
    python -m experiments.anchor_tables --anchors 0.6,0.8 --shares 0.45,0.55,0.6,0.65,0.8

An anchor is a member of the allocation path. Its stream passes the layers one after the other, each block as whole as in the dense model,
so that moments for every width are known, with what the stream has lost so far as part of the target (as `pruning.sequential` has it for
one model alone); then the anchor's own widths hand it on. One such table serves all candidates: here members of the path, and each with
every block a level up, down or where it was, by chance.
"""

import argparse
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from experiments.quiet import Quiet
from llmbo.comparison.problems import undo_spacing
from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.preparation import Problem, prepared
from pruning.architecture import Architecture
from pruning.block import Block, BlockKind
from pruning.calibration import cut_windows
from pruning.likelihood import frozen
from pruning.projection import matrix_of
from pruning.sequential import SEQUENTIAL_RIDGE, SequentialRefits, goals_behind, moments
from pruning.supernet import Supernet
from pruning.text import Text, read_text
from pruning.walk import Walk

Moments = tuple[Tensor, Tensor, int]  # `C x C` of inputs, `C x hidden_size` with the target, and over how many tokens
Table = dict[tuple[BlockKind, int], Moments]
BATCH = 8  # windows


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default="builtin")
    parser.add_argument("--seed", type=int, default=0, help="deals out the windows")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration")
    parser.add_argument("--judged", type=int, default=24, help="windows to judge by")
    parser.add_argument("--anchors", default="0.5,0.6,0.7,0.8,0.9", help="shares by commas")
    parser.add_argument("--shares", default="0.42,0.47,0.57,0.66,0.74,0.85,0.93", help="of candidates, by commas")
    options = parser.parse_args()
    loaded, text = load_model(options.model), read_text(options.text)
    config = RunConfig(options.model, text=options.text, seed=options.seed, calibration_tokens=options.tokens)
    counts = {"calibration": options.tokens // config.window, "proxy": 1, "heldout": options.judged}
    text = Text(text.source, undo_spacing(text.content))
    windows = cut_windows(text, loaded.tokenizer, counts, config.window, options.seed)
    with prepared(config, loaded, windows, Quiet()) as problem:
        supernet, judge = problem.supernet, problem.heldout()
        shares, candidates = zip(*candidates_at(problem, list(map(float, options.shares.split(",")))), strict=True)

        def kl(used: list[Supernet]) -> list[float]:
            pairs = zip(used, candidates, strict=True)
            return [own.quality(x, windows.heldout, judge.dense).kl or 0.0 for own, x in pairs]

        first = kl([supernet] * len(candidates))
        print("anchor".ljust(16) + "".join(f"{share:8.3f}" for share in shares))
        print("none: KL".ljust(16) + "".join(f"{value:8.4f}" for value in first), flush=True)
        for share in map(float, options.anchors.split(",")):
            start = time.monotonic()
            table = table_at(supernet, problem.space.decode(problem.family.at(share)), windows.calibration)
            title = f"{share:.2f} ({time.monotonic() - start:.0f} s)"
            found = kl([supernet.using(refits_of(supernet, table, x)) for x in candidates])
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


@torch.no_grad()
def table_at(supernet: Supernet, anchor: Architecture, windows: Tensor) -> Table:
    """Moments of every block at an anchor's inputs. Memory: all of them; hidden states of all windows four times."""
    anatomy, refits, table = supernet.anatomy, SequentialRefits(supernet.ranking), Table()
    own, batches = supernet.using(refits), windows.split(BATCH)
    attention_alone = replace(anchor, neurons=(anatomy.intermediate_size,) * anatomy.num_hidden_layers)
    with frozen(supernet.model):
        dense, pruned = Walk(supernet.model, batches), Walk(supernet.model, batches)
        for index in range(anatomy.num_hidden_layers):
            with supernet.layer(index) as layer:
                goals = goals_behind(dense, index, layer, anatomy.blocks, anatomy.residual_scale)
                for block in anatomy.blocks:
                    with ExitStack() as stack:
                        before = None
                        if block.kind == "mlp":
                            stack.enter_context(own.narrowed(index, attention_alone))
                            before = anatomy.attention if anchor.kv_groups[index] else None
                        dense_weight = matrix_of(supernet.output_of(index, block)).float()
                        gram, cross, tokens, _ = moments(
                            pruned,
                            index,
                            layer,
                            block,
                            before,
                            goals[block.kind],
                            dense_weight,
                            False,
                            anatomy.residual_scale,
                        )
                        table[block.kind, index] = gram, cross, tokens
                    put(refits, supernet, table, index, block, anchor)
                if anchor.keeps_layer(index):
                    with own.narrowed(index, anchor):
                        pruned.forward(index, layer)
    return table


def put(
    refits: SequentialRefits, supernet: Supernet, table: Table, index: int, block: Block, architecture: Architecture
) -> None:
    """Solve for the width that a block has, drawn to its dense columns."""
    units, dense = architecture.units(block.kind)[index], matrix_of(supernet.output_of(index, block))
    if units in (0, block.units):
        return
    gram, cross, tokens = table[block.kind, index]
    columns = block.columns_at(units)
    matrix = gram[:columns, :columns].clone()
    damping = SEQUENTIAL_RIDGE.of(matrix, tokens)
    matrix.diagonal().add_(damping)
    wanted = cross[:columns] + damping[:, None] * dense[:, :columns].T.float()
    solution = torch.cholesky_solve(wanted, torch.linalg.cholesky(matrix))
    refits.put(index, block, solution.T.to(dense.dtype).contiguous(), None)


def refits_of(supernet: Supernet, table: Table, architecture: Architecture) -> SequentialRefits:
    """Those of one candidate."""
    refits = SequentialRefits(supernet.ranking)
    solve = partial(put, refits, supernet, table)
    for index in range(supernet.anatomy.num_hidden_layers):
        for block in supernet.anatomy.blocks:
            solve(index, block, architecture)
    return refits


if __name__ == "__main__":
    main()
