"""Seconds, memory and money of a search on large models, by arithmetic: the tables of docs/scaling.md.

    python -m experiments.scaling

Memory formulas are those that `tests/pruning/test_compensation.py` checks against real tables. Rates and prices are assumptions,
stated in the output; `--efficiency` is the part of a device's peak that matrix products reach, which `experiments.proxy_cost`
measures as the share of the floor.
"""

import argparse
from dataclasses import dataclass

from llmbo.problem.preparation import DEFAULT
from llmbo.problem.space import HARDWARE_MULTIPLE, NEURON_LEVELS
from pruning.anatomy import BlockKind, Sizes
from pruning.compensation import factor_values, solved_values

MODELS = {
    "Llama-3.1-8B": Sizes(32, 4096, 32, 8, 128, 14336, 128256),
    "Llama-3.1-70B": Sizes(80, 8192, 64, 8, 128, 28672, 128256),
}


@dataclass(frozen=True)
class Device:
    """`matmul` and `single`: peak FLOP/s in bfloat16 and float32; `link`: bytes/s from the host; `dollars` per hour."""

    name: str
    memory: float
    matmul: float
    single: float
    link: float
    dollars: float


DEVICES = (
    Device("80 GB (H100 SXM)", 80e9, 989e12, 67e12, 50e9, 3.0),
    Device("24 GB (RTX 4090)", 24e9, 165e12, 82.6e12, 25e9, 0.5),
)


def widths_of(sizes: Sizes) -> dict[BlockKind, list[int]]:
    """The grid that `SearchSpace` lays."""
    step = max(1, round(sizes.intermediate_size / NEURON_LEVELS / HARDWARE_MULTIPLE)) * HARDWARE_MULTIPLE
    return {"attention": list(range(sizes.num_key_value_heads)), "mlp": list(range(0, sizes.intermediate_size, step))}


def layer_parameters(sizes: Sizes) -> int:
    heads = sizes.num_attention_heads + sizes.num_key_value_heads
    return 2 * sizes.hidden_size * heads * sizes.head_dim + 3 * sizes.hidden_size * sizes.intermediate_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--proxy-tokens", type=int, default=3072)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--share", type=float, default=0.7, help="mean share of the blocks that candidates keep")
    parser.add_argument("--efficiency", type=float, default=0.4)
    parser.add_argument(
        "--proposing", type=float, default=4.0, help="seconds per round of 4 that the GP takes on the host"
    )
    options = parser.parse_args()
    for name, sizes in MODELS.items():
        blocks = sizes.num_hidden_layers * layer_parameters(sizes)
        other = 2 * sizes.vocab_size * sizes.hidden_size
        output = (
            sizes.num_hidden_layers
            * sizes.hidden_size
            * (sizes.num_attention_heads * sizes.head_dim + sizes.intermediate_size)
        )
        solved, factors = solved_values(sizes, widths_of(sizes)), factor_values(sizes)
        print(f"\n{name}: {(blocks + other) / 1e9:.2f}B parameters")
        for text, size in (
            ("weights, bfloat16", 2 * (blocks + other)),
            ("weights, int8 blocks", blocks + 2 * other),
            ("refitted weights of all widths, bfloat16", 2 * solved),
            ("refitted weights of one candidate at most, bfloat16", 2 * output),
            ("factors of all layers, float32", 4 * factors),
            ("factors of one layer, float32", 4 * factors / sizes.num_hidden_layers),
            ("one chunk of 256 rows of logits, bfloat16 and float32", 6 * 256 * sizes.vocab_size),
        ):
            print(f"  {size / 1e9:8.2f} GB  {text}")
        candidate = 2 * (options.share * blocks + other / 2) * options.proxy_tokens
        # Forward and backward for scores, for block sensitivity, and at each member for width exchanges; the rest is forward only.
        both = min(DEFAULT.scored_tokens, options.calibration_tokens)
        both += DEFAULT.allocation_tokens * (1 + len(DEFAULT.anchors))
        alone = max(0, options.calibration_tokens - DEFAULT.scored_tokens)
        alone += DEFAULT.allocation_tokens * len(DEFAULT.anchors)  # half of them before the exchanges and after them
        calibration = (6 * both + 2 * alone) * (blocks + other / 2)
        attention, mlp = sizes.num_attention_heads * sizes.head_dim, sizes.intermediate_size
        cholesky = sizes.num_hidden_layers * sum(n**3 / 3 + n**2 * sizes.hidden_size for n in (attention, mlp))
        group = sizes.queries_per_group * sizes.head_dim
        columns = [w * c for kind, c in (("attention", group), ("mlp", 1)) for w in widths_of(sizes)[kind]]
        solving = sizes.num_hidden_layers * sizes.hidden_size * sum(n**2 for n in columns)
        for device in DEVICES:
            devices = max(1, -(-2 * (blocks + other) // (0.75 * device.memory)))
            rate = options.efficiency * device.matmul
            fits = 2 * (blocks + other + solved) < 0.9 * devices * device.memory
            moving = 0.0 if fits else 2 * output * options.share / (devices * device.link)
            each = (
                candidate / rate + moving
            )  # layers run one after another: several devices hold more, but are no faster
            setup = calibration / rate + cholesky / (0.5 * device.single) + solving / (0.05 * rate)
            proposing = options.proposing * options.evaluations / 4
            total = setup + options.evaluations * each + proposing
            where = "all widths resident" if fits else f"{moving:.2f} s of it moving weights"
            print(
                f"  {devices:.0f} x {device.name}: {each:.2f} s per candidate ({where}), set-up {setup:.0f} s, "
                f"proposing {proposing:.0f} s; {options.evaluations} candidates {total / 60:.0f} min, "
                f"${devices * device.dollars * total / 3600:.2f}"
            )


if __name__ == "__main__":
    main()
