"""How much memory serving takes at its peak: weights and KV cache by arithmetic, activations measured once per block and width.

Blocks run one after another and free what they used, so activations do not add up: the peak is the weights, the KV cache of the
layers run so far and the activations of the block where both together are largest. A prompt and one decoded token are looked at
apart. What is measured is what torch's allocator hands out, on a GPU by its counters, on a CPU by the profiler's records of the same;
the Python process and its libraries come on top.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.cost import Serving, kv_bytes_by_layer, weight_bytes
from pruning.latency import PHASES, Phase, a_prompt, at_widths, blocks_of
from pruning.shrinking import shrink_to
from pruning.widths import attention_width, lacking_of


@dataclass(frozen=True)
class MemoryTable:
    """What blocks need while they run, on one kind of device, for one workload.

    Args:
        serving: Context, sequences and bytes per value.
        phases: (width, bytes) by phase and kind, sizes ascending; the block's own share of the KV cache is not among them.
    """

    serving: Serving
    phases: Mapping[Phase, Mapping[BlockKind, Sequence[tuple[int, int]]]]

    def peak(self, anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor) -> Tensor:
        """Bytes at the peak, of `batch_shape x num_layers` units -> `batch_shape`; linear between measured widths."""
        cache = kv_bytes_by_layer(anatomy, kv_groups, self.serving).double()
        held = {"prefill": cache.cumsum(-1), "decode": cache.sum(-1, keepdim=True)}
        kept: dict[BlockKind, Tensor] = {"attention": kv_groups, "mlp": neurons}
        peaks = []
        for phase, blocks in self.phases.items():
            for kind, units in kept.items():
                peaks.append((at_widths(blocks[kind], units) + held[phase]).amax(-1))
        return weight_bytes(anatomy, kv_groups, neurons, self.serving) + torch.stack(peaks).amax(0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(Serving(**data["serving"]), data["phases"])


def measure_memory_table(
    model: PreTrainedModel,
    widths: Mapping[BlockKind, Sequence[int]],
    context: int,
    sequences: int,
    on_block: Callable[[int], None] | None = None,
) -> MemoryTable:
    """Measure one block at each width on the model's device.

    Memory: the model and a shrunk copy of two layers.

    Args:
        widths: Units of each kind to measure, the dense width among them.
        on_block: Called with the number of blocks done.
    """
    anatomy = anatomy_of(model)
    serving = Serving(context, sequences, model.dtype.itemsize)
    phases: dict[Phase, dict[BlockKind, list[tuple[int, int]]]] = {phase: {} for phase in PHASES}
    # The block stands behind a small one, because a layer's input is only kept where it is not the embeddings themselves.
    # No model has less attention than this one, so that it adds nothing to the peak.
    position = min(1, anatomy.num_hidden_layers - 1)
    lacking = anatomy.attention.queries - 1 if any(map(lacking_of, widths["attention"])) else 0
    for index, (kind, units) in enumerate(blocks_of(anatomy, widths)):
        rest = [0] * (anatomy.num_hidden_layers - 1)
        groups, neurons = [attention_width(1, lacking), *rest], [0, *rest]
        (groups if kind == "attention" else neurons)[position] = units
        needs = _needs(shrink_to(model, Architecture.of(groups, neurons)), context, sequences)
        own = int(kv_bytes_by_layer(anatomy, torch.tensor(groups), serving).sum())
        # Once the prompt is read the cache is there, and what comes on top does not hold it.
        found: dict[Phase, int] = {"prefill": needs.prefill - own, "decode": needs.decode}
        for phase, needed in found.items():
            phases[phase].setdefault(kind, []).append((units, max(0, needed)))
        if on_block:
            on_block(index + 1)
    return MemoryTable(serving, phases)


def peak_bytes(model: PreTrainedModel, architecture: Architecture, context: int, sequences: int) -> int:
    """Weights and the largest need of a dense `model` cut for real, whichever units it keeps."""
    small = shrink_to(model, architecture)
    needs = _needs(small, context, sequences)
    return sum(parameter.nbytes for parameter in small.parameters()) + max(needs.prefill, needs.held + needs.decode)


@dataclass(frozen=True)
class _Needs:
    """Bytes beyond the weights: for a prompt, held after it, and for a token after it beyond that."""

    prefill: int
    held: int
    decode: int


@torch.inference_mode()
def _needs(model: PreTrainedModel, context: int, sequences: int) -> _Needs:
    prompt = a_prompt(model, context, sequences)
    model(prompt[:, :2], use_cache=True, logits_to_keep=1)  # what is made once and stays is no activation
    with _Allocations(model.device) as first:
        out = model(prompt, use_cache=True, logits_to_keep=1)
    with _Allocations(model.device) as then:
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    return _Needs(first.peak, first.left, then.peak)


class _Allocations:
    """Bytes that torch's allocator hands out on a device while a context lasts: at most, and still held at its end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.peak = self.left = 0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it writes to the terminal at each start and end
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            self.left = torch.cuda.memory_allocated(self._device) - self._before
            return
        self._profile.__exit__(*error)
        # The public events only carry each operator's sum; the records of single allocations and releases give the peak.
        profiler: Any = self._profile.profiler
        records = profiler.kineto_results.events()
        for _, number in sorted((event.start_ns(), event.nbytes()) for event in records if event.name() == "[memory]"):
            self.left += number
            self.peak = max(self.peak, self.left)
