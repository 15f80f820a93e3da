"""How long blocks take at each width, measured once, so that the time of any architecture is a sum.

A block timed alone in a loop would find its weights in the cache, which a model of many blocks never does. So whole stacks are
timed: the dense model, the dense model with one kind of block at another width in all layers, and one of few layers. Their times
are linear in what one is after,

    seconds = fixed (embeddings, final norm, head, framework) + layers * layer + sum of blocks by kind and width

and least squares gives it, under the knowledge that no block is faster than a narrower one. Prefill and decoding are told
apart: one is bound by arithmetic, the other by memory bandwidth. A stack takes turns with the dense model and counts by the
ratio of their fastest readings: other work on the machine only ever adds time, and one that is slower for a while slows both.
All ratios are taken at one speed, the dense model's median over the whole measurement, or drift would end up in the widths.
Weights are copied into ordinary modules by `shrink`, as they will be deployed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor
from torch.utils import benchmark
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS, BlockKind
from pruning.errors import PruningError
from pruning.shrinking import shrink_to

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
FEW_LAYERS = 2
FASTEST = 3  # readings that are averaged: a single one may be luck


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Args:
        sequences: At a time.
        context: Tokens of the prompt, which decoding attends to.
        steps: Tokens decoded after each prompt.
        repeats: Repetitions that count; one more warms up.
        steps_per_reading: Tokens decoded between two readings of the clock: more for one too coarse for single ones.
    """

    sequences: int = 1
    context: int = 256
    steps: int = 8
    repeats: int = 12
    steps_per_reading: int = 1


@dataclass(frozen=True)
class Timing:
    """Time as a ratio to the dense model's.

    Args:
        ratio: Of the means of the `FASTEST` readings.
        spread: Half the distance between the quartiles of the paired ratios as a share of their median.
        dense: Median seconds of the dense model meanwhile.
    """

    ratio: float
    spread: float
    dense: float


@dataclass(frozen=True)
class PhaseTable:
    """Seconds of one phase. `blocks` holds (width, seconds) by kind, sizes ascending from (0, 0)."""

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
    phases: Sequence[Phase] = PHASES,
) -> LatencyTable:
    """Time every stack on the model's device.

    Memory: the model and a shrunk copy.

    Args:
        widths: Units of each kind to measure, the dense width among them.
        on_stack: Called with the number of stacks done.
        clock: Seconds; must wait for the device, as `torch.utils.benchmark.timer` does.
        phases: Those that the clock is fine enough for.

    Raises:
        PruningError: The clock stood still.
    """
    anatomy = anatomy_of(model)
    stacks = stacks_of(anatomy, widths)
    measured = []
    for index, stack in enumerate(stacks):
        measured.append(time_architecture(model, stack, workload, clock, phases))
        if on_stack:
            on_stack(index + 1)
    solved = {phase: _solve(anatomy, widths, stacks, [timing[phase] for timing in measured]) for phase in phases}
    return LatencyTable(workload, solved)


def time_architecture(
    model: PreTrainedModel,
    architecture: Architecture,
    workload: Workload,
    clock: Callable[[], float] = benchmark.timer,
    phases: Sequence[Phase] = PHASES,
) -> dict[Phase, Timing]:
    """Time a shrunk copy, which keeps any units: speed depends on their number. It takes turns with the dense `model`."""
    small = shrink_to(model, architecture)
    readings: dict[Phase, tuple[list[float], list[float]]] = {phase: ([], []) for phase in phases}
    for repetition in range(workload.repeats + 1):
        for index, timed in enumerate((model, small)):
            found = _run(timed, workload, clock)
            if repetition:
                for phase in phases:
                    readings[phase][index].extend(found[phase])
    return {phase: _paired(*pair) for phase, pair in readings.items()}


def measured_seconds(
    table: LatencyTable,
    model: PreTrainedModel,
    architecture: Architecture,
    clock: Callable[[], float] = benchmark.timer,
) -> dict[Phase, float]:
    """Of a shrunk copy of the dense `model`, per prompt and per decoded token, all sequences at a time.

    Like the table's they are seconds at the speed that the machine had when the table was measured.
    """
    full = Architecture.full(anatomy_of(model))
    units = [torch.tensor(full.units(kind)) for kind in BLOCK_KINDS]
    timed = time_architecture(model, architecture, table.workload, clock, tuple(table.phases))
    return {phase: timing.ratio * float(table.phases[phase].seconds(*units)) for phase, timing in timed.items()}


def stacks_of(anatomy: Anatomy, widths: Mapping[BlockKind, Sequence[int]]) -> list[Architecture]:
    """Architectures whose times determine all unknowns of the sum. The dense model is the first."""
    layers, groups, neurons = anatomy.num_hidden_layers, anatomy.num_key_value_heads, anatomy.intermediate_size
    stacks = [Architecture.full(anatomy)]
    for width in sorted({0, *widths["attention"]} - {groups}):  # a model needs attention somewhere
        stacks.append(Architecture.of((groups, *(width,) * (layers - 1)), (neurons,) * layers))
    for units in sorted({0, *widths["mlp"]} - {neurons}):
        stacks.append(Architecture((groups,) * layers, (units,) * layers))
    few = min(FEW_LAYERS, layers - 1)
    gone = (0,) * (layers - few)
    stacks.append(Architecture((groups,) * few + gone, (neurons,) * few + gone))
    return stacks


def blocks_of(anatomy: Anatomy, widths: Mapping[BlockKind, Sequence[int]]) -> list[tuple[BlockKind, int]]:
    """Every kind of block at every width that has any unit, the dense width among them, the smaller first."""
    return [
        (block.kind, width)
        for block in anatomy.blocks
        for width in sorted({*widths[block.kind], block.units} - {0}, key=block.parameters_at)
    ]


def at_widths(rows: Sequence[tuple[int, float]], units: Tensor) -> Tensor:
    """What (width, value) rows say of blocks of any width, linear between them: the shape of `units`.

    Widths that lack query heads are of those that were measured.
    """
    widths, values = zip(*sorted(rows), strict=True)
    return torch.from_numpy(np.interp(units.numpy(), widths, values))


def a_prompt(model: PreTrainedModel, context: int, sequences: int) -> Tensor:
    """`sequences x context` token ids on the model's device; which ones they are changes no time and no size."""
    prompt = torch.arange(context, device=model.device) % model.config.get_text_config().vocab_size
    return prompt.expand(sequences, -1)


def _solve(
    anatomy: Anatomy, widths: Mapping[BlockKind, Sequence[int]], stacks: Sequence[Architecture], times: Sequence[Timing]
) -> PhaseTable:
    """Least squares in relative errors. Nothing takes negative time, and a block none less than a narrower one."""
    columns = blocks_of(anatomy, widths)
    rows = [
        [
            1.0,
            float(sum(map(stack.keeps_layer, range(anatomy.num_hidden_layers)))),
            *(float(stack.units(kind).count(units)) for kind, units in columns),
        ]
        for stack in stacks
    ]
    seconds = np.array([timing.ratio for timing in times]) * statistics.median(timing.dense for timing in times)
    # A block's time as the sum of its increments over the widths up to its own: the unknowns are then all at least 0.
    kinds = np.array([kind for kind, _ in columns])
    sums = np.eye(2 + len(columns))
    sums[2:, 2:] = np.tril(kinds[:, None] == kinds)
    increments, _ = nnls(np.array(rows) @ sums / seconds[:, None], np.ones(len(stacks)))
    fixed, layer, *each = (sums @ increments).tolist()
    blocks: dict[BlockKind, list[tuple[int, float]]] = {kind: [(0, 0.0)] for kind in BLOCK_KINDS}
    for (kind, units), value in zip(columns, each, strict=True):
        blocks[kind].append((units, value))
    return PhaseTable(fixed, layer, blocks, max(timing.spread for timing in times))


def _paired(dense: Sequence[float], own: Sequence[float]) -> Timing:
    """Of readings that were taken in turns."""
    if min(dense) <= 0:
        raise PruningError("The clock showed no progress between two readings: decode more tokens (steps_per_reading).")
    ratios = [mine / theirs for theirs, mine in zip(dense, own, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    fastest = [statistics.mean(sorted(readings)[:FASTEST]) for readings in (own, dense)]
    return Timing(fastest[0] / fastest[1], (high - low) / (2 * middle), statistics.median(dense))


@torch.inference_mode()
def _run(model: PreTrainedModel, workload: Workload, clock: Callable[[], float]) -> dict[Phase, list[float]]:
    """Seconds of one prompt, and per decoded token by reading."""
    prompt = a_prompt(model, workload.context, workload.sequences)
    readings = [clock()]
    out = model(prompt, use_cache=True, logits_to_keep=1)
    readings.append(clock())
    for step in range(workload.steps):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
        if (step + 1) % workload.steps_per_reading == 0:
            readings.append(clock())
    prefill, *decode = np.diff(readings).tolist()
    return {"prefill": [prefill], "decode": [seconds / workload.steps_per_reading for seconds in decode]}
