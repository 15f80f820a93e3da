"""Latency as a known objective: a table of block times per device and model, measured once and kept in the cache."""

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from llmbo.errors import ConfigError
from llmbo.models import LoadedModel, cache_dir, choose_device, load_model
from llmbo.space import CostFunction, SearchSpace
from pruning.anatomy import BlockKind
from pruning.architecture import Architecture
from pruning.latency import PHASES, LatencyTable, Phase, Workload, measure_table, stacks_of, time_architecture

NAMES = tuple(f"{phase}_latency" for phase in PHASES)
MAX_WIDTHS = 12  # per kind; widths between two measured ones are interpolated


@dataclass(frozen=True)
class Target:
    """Where and for what the model will run, and what is known about it.

    Args:
        model: Dense, on the device where latency counts.
    """

    model: PreTrainedModel
    table: LatencyTable

    def costs(self) -> dict[str, CostFunction]:
        """Predicted milliseconds by objective name, as `SearchSpace` takes them."""

        def cost(phase: Phase) -> CostFunction:
            table = self.table.phases[phase]
            return lambda groups, neurons: 1000 * table.seconds(groups, neurons)

        return {f"{phase}_latency": cost(phase) for phase in PHASES}

    def measure(self, architecture: Architecture) -> dict[str, float]:
        """Milliseconds of the model cut for real, by objective name."""
        found = time_architecture(self.model, architecture, self.table.workload)
        return {f"{phase}_latency": 1000 * timing.seconds for phase, timing in found.items()}


@dataclass(frozen=True)
class Check:
    """Predicted and measured milliseconds of the same architectures, by objective name."""

    pairs: Mapping[str, Sequence[tuple[float, float]]]

    def error(self, name: str) -> float:
        """Mean error as a share of the measured time."""
        return float(np.mean([abs(predicted / measured - 1) for predicted, measured in self.pairs[name]]))

    def rank_correlation(self, name: str) -> float:
        """Spearman's."""
        predicted, measured = zip(*self.pairs[name], strict=True)
        return float(spearmanr(predicted, measured).statistic)


def target_model(loaded: LoadedModel, target: str) -> PreTrainedModel:
    """The dense model on the device where latency counts; `loaded` itself when it is there.

    Raises:
        ConfigError: The device is not there.
    """
    if target == "auto":
        return loaded.model
    device = torch.device(choose_device(target))
    if device.type == loaded.model.device.type and device.index in (None, loaded.model.device.index):
        return loaded.model
    return load_model(loaded.name, loaded.dtype, target).model


def build_target(
    model: PreTrainedModel,
    space: SearchSpace,
    workload: Workload,
    stored: Mapping[str, Any] | None = None,
    fresh: bool = False,
    on_stack: Callable[[int], None] | None = None,
) -> Target:
    """Take the table from the run that is continued, from the cache, or measure it.

    Raises:
        ConfigError: The context does not fit the model.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and workload.context + workload.steps > positions:
        raise ConfigError(
            f"--context {workload.context} and {workload.steps} decoded tokens do not fit the model's {positions} positions: "
            f"give at most {positions - workload.steps}."
        )
    if stored is not None:
        return Target(model, LatencyTable.from_dict(stored))
    widths = measured_widths(space)
    identity = _identity(model, widths, workload)
    path = _path(identity)
    if path.is_file() and not fresh:
        return Target(model, LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8"))["table"]))
    table = measure_table(model, widths, workload, on_stack)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps({"identity": identity, "table": table.to_dict()}, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
    return Target(model, table)


def measured_widths(space: SearchSpace) -> dict[BlockKind, list[int]]:
    """Of the grid's widths as many as are worth a stack, evenly spread, the dense one among them."""

    def some(widths: Sequence[int]) -> list[int]:
        if len(widths) <= MAX_WIDTHS + 1:
            return list(widths)
        return [widths[index] for index in np.linspace(0, len(widths) - 1, MAX_WIDTHS + 1).round().astype(int)]

    return {kind: some(widths) for kind, widths in space.widths.items()}


def num_stacks(space: SearchSpace) -> int:
    """How many timings a table takes."""
    return len(stacks_of(space.anatomy, measured_widths(space)))


def check(target: Target, architectures: Sequence[Architecture], on_done: Callable[[int], None]) -> Check:
    """Predict and measure each architecture as a whole."""
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    costs = target.costs()
    for index, architecture in enumerate(architectures):
        measured = target.measure(architecture)
        units = torch.tensor(architecture.kv_groups), torch.tensor(architecture.neurons)
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


def _identity(model: PreTrainedModel, widths: Mapping[BlockKind, Sequence[int]], workload: Workload) -> dict[str, Any]:
    """All that a table depends on. Of the model these are the sizes, not the weights."""
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    return {
        "device": device_name(model.device),
        "dtype": str(model.dtype),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "workload": asdict(workload),
        "widths": dict(widths),
        "config": config,
    }


def _path(identity: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return cache_dir() / "latency" / f"{digest}.json"
