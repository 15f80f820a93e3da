"""How long blocks take at each width, measured once, so that the time of any architecture is a sum.

A block timed alone in a loop would find its weights in the cache, which a model of many blocks never does. So whole stacks are
timed: the dense model, the dense model with one kind of block at another width in all layers, and one of few layers. Their times
are linear in what one is after,

    seconds = fixed (embeddings, final norm, head, framework) + layers * layer + sum of blocks by kind and width

and least squares gives it. Prefill and decoding are told apart: one is bound by arithmetic, the other by memory bandwidth.
Every repetition times the dense model too, and a stack counts by its ratio to it: a machine that is busy for a while slows
both. Weights are copied into ordinary modules by `shrink`, as they will be deployed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils import benchmark
from transformers import PreTrainedModel

from pruning.anatomy import BLOCK_KINDS, Anatomy, BlockKind, anatomy_of
from pruning.architecture import Architecture
from pruning.shrink import shrink_to

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
FEW_LAYERS = 2


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Args:
        sequences: At a time.
        context: Tokens of the prompt, which decoding attends to.
        steps: Tokens decoded after each prompt; a decode time is their mean.
        repeats: Repetitions that count; one more warms up.
    """

    sequences: int = 1
    context: int = 256
    steps: int = 16
    repeats: int = 7


@dataclass(frozen=True)
class Timing:
    """Median seconds, and their spread: half the distance between the quartiles as a share of the median."""

    seconds: float
    spread: float


@dataclass(frozen=True)
class PhaseTable:
    """Seconds of one phase. `blocks` holds (width, seconds) by kind, widths ascending from (0, 0)."""

    fixed: float
    layer: float
    blocks: Mapping[BlockKind, Sequence[tuple[int, float]]]
    spread: float  # the largest among the stacks

    def seconds(self, kv_groups: Tensor, neurons: Tensor) -> Tensor:
        """Of many architectures, `batch_shape x num_layers` units -> `batch_shape`; linear between measured widths."""
        total = self.fixed + self.layer * ((kv_groups > 0) | (neurons > 0)).double().sum(-1)
        kept: dict[BlockKind, Tensor] = {"attention": kv_groups, "mlp": neurons}
        for kind, units in kept.items():
            total = total + at_widths(self.blocks[kind], units).sum(-1)
        return total


@dataclass(frozen=True)
class LatencyTable:
    """What blocks cost on one device, for one workload."""

    workload: Workload
    phases: Mapping[Phase, PhaseTable]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(Workload(**data["workload"]), {phase: PhaseTable(**part) for phase, part in data["phases"].items()})


def measure_table(
    model: PreTrainedModel,
    widths: Mapping[BlockKind, Sequence[int]],
    workload: Workload,
    on_stack: Callable[[int], None] | None = None,
    clock: Callable[[], float] = benchmark.timer,
) -> LatencyTable:
    """Time every stack on the model's device.

    Memory: the model and a shrunk copy.

    Args:
        widths: Units of each kind to measure, the dense width among them.
        on_stack: Called with the number of stacks done.
        clock: Seconds; must wait for the device, as `torch.utils.benchmark.timer` does.
    """
    anatomy = anatomy_of(model)
    stacks = stacks_of(anatomy, widths)
    measured = []
    for index, stack in enumerate(stacks):
        measured.append(time_architecture(model, stack, workload, clock))
        if on_stack:
            on_stack(index + 1)
    phases = {phase: _solve(anatomy, widths, stacks, [timing[phase] for timing in measured]) for phase in PHASES}
    return LatencyTable(workload, phases)


def time_architecture(
    model: PreTrainedModel,
    architecture: Architecture,
    workload: Workload,
    clock: Callable[[], float] = benchmark.timer,
) -> dict[Phase, Timing]:
    """Time a shrunk copy, which keeps any units: speed depends on their number. It takes turns with the dense `model`.

    Returns:
        Seconds per prompt and per decoded token, all sequences at a time.
    """
    small = shrink_to(model, architecture)
    times: dict[Phase, list[tuple[float, float]]] = {phase: [] for phase in PHASES}
    for repetition in range(workload.repeats + 1):
        found = _run(model, workload, clock), _run(small, workload, clock)
        if repetition:
            for phase, dense, own in zip(PHASES, *found, strict=True):
                times[phase].append((dense, own))
    return {phase: _paired(pairs) for phase, pairs in times.items()}


def stacks_of(anatomy: Anatomy, widths: Mapping[BlockKind, Sequence[int]]) -> list[Architecture]:
    """Architectures whose times determine all unknowns of the sum. The dense model is the first."""
    layers, groups, neurons = anatomy.num_hidden_layers, anatomy.num_key_value_heads, anatomy.intermediate_size
    stacks = [Architecture.full(anatomy)]
    for units in sorted({0, *widths["attention"]} - {groups}):  # a model needs attention somewhere
        stacks.append(Architecture((groups, *(units,) * (layers - 1)), (neurons,) * layers))
    for units in sorted({0, *widths["mlp"]} - {neurons}):
        stacks.append(Architecture((groups,) * layers, (units,) * layers))
    few = min(FEW_LAYERS, layers - 1)
    gone = (0,) * (layers - few)
    stacks.append(Architecture((groups,) * few + gone, (neurons,) * few + gone))
    return stacks


def blocks_of(anatomy: Anatomy, widths: Mapping[BlockKind, Sequence[int]]) -> list[tuple[BlockKind, int]]:
    """Every kind of block at every width that has any unit, the dense width among them."""
    return [
        (block.kind, units) for block in anatomy.blocks for units in sorted({*widths[block.kind], block.units} - {0})
    ]


def at_widths(rows: Sequence[tuple[int, float]], units: Tensor) -> Tensor:
    """What (width, value) rows, widths ascending, say of blocks of any width, linear between them: the shape of `units`."""
    widths, values = zip(*rows, strict=True)
    return torch.from_numpy(np.interp(units.numpy(), widths, values))


def a_prompt(model: PreTrainedModel, context: int, sequences: int) -> Tensor:
    """`sequences x context` token ids on the model's device; which ones they are changes no time and no size."""
    prompt = torch.arange(context, device=model.device) % model.config.get_text_config().vocab_size
    return prompt.expand(sequences, -1)


def _solve(
    anatomy: Anatomy, widths: Mapping[BlockKind, Sequence[int]], stacks: Sequence[Architecture], times: Sequence[Timing]
) -> PhaseTable:
    """Least squares in relative errors; a width that would take negative time takes none."""
    columns = blocks_of(anatomy, widths)
    rows = [
        [
            1.0,
            float(sum(map(stack.keeps_layer, range(anatomy.num_hidden_layers)))),
            *(float(stack.units(kind).count(units)) for kind, units in columns),
        ]
        for stack in stacks
    ]
    seconds = torch.tensor([timing.seconds for timing in times], dtype=torch.float64)
    design = torch.tensor(rows, dtype=torch.float64) / seconds[:, None]
    # gelsd: with one layer, or a single width, some unknowns only show in sums, and their smallest solution does
    found = torch.linalg.lstsq(design, torch.ones(len(stacks), 1, dtype=torch.float64), driver="gelsd").solution
    fixed, layer, *each = found.flatten().clamp_min(0).tolist()
    blocks: dict[BlockKind, list[tuple[int, float]]] = {kind: [(0, 0.0)] for kind in BLOCK_KINDS}
    for (kind, units), value in zip(columns, each, strict=True):
        blocks[kind].append((units, value))
    return PhaseTable(fixed, layer, blocks, max(timing.spread for timing in times))


def _paired(pairs: Sequence[tuple[float, float]]) -> Timing:
    """Of (dense, own) seconds by repetition: the median ratio at the dense model's median speed."""
    ratios = [own / dense for dense, own in pairs]
    ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratio, ratio, ratio)
    return Timing(ratio * statistics.median(dense for dense, _ in pairs), (high - low) / (2 * ratio))


@torch.inference_mode()
def _run(model: PreTrainedModel, workload: Workload, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one prompt, and of one decoded token."""
    prompt = a_prompt(model, workload.context, workload.sequences)
    start = clock()
    out = model(prompt, use_cache=True, logits_to_keep=1)
    filled = clock()
    for _ in range(workload.steps):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return filled - start, (clock() - filled) / workload.steps
