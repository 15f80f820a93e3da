"""Latency, energy and peak memory as known objectives: tables per device and model, measured once and kept in the cache."""

import hashlib
import json
import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils import benchmark
from transformers import PreTrainedModel

from llmbo.config.objectives import OBJECTIVES, TableKind
from llmbo.errors import ConfigError
from llmbo.files import replace_file
from llmbo.models.aliases import cache_dir
from llmbo.models.loading import LoadedModel, load_model, max_positions
from llmbo.models.placement import choose_device
from llmbo.problem.energy import energy_counter
from llmbo.problem.space import CostFunction, SearchSpace
from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS, BlockKind
from pruning.latency import (
    PHASES,
    LatencyTable,
    PhaseTable,
    Workload,
    blocks_of,
    measure_table,
    measured_seconds,
    stacks_of,
)
from pruning.memory import MemoryTable, measure_memory_table, peak_bytes
from pruning.widths import lacking_of

MAX_WIDTHS = 12  # per kind; widths between two measured ones are interpolated
ENERGY_STEPS = 64  # decoded tokens per reading: counters are renewed every few milliseconds at best

KIND_OF = {name: kind.table for name, kind in OBJECTIVES.items() if kind.table}


class Profile(Protocol):
    """A table from which something that depends on the device is known for every architecture."""

    @property
    def table(self) -> Any: ...

    def costs(self) -> dict[str, CostFunction]:
        """Predictions by objective name, as `SearchSpace` takes them."""
        ...

    def measure(self, model: PreTrainedModel, architecture: Architecture) -> dict[str, float]:
        """The same of the dense `model` cut for real."""
        ...


@dataclass(frozen=True)
class LatencyProfile:
    """Milliseconds per prompt and per decoded token, all sequences at a time."""

    table: LatencyTable

    def costs(self) -> dict[str, CostFunction]:
        return {f"{phase}_latency": _scaled(self.table.phases[phase], 1000) for phase in PHASES}

    def measure(self, model: PreTrainedModel, architecture: Architecture) -> dict[str, float]:
        found = measured_seconds(self.table, model, architecture)
        return {f"{phase}_latency": 1000 * seconds for phase, seconds in found.items()}


@dataclass(frozen=True)
class EnergyProfile:
    """Joules per decoded token: the table of block times with a counter of joules for a clock."""

    table: LatencyTable
    counter: Callable[[], float]

    def costs(self) -> dict[str, CostFunction]:
        return {"energy": _scaled(self.table.phases["decode"], 1 / self.table.workload.sequences)}

    def measure(self, model: PreTrainedModel, architecture: Architecture) -> dict[str, float]:
        found = measured_seconds(self.table, model, architecture, self.counter)
        return {"energy": found["decode"] / self.table.workload.sequences}


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes at the peak of a prompt and a decoded token."""

    table: MemoryTable
    anatomy: Anatomy

    def costs(self) -> dict[str, CostFunction]:
        return {"peak_memory": partial(self.table.peak, self.anatomy)}

    def measure(self, model: PreTrainedModel, architecture: Architecture) -> dict[str, float]:
        serving = self.table.serving
        return {"peak_memory": peak_bytes(model, architecture, serving.context, serving.sequences)}


@dataclass(frozen=True)
class Target:
    """Where and for what the model will run, and what is known about it.

    Args:
        model: Dense, on the device that counts.
    """

    model: PreTrainedModel
    profiles: Mapping[TableKind, Profile]

    def costs(self) -> dict[str, CostFunction]:
        return {name: cost for profile in self.profiles.values() for name, cost in profile.costs().items()}

    def measure(self, architecture: Architecture) -> dict[str, float]:
        """What `costs` predicts, of the model cut for real, by objective name."""
        found: dict[str, float] = {}
        for profile in self.profiles.values():
            found |= profile.measure(self.model, architecture)
        return found

    def to_dict(self) -> dict[str, Any]:
        return {kind: profile.table.to_dict() for kind, profile in self.profiles.items()}


@dataclass(frozen=True)
class Check:
    """Predicted and measured values of the same architectures, by objective name."""

    pairs: Mapping[str, Sequence[tuple[float, float]]]

    def error(self, name: str) -> float:
        """Mean error as a share of the measured value."""
        return float(np.mean([abs(predicted / measured - 1) for predicted, measured in self.pairs[name]]))

    def rank_correlation(self, name: str) -> float:
        """Spearman's."""
        predicted, measured = zip(*self.pairs[name], strict=True)
        from scipy.stats import spearmanr  # imported when asked for: it takes a third of a second

        return float(spearmanr(predicted, measured).statistic)


def target_model(loaded: LoadedModel, target: str) -> PreTrainedModel:
    """The dense model on the device that counts; `loaded` itself when it is there.

    Raises:
        ConfigError: The device is not there.
    """
    if target == "auto":
        return loaded.model
    device = torch.device(choose_device(target, "--latency-target"))
    if device.type == loaded.model.device.type and device.index in (None, loaded.model.device.index):
        return loaded.model
    return load_model(loaded.name, loaded.dtype, target).model


def build_target(
    model: PreTrainedModel,
    space: SearchSpace,
    workload: Workload,
    kinds: Collection[TableKind],
    stored: Mapping[str, Any] | None = None,
    fresh: bool = False,
    on_measured: Callable[[int], None] | None = None,
) -> Target:
    """Take each table from the run that is continued, from the cache, or measure it.

    Args:
        stored: `Target.to_dict` of the run that is continued.
        on_measured: Called with the number of measurements done, of `num_measurements`.

    Raises:
        ConfigError: The context does not fit the model, or energy cannot be measured here.
    """
    profiles: dict[TableKind, Profile] = {}
    before = 0

    def advance(done: int) -> None:
        if on_measured:
            on_measured(before + done)

    for kind in kinds:
        _check_context(model, workload)
        if kind == "memory" and model.device.type not in ("cpu", "cuda"):  # no other allocator tells its peak
            raise ConfigError(
                f"peak_memory can be measured on a CPU or with CUDA, not on '{model.device.type}': leave it out, or measure "
                "for another device with --latency-target cpu."
            )
        own = _energy_workload(model, workload) if kind == "energy" else workload
        clock = energy_counter(model.device) if kind == "energy" else benchmark.timer
        table = (stored or {}).get(kind) or _table(kind, model, measured_widths(space), own, clock, fresh, advance)
        profiles[kind] = _profile(kind, table, space.anatomy, clock)
        before += num_measurements(space, [kind])
    return Target(model, profiles)


def _table(
    kind: TableKind,
    model: PreTrainedModel,
    widths: Mapping[BlockKind, Sequence[int]],
    workload: Workload,
    clock: Callable[[], float],
    fresh: bool,
    on_measured: Callable[[int], None],
) -> dict[str, Any]:
    """A table as a dict, from the cache if it was measured before for the same device, sizes and workload."""
    identity = _identity(kind, model, widths, workload)
    path = _path(identity)
    if path.is_file() and not fresh:
        table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["table"]
        return table
    if kind == "memory":
        table = measure_memory_table(model, widths, workload.context, workload.sequences, on_measured).to_dict()
    else:
        phases = PHASES if kind == "latency" else ("decode",)
        table = measure_table(model, widths, workload, on_measured, clock, phases).to_dict()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps({"identity": identity, "table": table}, indent=2) + "\n")
    return table


def _profile(kind: TableKind, table: Mapping[str, Any], anatomy: Anatomy, clock: Callable[[], float]) -> Profile:
    if kind == "memory":
        return MemoryProfile(MemoryTable.from_dict(table), anatomy)
    blocks = LatencyTable.from_dict(table)
    return EnergyProfile(blocks, clock) if kind == "energy" else LatencyProfile(blocks)


def _check_context(model: PreTrainedModel, workload: Workload) -> None:
    positions = max_positions(model)
    if workload.context + workload.steps > positions:
        raise ConfigError(
            f"--context {workload.context} and {workload.steps} decoded tokens do not fit the model's {positions} positions: "
            f"give at most {positions - workload.steps}."
        )


def _energy_workload(model: PreTrainedModel, workload: Workload) -> Workload:
    steps = max(workload.steps, min(ENERGY_STEPS, max_positions(model) - workload.context))
    return replace(workload, steps=steps, steps_per_reading=steps)


def _scaled(phase: PhaseTable, factor: float) -> CostFunction:
    return lambda groups, neurons: factor * phase.seconds(groups, neurons)


def measured_widths(space: SearchSpace) -> dict[BlockKind, list[int]]:
    """Of the grid's widths as many as are worth a stack, evenly spread, the dense one among them; all that lack query heads."""

    def some(widths: Sequence[int]) -> list[int]:
        whole = [width for width in widths if not lacking_of(width)]
        if len(whole) > MAX_WIDTHS + 1:
            whole = [whole[index] for index in np.linspace(0, len(whole) - 1, MAX_WIDTHS + 1).round().astype(int)]
        return [width for width in widths if lacking_of(width) or width in whole]

    return {kind: some(widths) for kind, widths in space.widths.items()}


def num_measurements(space: SearchSpace, kinds: Collection[TableKind]) -> int:
    """How many measurements the tables take."""
    widths = measured_widths(space)
    return sum(
        len(blocks_of(space.anatomy, widths) if kind == "memory" else stacks_of(space.anatomy, widths))
        for kind in kinds
    )


def check(target: Target, architectures: Sequence[Architecture], on_done: Callable[[int], None]) -> Check:
    """Predict and measure each architecture as a whole."""
    costs = target.costs()
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in costs}
    for index, architecture in enumerate(architectures):
        measured = target.measure(architecture)
        units = [torch.tensor(architecture.units(kind)) for kind in BLOCK_KINDS]
        for name, cost in costs.items():
            pairs[name].append((float(cost(*units)), measured[name]))
        on_done(index + 1)
    return Check(pairs)


def device_name(device: torch.device) -> str:
    """The hardware, as a table is valid for it: a GPU's name, or a CPU's with the threads used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{device.type} {model or platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _identity(
    kind: TableKind, model: PreTrainedModel, widths: Mapping[BlockKind, Sequence[int]], workload: Workload
) -> dict[str, Any]:
    """All that a table depends on. Of the model these are the sizes, not the weights."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    return {
        "kind": kind,
        "device": device_name(model.device),
        "dtype": str(model.dtype),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "workload": asdict(workload),
        "widths": dict(widths),
        "config": config,
    }


def _path(identity: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_dir() / "profiles" / f"{digest}.json"
