"""Stored trials -> `report.json` and `front.png`. Needs no model.

The classes below *are* the format: they validate every report before it is written, and `docs/report.schema.json` is
made from them.
"""

import json
import os
import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llmbo.advisor.summary import AdvisorPart
from llmbo.objectives import Objective, ref_point, to_maximize
from llmbo.pareto import hypervolume_trace, pareto_front
from llmbo.space import SearchSpace
from llmbo.types import Trial

PACKAGES = ("llmbo", "torch", "transformers", "botorch", "gpytorch", "optuna")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RunPart(_Part):
    """How the run was made. `settings` are what the user chose; `seconds` are summed over resumed processes, by phase."""

    name: str
    command: str
    status: Literal["complete", "interrupted", "failed"]
    settings: dict[str, Any]
    seed: int
    versions: dict[str, str]
    platform: str
    device: str
    dtype: str
    seconds: dict[str, float]
    peak_memory_bytes: int


class ModelPart(_Part):
    name: str
    source: str
    model_type: str
    fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    params: int
    block_params: int


class SplitPart(_Part):
    """One of three disjoint sets of windows. `tokens` counts every token of every window, BOS included."""

    windows: int
    tokens: int


class DataPart(_Part):
    """Where the text came from. Losses are means over the `window - 1` predicted tokens of each window."""

    source: str
    sha256: str
    available_tokens: int
    window: int
    bos: bool
    calibration: SplitPart
    proxy: SplitPart
    heldout: SplitPart


class SpacePart(_Part):
    dimensions: int
    kv_group_levels: list[int]
    neuron_levels: list[int]
    min_share: float


class ObjectivePart(_Part):
    name: str
    unit: str
    direction: Literal["minimize", "maximize"]
    reference_point: float
    known: bool


class ArchitecturePart(_Part):
    kv_groups: list[int]
    neurons: list[int]


class Values(_Part):
    """`kl` and `loss` in nats per token; `params` of the whole model; `params_share` of the decoder blocks."""

    kl: float
    loss: float
    perplexity: float
    params: int
    params_share: float


class TrialPart(_Part):
    number: int
    round: int
    origin: str
    state: Literal["running", "complete", "failed"]
    architecture: ArchitecturePart
    objectives: Values | None
    seconds: float | None
    failure: str | None


class FrontPoint(_Part):
    """`heldout` is null while the held-out windows have not been evaluated (an interrupted run)."""

    trial: int | None
    architecture: ArchitecturePart
    objectives: Values
    heldout: Values | None


class HypervolumePart(_Part):
    """Dominated hypervolume after each finished trial, in the product of the objectives' units."""

    final: float
    trace: list[float]


class Report(_Part):
    schema_version: Literal[1] = 1
    run: RunPart
    model: ModelPart
    data: DataPart
    space: SpacePart
    objectives: list[ObjectivePart]
    dense: FrontPoint
    trials: list[TrialPart]
    front: list[FrontPoint]
    hypervolume: HypervolumePart
    advisor: AdvisorPart | None = None


def json_schema() -> str:
    """The JSON schema of `report.json`, as kept in `docs/`."""
    return json.dumps(Report.model_json_schema(), indent=2) + "\n"


def front_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """The non-dominated complete trials, smallest first."""
    complete = [trial for trial in trials if trial.complete]
    front = [complete[index] for index in pareto_front(to_maximize([trial.values for trial in complete], objectives))]
    return sorted(front, key=lambda trial: (trial.values["params"], trial.number))


def build_report(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    space: SearchSpace,
    facts: Mapping[str, Any],
    heldout: Mapping[int, Mapping[str, float]],
    advisor: AdvisorPart | None = None,
) -> Report:
    """Put stored trials into the report's shape.

    Args:
        facts: `run`, `model` and `data` as the report shows them, and `dense` and `dense_heldout` values.
        heldout: Held-out values by trial number.
        advisor: What advice cost and brought, for a run with an advisor.
    """
    complete = [trial for trial in trials if trial.complete]
    trace = hypervolume_trace(to_maximize([trial.values for trial in complete], objectives), ref_point(objectives))
    return Report(
        run=facts["run"],
        model=facts["model"],
        data=facts["data"],
        space=SpacePart(
            dimensions=space.d,
            kv_group_levels=space.widths["attention"],
            neuron_levels=space.widths["mlp"],
            min_share=space.min_share,
        ),
        objectives=[
            ObjectivePart(
                name=objective.name,
                unit=objective.unit,
                direction="maximize" if objective.maximize else "minimize",
                reference_point=objective.reference,
                known=objective.known,
            )
            for objective in objectives
        ],
        dense=_point(None, space.max_levels, space, facts["dense"], facts.get("dense_heldout")),
        trials=[
            TrialPart(
                number=trial.number,
                round=trial.round,
                origin=trial.origin,
                state=trial.state.value,
                architecture=_architecture(space, trial.x),
                objectives=Values.model_validate(trial.values) if trial.complete else None,
                seconds=trial.seconds,
                failure=trial.failure,
            )
            for trial in trials
        ],
        front=[
            _point(trial.number, trial.x, space, trial.values, heldout.get(trial.number))
            for trial in front_of(trials, objectives)
        ],
        hypervolume=HypervolumePart(final=trace[-1] if trace else 0.0, trace=trace),
        advisor=advisor,
    )


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json` and `front.png`, each to a temporary name first: a reader never sees half a file."""
    _replace(folder / "report.json", (report.model_dump_json(indent=2) + "\n").encode())
    temporary = folder / ".front.png"
    _draw(report, temporary)
    os.replace(temporary, folder / "front.png")


def environment() -> dict[str, Any]:
    """Versions and peak memory of this process, as `RunPart` wants them."""
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "platform": platform.platform(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
    }


def _architecture(space: SearchSpace, x: tuple[int, ...]) -> ArchitecturePart:
    return ArchitecturePart(**space.decode(x).to_dict())


def _point(
    trial: int | None,
    x: tuple[int, ...],
    space: SearchSpace,
    values: Mapping[str, float],
    heldout: Mapping[str, float] | None,
) -> FrontPoint:
    return FrontPoint(
        trial=trial,
        architecture=_architecture(space, x),
        objectives=Values.model_validate(values),
        heldout=Values.model_validate(heldout) if heldout else None,
    )


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _draw(report: Report, path: Path) -> None:
    """Every trial and the front, quality against size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = next(objective for objective in report.objectives if objective.known)
    quality = next(objective for objective in report.objectives if not objective.known)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    origins = sorted({trial.origin for trial in report.trials if trial.objectives})
    for origin, color, marker in zip(
        origins, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"), "osD^v", strict=False
    ):
        values = [trial.objectives for trial in report.trials if trial.objectives and trial.origin == origin]
        x, y = ([getattr(value, name) for value in values] for name in (size.name, quality.name))
        axes.scatter(x, y, s=18, color=color, marker=marker, alpha=0.6, linewidths=0, label=f"{origin} ({len(values)})")
    front = [point.objectives for point in report.front]
    x, y = ([getattr(value, name) for value in front] for name in (size.name, quality.name))
    axes.step(x, y, where="post", color="black", lw=1.2, label="front, proxy windows")
    seen = [point for point in report.front if point.heldout]
    if seen:
        x, y = ([getattr(point.heldout, name) for point in seen] for name in (size.name, quality.name))
        axes.plot(x, y, "x", color="#D55E00", ms=5, label="front, held-out windows")
    dense = report.dense.objectives
    axes.plot(getattr(dense, size.name), getattr(dense, quality.name), "*", color="black", ms=11, label="dense model")
    axes.set(xlabel=f"{size.name} ({size.unit})", ylabel=f"{quality.name} ({quality.unit})")
    axes.set_title(f"{report.model.name}: {len(report.trials)} trials")
    axes.set_ylim(top=1.15 * quality.reference_point)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, format="png")
