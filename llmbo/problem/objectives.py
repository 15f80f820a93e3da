"""What can be optimised: name, unit, direction, reference point. The only place where a sign flips."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.errors import ConfigError, unknown
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


@dataclass(frozen=True)
class _Kind:
    """What a name stands for. `default` gives the reference point from the dense model's value."""

    unit: str
    known: bool
    default: Callable[[float], float] = lambda dense: dense
    maximize: bool = False


KINDS = {
    "kl": _Kind("nats/token", False, lambda dense: 1.2),
    "loss": _Kind("nats/token", False, lambda dense: dense + 1.0),
    "accuracy": _Kind("share of items", False, lambda dense: dense / 2, maximize=True),
    "params": _Kind("parameters", True),
    "params_share": _Kind("share of the decoder blocks' parameters", True),
    "flops": _Kind("FLOPs/token", True),
    "weight_bytes": _Kind("bytes", True),
    "kv_bytes": _Kind("bytes", True),
    "prefill_latency": _Kind("ms", True),
    "decode_latency": _Kind("ms/token", True),
    "energy": _Kind("J/token", True),
    "peak_memory": _Kind("bytes", True),
}
OBJECTIVES = tuple(KINDS)
MAX_OBJECTIVES = 3


def check_objectives(names: Sequence[str], reference_point: Sequence[float] | None) -> None:
    """Refuse what can be refused before any model is loaded.

    Raises:
        ConfigError: Unknown or repeated name, too few or too many, nothing measured or nothing known, or a reference
            point that nothing can beat.
    """
    listed = ",".join(names)
    for name in names:
        if name not in KINDS:
            raise ConfigError(f"Unknown objective '{name}': expected some of {', '.join(OBJECTIVES)}.")
    if len(set(names)) != len(names) or not 2 <= len(names) <= MAX_OBJECTIVES:
        raise ConfigError(f"--objectives needs two or three different names, got '{listed}'.")
    for known, needed in ((False, "one quality"), (True, "one cost")):
        some = ", ".join(name for name, kind in KINDS.items() if kind.known is known)
        if not any(KINDS[name].known is known for name in names):
            raise ConfigError(f"--objectives needs at least {needed} ({some}), got '{listed}'.")
    if reference_point is None:
        return
    if len(reference_point) != len(names):
        raise ConfigError(f"--reference-point needs one number per objective ({listed}), got {len(reference_point)}.")
    for name, value in zip(names, reference_point, strict=True):
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(
                f"--reference-point for {name} is {value}, which no model can beat: give a number above 0."
            )


def parse_limits(words: Sequence[str]) -> dict[str, float]:
    """`NAME=VALUE` words -> largest allowed value by name.

    Raises:
        ConfigError: Not of that form, an unknown name, one given twice, a value that no model keeps, or a quality of which
            more is better.
    """
    limits: dict[str, float] = {}
    for word in words:
        name, equals, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not equals or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"--max needs NAME=VALUE with a value above 0, e.g. params_share=0.6, got '{word}'.")
        if name not in KINDS:
            raise ConfigError(unknown("name after --max", name, OBJECTIVES))
        if KINDS[name].maximize:
            raise ConfigError(f"--max {word}: more {name} is better, so there is nothing to limit.")
        if name in limits:
            raise ConfigError(f"--max {name} is given twice ({limits[name]:g} and {value:g}): keep one.")
        limits[name] = value
    return limits


def known_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Those on what follows from the architecture: every candidate keeps them."""
    return {name: limit for name, limit in limits.items() if KINDS[name].known}


def measured_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Those on what only an evaluation tells."""
    return {name: limit for name, limit in limits.items() if not KINDS[name].known}


def feasible(values: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a trial with these values keeps all limits."""
    return all(values[name] <= limit for name, limit in limits.items())


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
        kind = KINDS[name]
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
