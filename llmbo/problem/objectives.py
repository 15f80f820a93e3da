"""The axes of a front: name, unit, direction, reference point. The only place where a sign flips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.config.objectives import OBJECTIVES, measured_limits
from llmbo.errors import ConfigError
from llmbo.types import Trial


@dataclass(frozen=True)
class Objective:
    """One axis of the front.

    Args:
        name: Key of the value in `Trial.values`.
        unit: As printed.
        known: An exact function of the architecture, never modelled.
        reference: Worst value that still counts towards hypervolume, in `unit`.
        maximize: Whether larger is better.
    """

    name: str
    unit: str
    known: bool
    reference: float
    maximize: bool = False

    @property
    def sign(self) -> float:
        return 1.0 if self.maximize else -1.0


def build_objectives(
    names: Sequence[str],
    dense: Mapping[str, float],
    smallest: Mapping[str, float],
    reference_point: Sequence[float] | None = None,
    limits: Mapping[str, float] | None = None,
) -> tuple[Objective, ...]:
    """Objectives with their reference points.

    Args:
        dense: The dense model's values; default reference points follow from them.
        smallest: Known values of the smallest legal model.
        reference_point: In the objectives' units.
        limits: What lies beyond a limit does not count either, so it bounds the reference point.

    Raises:
        ConfigError: No candidate, not even the best conceivable, could beat the reference point.
    """
    built = []
    for index, name in enumerate(names):
        kind = OBJECTIVES[name]
        reference = reference_point[index] if reference_point is not None else kind.default(dense[name])
        source = "--reference-point for "
        if limits and limits.get(name, math.inf) < reference:
            reference, source = limits[name], "--max "
        best, whose = (smallest[name], "the smallest legal model") if kind.known else (dense[name], "the dense model")
        if (reference <= best) if not kind.maximize else (reference >= best):
            raise ConfigError(f"{source}{name} is {reference:g}, but {whose} has {best:g}: no candidate would count.")
        built.append(Objective(name, kind.unit, kind.known, reference, kind.maximize))
    for name, limit in measured_limits(limits or {}).items():
        if limit <= dense[name]:
            raise ConfigError(f"--max {name}={limit:g}: even the dense model has {dense[name]:g}, so raise it.")
    return tuple(built)


def to_maximize(values: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> Tensor:
    """Values of n trials in the direction BoTorch assumes, `n x m` float64: larger is better."""
    rows = [[objective.sign * value[objective.name] for objective in objectives] for value in values]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(objectives))


def outcomes(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Tensor:
    """`to_maximize` of n complete trials; what is beyond a limit, or lost a race, is worse than anything: -inf."""
    Y = to_maximize([trial.values for trial in trials], objectives)
    Y[torch.tensor([not trial.counts for trial in trials], dtype=torch.bool)] = -torch.inf
    return Y


def ref_point(objectives: Sequence[Objective]) -> Tensor:
    """The reference point for maximisation, `m`."""
    return torch.tensor([objective.sign * objective.reference for objective in objectives], dtype=torch.float64)
