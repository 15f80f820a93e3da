"""What can be optimised: name, unit, direction, reference point. The only place where a sign flips."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.errors import ConfigError


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


# name -> (unit, known, reference point as a function of the dense model's value)
_KNOWN_OBJECTIVES = {
    "kl": ("nats/token", False, lambda dense: 1.2),
    "loss": ("nats/token", False, lambda dense: dense + 1.0),
    "params": ("parameters", True, lambda dense: dense),
    "params_share": ("share of the decoder blocks' parameters", True, lambda dense: dense),
}
OBJECTIVES = tuple(_KNOWN_OBJECTIVES)


def check_objectives(names: Sequence[str], reference_point: Sequence[float] | None) -> None:
    """Refuse what can be refused before any model is loaded.

    Raises:
        ConfigError: Unknown or repeated name, none or only measured ones, or a reference point that nothing can beat.
    """
    for name in names:
        if name not in _KNOWN_OBJECTIVES:
            raise ConfigError(f"Unknown objective '{name}': expected some of {', '.join(OBJECTIVES)}.")
    if len(set(names)) != len(names) or len(names) < 2:
        raise ConfigError(f"--objectives needs at least two different names, got '{','.join(names)}'.")
    if sum(_KNOWN_OBJECTIVES[name][1] for name in names) != 1:
        raise ConfigError(
            f"--objectives needs exactly one size (params or params_share) beside quality, got '{','.join(names)}'."
        )
    if reference_point is None:
        return
    if len(reference_point) != len(names):
        raise ConfigError(
            f"--reference-point needs one number per objective ({','.join(names)}), got {len(reference_point)}."
        )
    for name, value in zip(names, reference_point, strict=True):
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(
                f"--reference-point for {name} is {value}, which no model can beat: give a number above 0."
            )


def build_objectives(
    names: Sequence[str],
    dense: Mapping[str, float],
    smallest: Mapping[str, float],
    reference_point: Sequence[float] | None = None,
) -> tuple[Objective, ...]:
    """Objectives with their reference points.

    Args:
        dense: The dense model's values; default reference points follow from them.
        smallest: Known values of the smallest legal model.
        reference_point: In the objectives' units.

    Raises:
        ConfigError: No candidate, not even the best conceivable, could beat the reference point.
    """
    built = []
    for index, name in enumerate(names):
        unit, known, default = _KNOWN_OBJECTIVES[name]
        reference = reference_point[index] if reference_point is not None else default(dense[name])
        best, whose = (smallest[name], "the smallest legal model") if known else (dense[name], "the dense model")
        if reference <= best:
            raise ConfigError(
                f"--reference-point for {name} is {reference:g}, but {whose} has {best:g}: no candidate would count."
            )
        built.append(Objective(name, unit, known, reference))
    return tuple(built)


def to_maximize(values: Sequence[Mapping[str, float]], objectives: Sequence[Objective]) -> Tensor:
    """Values of n trials in the direction BoTorch assumes, `n x m` float64: larger is better."""
    rows = [[objective.sign * value[objective.name] for objective in objectives] for value in values]
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), len(objectives))


def ref_point(objectives: Sequence[Objective]) -> Tensor:
    """The reference point for maximisation, `m`."""
    return torch.tensor([objective.sign * objective.reference for objective in objectives], dtype=torch.float64)
