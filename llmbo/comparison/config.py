"""TOML -> checked comparison. Everything that can be refused without a model is refused here."""

import dataclasses
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmbo.comparison.strategies import strategy_of
from llmbo.config import MAX_NAME_BYTES, RunConfig
from llmbo.config.numbers import MOST, SEED, VALUE, Within, check_numbers
from llmbo.config.objectives import OBJECTIVES, SIZES
from llmbo.errors import ConfigError, first_line, unknown

T = TypeVar("T")

# Keys of a run that say how to search, not what to search; a comparison has its own.
_OF_THE_SEARCH = {
    "budget",
    "batch",
    "seed",
    "strategy",
    "name",
    "storage",
    "racing",
    "heldout_text",
    "samples",
    "elastic",
} | {item.name for item in dataclasses.fields(RunConfig) if item.name.startswith("advisor")}


@dataclass(frozen=True)
class ProblemConfig:
    """What is searched.

    Args:
        run: The settings of `llmbo optimize` that define a problem. The windows' seed is 0.
        undo_spacing: The text separates words and punctuation by spaces, as WikiText does: undo it.
        recorded: Name or folder of a recorded benchmark, which takes the place of a model.
    """

    run: RunConfig
    undo_spacing: bool = False
    recorded: str | None = None


@dataclass(frozen=True)
class Arm:
    """One line of the comparison.

    Args:
        label: How it is called in tables and pictures; unique.
        options: Changed keys of the strategy.
        problem: The common problem, or one with changed keys.
    """

    label: str
    strategy: str
    options: Mapping[str, Any]
    problem: ProblemConfig


@dataclass(frozen=True)
class CompareConfig:
    """A checked comparison.

    Args:
        checkpoints: Numbers of evaluations at which fronts are judged; the last is the budget.
        judged_points: Points of each front measured on held-out windows, spread evenly; 0 for no held-out judgement.
        margin: Reference point of losses, proxy and held-out, over the dense model's, in nats.
        method: Label of the arm that is tested against all others.
    """

    name: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    checkpoints: tuple[int, ...]
    batch: int
    judged_points: int
    margin: float
    method: str

    @property
    def budget(self) -> int:
        return self.checkpoints[-1]

    @property
    def judged_by(self) -> tuple[str, ...]:
        """The method's objectives, whose costs the fronts of all arms are judged by on held-out windows; none for no such judgement."""
        if not self.judged_points:
            return ()
        return next(arm.problem.run.objectives for arm in self.arms if arm.label == self.method)


@dataclass(frozen=True)
class _File:
    """The top level of the TOML file, as typed by the user."""

    strategies: list[str | dict[str, Any]]
    problem: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    seeds: Annotated[tuple[int, ...], SEED] = (0, 1, 2, 3, 4)
    checkpoints: Annotated[tuple[int, ...], Within(1, MOST)] = (20, 40, 100)
    batch: Annotated[int, Within(1, MOST)] = 4
    judged_points: Annotated[int, Within(0, MOST)] = 24
    margin: Annotated[float, VALUE] = 1.0
    method: str = ""


def read_config(
    path: Path, problem: str | None = None, text: str | None = None, seeds: tuple[int, ...] | None = None
) -> CompareConfig:
    """Read and check a TOML file.

    Args:
        problem: A recorded benchmark that replaces the file's problem.
        text: Replaces the problem's `text`.
        seeds: Replace the file's.

    Raises:
        ConfigError: One line that names the key, the value and what was expected.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the comparison '{path}': {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is no TOML file: {first_line(error)}.") from error
    if "strategies" not in table:
        raise ConfigError(f'\'{path}\' names no strategies: add e.g. strategies = ["qnehvi", "threshold"].')
    file = _typed(_File, table, f"key in {path}", {item.name for item in dataclasses.fields(_File)})
    file = replace(file, seeds=seeds if seeds is not None else file.seeds, name=file.name or path.stem)
    if problem is not None:
        file = replace(file, problem={"recorded": problem})
    if text is not None:
        file = replace(file, problem={**file.problem, "text": text})
    return _checked(file)


def _checked(file: _File) -> CompareConfig:
    check_numbers(file, name=str)
    if not file.strategies:
        raise ConfigError('strategies is empty: name at least one, e.g. strategies = ["qnehvi", "threshold"].')
    if not file.seeds:
        raise ConfigError("seeds is empty: give at least one, e.g. seeds = [0, 1, 2, 3, 4].")
    if len(set(file.seeds)) != len(file.seeds):
        raise ConfigError(f"seeds must be different numbers, got {list(file.seeds)}.")
    if not file.checkpoints or list(file.checkpoints) != sorted(set(file.checkpoints)):
        raise ConfigError(f"checkpoints must be increasing numbers of evaluations, got {list(file.checkpoints)}.")
    if file.judged_points == 1:
        raise ConfigError("judged_points must be 0 or at least 2, got 1.")
    if not file.name.replace("-", "").replace("_", "").replace(".", "").isalnum() or len(file.name) > MAX_NAME_BYTES:
        raise ConfigError(f"name may hold letters, digits, '.', '_' and '-' only, got '{file.name}'.")
    arms = tuple(_arm(item, file.problem) for item in file.strategies)
    labels = [arm.label for arm in arms]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"Two strategies are called '{twice[0]}': give one of them another label.")
    method = file.method or ("qnehvi" if "qnehvi" in labels else labels[0])
    if method not in labels:
        raise ConfigError(unknown("method", method, labels))
    for arm in arms:
        initial = {**strategy_of(arm.strategy).options, **arm.options}.get("num_initial", 0)
        if file.checkpoints[0] < initial:
            raise ConfigError(
                f"The checkpoint {file.checkpoints[0]} is smaller than the initial design of {arm.label} ({initial} evaluations): "
                "raise it, or change num_initial."
            )
    config = CompareConfig(
        file.name, arms, file.seeds, file.checkpoints, file.batch, file.judged_points, file.margin, method
    )
    _check_one_ruler(config)
    return config


def _check_one_ruler(config: CompareConfig) -> None:
    """Refuse arms that do not know the costs that all are judged by, or count them for another use of the model."""
    own = next(arm.problem.run for arm in config.arms if arm.label == config.method)
    for name in config.judged_by:
        kind = OBJECTIVES[name]
        if not kind.known or name in SIZES:
            continue
        for arm in config.arms:
            run = arm.problem.run
            if not kind.function and name not in run.objectives:
                raise ConfigError(
                    f"All fronts are judged by {name}, which {config.method} searches and {arm.label} does not know: add it to the "
                    "objectives there, or set judged_points = 0."
                )
            for key in ("deploy", "quantize") if kind.file else ("context", "serve_batch", "latency_target"):
                if (found := getattr(run, key)) != (wanted := getattr(own, key)):
                    raise ConfigError(
                        f"All fronts are judged by {name}, which {config.method} counts with {key} = {wanted} and {arm.label} with "
                        f"{found}: make them equal, or set judged_points = 0."
                    )


def _arm(item: str | dict[str, Any], problem: dict[str, Any]) -> Arm:
    table = {"strategy": item} if isinstance(item, str) else dict(item)
    if not isinstance(table.get("strategy"), str):
        raise ConfigError(f"An entry of strategies needs the key strategy, got {item}.")
    name = table.pop("strategy")
    strategy, label = strategy_of(name), str(table.pop("label", name))
    changes = {key: table.pop(key) for key in list(table) if key in _problem_keys()}
    for key in table:
        if key not in strategy.options:
            known = [*strategy.options, "label", *_problem_keys()]
            raise ConfigError(unknown(f"key of the strategy {name}", key, known))
    found = _problem({**problem, **changes})
    strategy.strategy.check(name, found.run.recipe_search)
    return Arm(label, name, strategy.checked(table), found)


def _problem_keys() -> list[str]:
    of_run = [item.name for item in dataclasses.fields(RunConfig) if item.name not in _OF_THE_SEARCH]
    return [*of_run, "undo_spacing", "recorded"]


def _problem(table: dict[str, Any]) -> ProblemConfig:
    for key in table:
        if key not in _problem_keys():
            raise ConfigError(unknown("key of the problem", key, _problem_keys()))
    table = dict(table)
    own: dict[str, Any] = {key: table.pop(key) for key in ("undo_spacing", "recorded") if key in table}
    if "recorded" in own:
        changed = [key for key in table if key not in ("objectives", "reference_point")]
        if changed:
            raise ConfigError(f"A recorded problem is as it was recorded: remove the key {changed[0]}.")
        table["model"] = "recorded"
    if "model" not in table:
        raise ConfigError('The problem names no model: add e.g. model = "llama", or recorded = "problem-r-surrogate".')
    table.setdefault("calibration_tokens", 16384)  # a comparison does not depend on how fast the machine is
    run = _typed(RunConfig, table, "key of the problem", table.keys())
    if "recorded" in own and (lacking := [name for name in run.objectives if not _recorded(name)]):
        raise ConfigError(
            f"A recorded problem does not know {lacking[0]}: expected some of {', '.join(filter(_recorded, OBJECTIVES))}."
        )
    if run.items and "accuracy" not in run.objectives:
        raise ConfigError("items is of no use in a comparison without the objective accuracy: add it to objectives.")
    return _typed(ProblemConfig, {"run": run, **own}, "key of the problem", {"run", *own})


def _recorded(name: str) -> bool:
    """Whether recordings tell this objective: what they measured, and whatever is counted."""
    return name in ("kl", "loss") or bool(OBJECTIVES[name].function)


def _typed(cls: type[T], table: Mapping[str, Any], what: str, known: Collection[str]) -> T:
    for key in table:
        if key not in known:
            raise ConfigError(unknown(what, key, known))
    try:
        return TypeAdapter(cls).validate_python(dict(table))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if not isinstance(part, int) and part in table)
        raise ConfigError(f"{where}: {first['msg']}, got {first['input']!r}.") from None
