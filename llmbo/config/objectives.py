"""What can be optimised and limited, by name: one row for each, and the checks of what the user typed."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llmbo.errors import ConfigError, unknown


@dataclass(frozen=True)
class ObjectiveKind:
    """What a name stands for. `default` gives the reference point from the dense model's value."""

    unit: str
    known: bool
    default: Callable[[float], float] = lambda dense: dense
    maximize: bool = False


OBJECTIVES = {
    "kl": ObjectiveKind("nats/token", False, lambda dense: 1.2),
    "loss": ObjectiveKind("nats/token", False, lambda dense: dense + 1.0),
    "accuracy": ObjectiveKind("share of items", False, lambda dense: dense / 2, maximize=True),
    "params": ObjectiveKind("parameters", True),
    "params_share": ObjectiveKind("share of the decoder blocks' parameters", True),
    "flops": ObjectiveKind("FLOPs/token", True),
    "weight_bytes": ObjectiveKind("bytes", True),
    "kv_bytes": ObjectiveKind("bytes", True),
    "prefill_latency": ObjectiveKind("ms", True),
    "decode_latency": ObjectiveKind("ms/token", True),
    "energy": ObjectiveKind("J/token", True),
    "peak_memory": ObjectiveKind("bytes", True),
}
MAX_OBJECTIVES = 3


def check_objectives(names: Sequence[str], reference_point: Sequence[float] | None) -> None:
    """Refuse what can be refused before any model is loaded.

    Raises:
        ConfigError: Unknown or repeated name, too few or too many, nothing measured or nothing known, or a reference
            point that nothing can beat.
    """
    listed = ",".join(names)
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(f"Unknown objective '{name}': expected some of {', '.join(OBJECTIVES)}.")
    if len(set(names)) != len(names) or not 2 <= len(names) <= MAX_OBJECTIVES:
        raise ConfigError(f"--objectives needs two or three different names, got '{listed}'.")
    for known, needed in ((False, "one quality"), (True, "one cost")):
        some = ", ".join(name for name, kind in OBJECTIVES.items() if kind.known is known)
        if not any(OBJECTIVES[name].known is known for name in names):
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
        if name not in OBJECTIVES:
            raise ConfigError(unknown("name after --max", name, OBJECTIVES))
        if OBJECTIVES[name].maximize:
            raise ConfigError(f"--max {word}: more {name} is better, so there is nothing to limit.")
        if name in limits:
            raise ConfigError(f"--max {name} is given twice ({limits[name]:g} and {value:g}): keep one.")
        limits[name] = value
    return limits


def known_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Those on what follows from the architecture: every candidate keeps them."""
    return {name: limit for name, limit in limits.items() if OBJECTIVES[name].known}


def measured_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """Those on what only an evaluation tells."""
    return {name: limit for name, limit in limits.items() if not OBJECTIVES[name].known}


def feasible(values: Mapping[str, float], limits: Mapping[str, float]) -> bool:
    """Whether a trial with these values keeps all limits."""
    return all(values[name] <= limit for name, limit in limits.items())
