"""The best model of a front within budgets: `params<=1e8`, `decode_latency<=12`, `accuracy>=0.5`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmbo.config.numbers import VALUE
from llmbo.config.objectives import OBJECTIVES
from llmbo.deploy.target import Base, Target
from llmbo.errors import ConfigError, unknown
from llmbo.report.quantities import quality_of
from llmbo.report.schema import FrontPoint, Report, Values
from pruning.architecture import Architecture
from pruning.errors import PruningError


def parse_budgets(words: Sequence[str]) -> dict[str, float]:
    """`NAME<=VALUE` words, `NAME>=VALUE` where more is better -> values by name.

    Raises:
        ConfigError: Not of that form, an unknown name, one given twice, or a value that no model keeps.
    """
    budgets: dict[str, float] = {}
    for word in words:
        found = re.fullmatch(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*", word)
        try:
            value = float(found[3]) if found else None
        except ValueError:
            value = None
        if found is None or value is None:
            raise ConfigError(f"--fit needs NAME<=VALUE with a number, e.g. \"params<=1e8\", got '{word}'.")
        name, sign = found[1], found[2]
        if name not in OBJECTIVES:
            raise ConfigError(unknown("name after --fit", name, OBJECTIVES))
        if sign != sign_of(name):
            better = "more" if OBJECTIVES[name].maximize else "less"
            raise ConfigError(
                f"--fit {word}: {better} {name} is better, so it must be {name}{sign_of(name)}{found[3]}."
            )
        VALUE.check(f"--fit {name}", value)
        if name in budgets:
            raise ConfigError(f"--fit {name} is given twice ({budgets[name]:g} and {value:g}): keep one.")
        budgets[name] = value
    return budgets


def sign_of(name: str) -> str:
    """How a budget on it is written."""
    return ">=" if name in OBJECTIVES and OBJECTIVES[name].maximize else "<="


def best_within(report: Report, budgets: Mapping[str, float], target: Target, base: Base = None) -> FrontPoint:
    """The point of the front with the best quality, as the search measured it, of those within all budgets; of equal ones the smallest.

    Args:
        budgets: Values by name of any objective or cost that the report holds, and `file_bytes`.
        target: What it is to be exported as: what that cannot hold is passed over, and `file_bytes` is counted of it.
        base: As in `Target.sizes`.

    Raises:
        ConfigError: The report holds no such value, or no point is within all of them: the nearest is named.
        ModelError: What `file_bytes` is counted from is not there.
        UnsupportedExport: The format holds no point of the front.
    """
    front = _holdable([point for point in report.front if point.trial is not None], report, target)
    held = [name for name in OBJECTIVES if all(_value(point.objectives, name) is not None for point in front)]
    for name in budgets:
        if front and name not in (*held, "file_bytes"):
            raise ConfigError(
                f"--fit {name}: the report of the run '{report.run.name}' holds no {name}, only {', '.join(held)}."
            )
    if front and "file_bytes" in budgets:
        front = _sized(front, target.sizes(report, [_architecture(point) for point in front], base))
    quality = quality_of([part.model_dump() for part in report.objectives])
    within = [point for point in front if all(_excess(point, name, value) <= 0 for name, value in budgets.items())]
    if within:
        return min(within, key=lambda point: (_signed(point, quality), point.objectives.params))
    asked = " and ".join(f"{name}{sign_of(name)}{value:g}" for name, value in budgets.items())
    if not front:
        raise ConfigError(
            f"The run '{report.run.name}' has no front to choose {asked} from: search with a larger --budget."
        )
    nearest = min(front, key=lambda point: max(_excess(point, name, value) for name, value in budgets.items()))
    has = ", ".join(f"{name} {_value(nearest.objectives, name):g}" for name in budgets)
    raise ConfigError(
        f"No model on the front of the run '{report.run.name}' has {asked}: the nearest is trial {nearest.trial} with {has}. "
        "Ask for less, or search with --max or a lower --min-share."
    )


def _holdable(front: Sequence[FrontPoint], report: Report, target: Target) -> list[FrontPoint]:
    """Those that the format can hold; if it can hold none, it says why."""
    found, refused = [], None
    for point in front:
        try:
            target.check(report, _architecture(point))
        except PruningError as error:
            refused = refused or error
        else:
            found.append(point)
    if refused and not found:
        raise refused
    return found


def _sized(front: Sequence[FrontPoint], sizes: Sequence[int]) -> list[FrontPoint]:
    return [
        point.model_copy(update={"objectives": point.objectives.model_copy(update={"file_bytes": size})})
        for point, size in zip(front, sizes, strict=True)
    ]


def _architecture(point: FrontPoint) -> Architecture:
    return Architecture.from_dict(point.architecture.model_dump())


def _value(values: Values, name: str) -> Any:
    return getattr(values, name, None)


def _signed(point: FrontPoint, name: str) -> float:
    """Less is better."""
    return float(_value(point.objectives, name)) * (-1 if OBJECTIVES[name].maximize else 1)


def _excess(point: FrontPoint, name: str, value: float) -> float:
    """How far beyond the budget, as a share of it; above 0 where it is not kept."""
    return (_signed(point, name) - (-value if OBJECTIVES[name].maximize else value)) / value
