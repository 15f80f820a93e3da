"""Seconds that a run will take, by arithmetic on what goes through the model and by this machine's own rates.

Counted are matrix products in the model's dtype and in float32, and values gone over by everything else (norms, activation functions,
softmax), phase by phase as `preparation` and the search go. Not counted: reading the weights, a text from the hub, tables of latency
and energy, multiple-choice items, and waiting for an advisor's replies.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llmbo.advisor.assemble import WITHOUT_MARGINALS
from llmbo.config import RunConfig
from llmbo.config.advisor import CONTEXT_LEVELS, parse_spec
from llmbo.problem import anchors
from llmbo.problem.expansion import STEPS
from llmbo.problem.method import DEFAULT
from llmbo.problem.sequence import PHASE
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import NUM_INITIAL
from llmbo.types import FITTING, WRITING
from pruning.anatomy import Anatomy, Sizes
from pruning.cost import dense_block_parameters
from pruning.sampling import BATCH
from pruning.surgeon import AT_ONCE

MOST_MEASURED = 4096  # rows of a matrix whose product is timed
REPEATS = 6

# How often all values of some width are gone over, fitted to SmolLM2 on a CPU; beside matrix products it decides little elsewhere.
PASSES = {"hidden": 16, "heads": 6, "neurons": 4}  # by a token in a layer
GRAPH = 3  # times as many backward
SUMMED, SCORED = 8, 15  # for the sums over z, and for scores from its gradient
QUALITY, DENSE, GRADIENT, DIVERGENCE, DRAWN = 5, 9, 12, 19, 48  # over the vocabulary
CACHED = 4  # over keys and values so far, for every token that is written
CHANGED = 6  # over the residual stream, for the change that another width makes
COPIED = 3  # times over a layer's weights that are brought
RECOMPUTED = 1  # forward passes for each backward one: a layer runs again from its stored input
GRAM = 1.5  # half of a product, in narrow blocks
WHOLE_BLOCKS = 1.2  # of a stream that blocks are measured whole in: attention runs once more, as the stream has it
PASSED = 1.5  # forward passes of a model that is refitted in sequence: what comes before each block, and the block
CHOLESKY, TRIANGULAR = 2.0, 1.5  # times what a matrix product of so many operations takes
PROPOSING = 0.4  # seconds of the surrogate and the pool for a round


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    Args:
        matmul: Floating-point operations of a matrix product in the model's dtype.
        single: The same in float32.
        passes: Values that are gone over once.
        link: Bytes to the device from where layers wait; None where they are one.
    """

    matmul: float
    single: float
    passes: float
    link: float | None = None

    @classmethod
    def measure(
        cls,
        sizes: Sizes,
        dtype: torch.dtype,
        device: str,
        tokens: int,
        source: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> "Rates":
        """A second or two, at the model's own sizes where they are not too large.

        Args:
            tokens: Of a batch.
            source: The device where layers wait; by default the host.
        """

        def seconds(run: Callable[[], object]) -> float:
            times = []
            for _ in range(REPEATS):
                start = clock()
                run()
                wait_for(device)
                times.append(clock() - start)
            return max(min(times[1:]), 1e-9)  # the first call warms up

        def values(
            *shape: int, of: torch.dtype = dtype
        ) -> torch.Tensor:  # equal ones would cost a GPU less power, and time
            return torch.randn(*shape, dtype=torch.float32, device=device).to(of)

        hidden, wide = min(sizes.hidden_size, MOST_MEASURED), min(sizes.intermediate_size, MOST_MEASURED)
        x, weight, z = values(tokens, hidden), values(wide, hidden), values(tokens, wide)
        single, square = values(tokens, hidden, of=torch.float32), values(wide, hidden, of=torch.float32)
        link = None
        if source or torch.device(device).type == "cuda":
            there = torch.ones(1 << 26, dtype=torch.uint8, device=source or None, pin_memory=not source)
            link = there.nbytes / seconds(lambda: there.to(device, non_blocking=True))
        return cls(
            matmul=2 * tokens * hidden * wide / seconds(lambda: F.linear(x, weight)),
            single=2 * tokens * hidden * wide / seconds(lambda: F.linear(single, square)),
            passes=2 * z.numel() / seconds(lambda: F.silu(z) * z),
            link=link,
        )


@dataclass(frozen=True)
class Work:
    """Operations in the model's dtype and in float32, values gone over, and bytes that are brought to the device."""

    matmul: float = 0.0
    single: float = 0.0
    passes: float = 0.0
    moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * value for value in vars(self).values()))

    def seconds(self, rates: Rates) -> float:
        moving = self.moved / rates.link if rates.link else 0.0
        return self.matmul / rates.matmul + self.single / rates.single + self.passes / rates.passes + moving


@dataclass(frozen=True)
class Counted:
    """Work on a model's layers and head.

    Args:
        window: Tokens that attend to one another.
        itemsize: Bytes of a value.
        brought: Layers come to the device one at a time, for every walk anew.
    """

    anatomy: Anatomy
    window: int
    itemsize: int
    brought: bool

    def forward(self, tokens: float, share: float = 1.0) -> Work:
        """Tokens through layers that keep this share of their parameters."""
        a, heads = self.anatomy, self.anatomy.num_attention_heads * self.anatomy.head_dim
        products = 2 * a.layer_parameters + 4 * self.window * heads
        passes = PASSES["hidden"] * a.hidden_size + PASSES["heads"] * heads + PASSES["neurons"] * a.intermediate_size
        return Work(matmul=products, passes=passes) * (share * tokens * a.num_hidden_layers)

    def backward(self, tokens: float, share: float = 1.0, gradients: int = 1) -> Work:
        """Gradients by activations, taken after a forward pass that is not counted here."""
        once = self.forward(tokens, share)
        return once * RECOMPUTED + (once + Work(passes=once.passes) * (GRAPH - 1)) * gradients

    def head(self, tokens: float, products: int, passes: float) -> Work:
        a = self.anatomy
        return Work(matmul=2 * products * a.hidden_size * a.vocab_size, passes=passes * a.vocab_size) * tokens

    def walk(self, times: float = 1) -> Work:
        """All layers, as often as they are brought and sorted."""
        values = dense_block_parameters(self.anatomy)
        return Work(moved=values * self.itemsize, passes=COPIED * values) * (times * self.brought)

    def updates(self, tokens: float, columns: float, widths: float) -> Work:
        """What `widths` refits change of the residual stream, `columns` wide together, in every layer."""
        hidden = self.anatomy.hidden_size
        return Work(matmul=2 * columns * hidden, passes=CHANGED * widths * hidden) * (
            tokens * self.anatomy.num_hidden_layers
        )


def seconds_by_phase(
    config: RunConfig, space: SearchSpace, itemsize: int, brought: bool, rates: Rates
) -> dict[str, float]:
    """Seconds of every phase, by the names that a run's display has for them.

    Args:
        itemsize: Bytes of a value in the model's dtype.
        brought: Layers come to the device one at a time.
    """
    a, counts = space.anatomy, config.windows
    on = Counted(a, config.window, itemsize, brought)
    calibration, proxy, heldout = (counts[part] * config.window for part in ("calibration", "proxy", "heldout"))
    scored = min(calibration, DEFAULT.scored_tokens)
    allocation = max(1, min(DEFAULT.allocation_tokens // config.window, counts["calibration"] // 4)) * config.window
    columns = {block.kind: block.columns for block in a.blocks}
    both = sum(columns.values())
    tried = {block.kind: [block.columns_at(width) for width in space.widths[block.kind]] for block in a.blocks}
    mean = (1 + config.min_share) / 2  # of the candidates' shares
    shares = [config.min_share + (1 - config.min_share) * part for part in DEFAULT.anchors]
    refits = Work(moved=mean * a.num_hidden_layers * both * a.hidden_size * itemsize * config.compensation)
    judged = min(config.budget, NUM_INITIAL + max(0, config.budget - NUM_INITIAL) // 2)  # of a front
    rounds = -(-config.budget // config.batch)

    summed = Work(passes=SUMMED * both + PASSES["hidden"] * a.hidden_size)
    if config.compensation:
        summed += Work(single=GRAM * sum(width**2 for width in columns.values()))
    importance = on.forward(calibration) + summed * (calibration * a.num_hidden_layers)
    importance += on.backward(scored) + on.head(scored, 2, GRADIENT)
    importance += Work(passes=SCORED * both) * (scored * a.num_hidden_layers)

    solving = Work()
    for kind, width in columns.items():
        solved = sum(n**2 for n in tried[kind][1:-1]) * a.hidden_size
        square = CHOLESKY * width**3 / 3 + 2 * width**2 * a.hidden_size
        # The order of units takes a factor and an inverse, and what is left of that as units go.
        square += (CHOLESKY + 4) * width**3 / 3 + width**2 * a.hidden_size
        solving += Work(single=square + TRIANGULAR * solved, passes=AT_ONCE * width**2) * a.num_hidden_layers

    sensitivity = on.forward(allocation) + on.backward(allocation) + on.head(allocation, 2, GRADIENT)
    sensitivity += on.updates(allocation, sum(map(sum, tried.values())) - both, sum(map(len, tried.values())))

    exchanges = Work()
    for share in shares:
        widest = min(1.0, share + 2 / (len(tried["mlp"]) - 1))
        exchanges += on.forward(allocation, share) + on.backward(allocation, widest, gradients=2)
        exchanges += on.head(allocation, 3, DIVERGENCE) + on.walk(2)
        exchanges += on.updates(allocation, (len(STEPS) + 1) * share * both, 2 * 2 * len(STEPS))
        after = on.forward(allocation, share) + on.head(allocation, 1, QUALITY)
        exchanges += after * 0.5 + on.walk()  # on half of the windows
    exchanges += on.forward(allocation) + on.head(allocation, 1, DENSE) + on.walk()

    measured = on.forward(proxy, mean) + on.head(proxy, 1, QUALITY) + refits
    dense = on.forward(proxy) + on.head(proxy, 1, DENSE) + on.walk()
    last = on.forward(heldout, mean) + on.head(heldout, 1, QUALITY) + refits
    probed = 2 * config.window * (1 + space.d) if _asks_marginals(config) else 0
    works = {
        FITTING: importance + solving * config.compensation + on.walk(2),
        "allocation": sensitivity + on.walk(2),
        "width exchanges": exchanges,
        "dense model": dense,
        "search": measured * (config.budget + probed / proxy) + on.walk(rounds),
        "held-out windows": last * judged + on.forward(heldout) + on.head(heldout, 1, DENSE) + on.walk(2),
    }
    if config.text == "self":
        tokens = sum(counts.values()) * config.window
        cache = a.num_hidden_layers * 2 * a.num_key_value_heads * a.head_dim * config.window / 2
        weights = dense_block_parameters(a) + a.hidden_size * a.vocab_size  # read for every step
        written = on.forward(tokens) + on.head(tokens, 1, DRAWN)
        written += Work(passes=CACHED * cache + weights / BATCH) * tokens
        works = {WRITING: written + on.walk(tokens / BATCH), **works}
    if config.refit_anchors:
        fitting = on.forward(calibration, WHOLE_BLOCKS)
        for kind, width in columns.items():
            solved = sum(n**2 for n in tried[kind][1:-1]) * a.hidden_size
            products = calibration * (GRAM * width**2 + 2 * width * a.hidden_size)
            square = CHOLESKY * width**3 / 3 + width**2 * a.hidden_size
            fitting += Work(single=products + square + TRIANGULAR * solved) * a.num_hidden_layers
        works[anchors.PHASE] = on.forward(calibration) + on.walk() + fitting * config.refit_anchors
    if config.refit_front:
        refitting = on.forward(calibration) + on.forward(calibration, PASSED * mean) + on.walk(3)
        for width in columns.values():
            kept = mean * width
            products = GRAM * kept**2 + 2 * kept * a.hidden_size
            solution = CHOLESKY * kept**3 / 3 + 2 * kept**2 * a.hidden_size
            refitting += Work(single=(calibration * products + solution) * a.num_hidden_layers)
        works[PHASE] = (refitting + measured + last) * min(config.refit_front, judged)
    proposing = PROPOSING * max(0, config.budget - NUM_INITIAL) / config.batch
    return {name: work.seconds(rates) + proposing * (name == "search") for name, work in works.items()}


def _asks_marginals(config: RunConfig) -> bool:
    """Whether an advisor has every block narrowed once, on two windows."""
    return (
        "tables" in CONTEXT_LEVELS[config.advisor_context] and parse_spec(config.advisor).kind not in WITHOUT_MARGINALS
    )


def wait_for(device: str | torch.device) -> None:
    """Until the device has done what it was given."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()
