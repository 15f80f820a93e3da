"""What attention is worth with fewer query heads in fewer KV groups, each block alone after its refit: which shapes should be levels.

    python -m experiments.query_heads --model llama

Nats of KL by the second order (`pruning.sensitivity`), summed over layers, at every number of groups and of query heads in each; and in how
many layers a shape that `llmbo.problem.space.attention_ladder` leaves out is better than the level with as many query and KV heads.
"""

import argparse
from itertools import product

import torch

from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from llmbo.problem.space import attention_ladder
from llmbo.problem.texts import load_windows
from pruning.anatomy import anatomy_of
from pruning.block import BlockKind
from pruning.refits import fit
from pruning.sensitivity import block_sensitivity
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.widths import attention_width, lacking_of, units_of


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--text", default=RunConfig.text)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--judged-tokens", type=int, default=4096)
    options = parser.parse_args()
    loaded = load_model(options.model)
    config = RunConfig(
        options.model,
        text=options.text,
        calibration_tokens=options.calibration_tokens,
        proxy_tokens=options.judged_tokens,
    )
    windows = load_windows(config, loaded)
    block = anatomy_of(loaded.model).attention
    shapes = product(range(1, block.units + 1), range(1, block.queries + 1))
    every = sorted(
        (attention_width(groups, block.queries - heads) for groups, heads in shapes), key=block.parameters_at
    )
    widths: dict[BlockKind, list[int]] = {"attention": every, "mlp": []}
    fitted = fit(loaded.model, windows.calibration, widths, TensorFiles(None), scored=0, queries=True)
    with Supernet(loaded.model, fitted.ranking, fitted.refits) as supernet:
        drawn = torch.Generator(loaded.device).manual_seed(0)
        costs = block_sensitivity(supernet, windows.proxy, widths, drawn)["attention"].cpu()
    ladder = attention_ladder(block)
    print(
        "| groups | query heads in each | query and KV heads | nats | better than the level of that size |\n|---|---|---|---|---|"
    )
    size = {width: units_of(width) * (block.queries - lacking_of(width) + 1) for width in every}
    for column, width in enumerate(every):
        rivals = [every.index(level) for level in ladder if level != width and size[level] == size[width]]
        wins = "".join(f"in {int((costs[:, column] < costs[:, one]).sum())} of {len(costs)} layers" for one in rivals)
        kept = f"| {units_of(width)} | {block.queries - lacking_of(width)} | {size[width]} | {float(costs[:, column].sum()):.3f} "
        print(f"{kept}| {'' if width in ladder else wins or 'no such level'} |")


if __name__ == "__main__":
    main()
