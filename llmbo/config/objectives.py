"""What is known of a model by name: one row for each quantity, and the checks of what the user typed.

To add an objective, add its row here and the function that counts or measures it. The rest follows from the row: what may be
asked for and limited, `SearchSpace.costs`, the fields of `report.json`, units and formats on the page, `--help`, and the table
in `docs/objectives.md`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from llmbo.config.numbers import VALUE
from llmbo.errors import ConfigError, unknown

TableKind = Literal["latency", "energy", "memory"]  # of blocks, measured on the device where the model will run
Format = Literal["plain", "count", "share", "bytes"]


@dataclass(frozen=True)
class Quantity:
    """Something that reports hold a number of.

    Args:
        unit: As printed; empty for a bare number.
        description: One line, for the documentation.
        measured: On windows of text, so that the finished front has a held-out value beside the proxy's.
        maximize: Whether more is better.
        format: How people write it: `plain` with its unit, a `count` whose name says the unit, a `share` in percent, `bytes`
            in kB and MB.
        integer: Whether it is a whole number.
        brief: Whether the page tells it of a trial in passing, whatever the search was for.
        required: Whether every report has it, those of the first version too. A new row's field is optional.
    """

    unit: str
    description: str
    measured: bool = False
    maximize: bool = False
    format: Format = "plain"
    integer: bool = False
    brief: bool = False
    required: bool = False


@dataclass(frozen=True)
class ObjectiveKind(Quantity):
    """What can be optimised and limited: it is measured, or else known of every architecture before any evaluation.

    Args:
        function: Of what is counted, `module:function` of anatomy, widths of attention and MLPs and serving as in `pruning.cost`.
        table: Of what follows from blocks measured on the device: which table; values come from a `Profile` in `llmbo.problem.hardware`.
        file: Of the files that a trial would be exported as: counted by `llmbo.problem.file_size` for runs that ask for it.
        default: The reference point, from the dense model's value.
    """

    function: str = ""
    table: TableKind | None = None
    file: bool = False
    default: Callable[[float], float] = lambda dense: dense

    @property
    def known(self) -> bool:
        """Whether it is an exact function of the architecture, never modelled."""
        return not self.measured

    @property
    def how(self) -> str:
        """How its value is come by."""
        return "measured" if self.measured else "from blocks measured on the device" if self.table else "counted"


# In this order they stand in reports, those that every report has first.
QUANTITIES = {
    "kl": ObjectiveKind(
        "nats/token",
        "divergence from the dense model's next-token distribution; orders candidates best, the default quality",
        measured=True,
        required=True,
        default=lambda dense: 1.2,
    ),
    "loss": ObjectiveKind(
        "nats/token",
        "negative log-likelihood of the text's next tokens",
        measured=True,
        required=True,
        default=lambda dense: dense + 1.0,
    ),
    "perplexity": Quantity("", "the loss's exponential", measured=True, required=True),
    "tokens": Quantity("", "seen of a candidate that lost its race", integer=True),
    "error": Quantity("", "standard error of the values of a candidate that lost its race"),
    "accuracy": ObjectiveKind(
        "share of items",
        "multiple-choice items of `--items FILE` that are answered right",
        measured=True,
        maximize=True,
        format="share",
        default=lambda dense: dense / 2,
    ),
    "params": ObjectiveKind(
        "parameters",
        "of the whole model",
        format="count",
        integer=True,
        brief=True,
        required=True,
        function="pruning.cost:parameters",
    ),
    "params_share": ObjectiveKind(
        "share of the decoder blocks' parameters",
        "what is kept of all that pruning can remove, the default size",
        format="share",
        brief=True,
        required=True,
        function="pruning.cost:parameters_share",
    ),
    "flops": ObjectiveKind(
        "FLOPs/token",
        "for one token that attends to `--context` tokens",
        integer=True,
        required=True,
        function="pruning.cost:flops",
    ),
    "weight_bytes": ObjectiveKind(
        "bytes",
        "all weights, two bytes a value",
        format="bytes",
        integer=True,
        required=True,
        function="pruning.cost:weight_bytes",
    ),
    "file_bytes": ObjectiveKind(
        "bytes",
        "weights' files that the first engine of `--deploy` takes, to the byte; with `--quantize`, or without engines, a GGUF file (f16)",
        format="bytes",
        integer=True,
        file=True,
    ),
    "kv_bytes": ObjectiveKind(
        "bytes",
        "the KV cache of `--serve-batch` sequences of `--context` tokens, two bytes a value",
        format="bytes",
        integer=True,
        required=True,
        function="pruning.cost:kv_bytes",
    ),
    "prefill_latency": ObjectiveKind("ms", "of a prompt of `--context` tokens", table="latency", brief=True),
    "decode_latency": ObjectiveKind("ms/token", "of a token after such a prompt", table="latency", brief=True),
    "energy": ObjectiveKind("J/token", "of a decoded token, by the device's own counters", table="energy", brief=True),
    "peak_memory": ObjectiveKind(
        "bytes", "weights, KV cache and the largest activations", format="bytes", table="memory", brief=True
    ),
}
OBJECTIVES = {name: row for name, row in QUANTITIES.items() if isinstance(row, ObjectiveKind)}
MAX_OBJECTIVES = 3
SIZES = {
    "params",
    "params_share",
    "weight_bytes",
}  # known costs that say the same of an architecture, however the model is used


def priced_by(names: Sequence[str]) -> tuple[str, ...]:
    """The known ones of some objectives, by which steps of the allocation path are priced; the share where all of them say the same."""
    known = tuple(name for name in names if OBJECTIVES[name].known)
    return known if set(known) - SIZES else ("params_share",)


def objectives_help() -> str:
    """All names by how they are come by, for `--help`."""
    names: dict[str, list[str]] = {}
    for name, kind in OBJECTIVES.items():
        names.setdefault(kind.how, []).append(name)
    groups = [f"{', '.join(some)} ({how})" for how, some in names.items()]
    return f"Two or three of {'; '.join(groups)}."


def limits_help() -> str:
    """What can be limited, for `--help`."""
    excepted = [name for name, kind in OBJECTIVES.items() if kind.maximize]
    but = f" but {' and '.join(excepted)}" if excepted else ""
    return f"Limit on any objective{but}, e.g. params_share=0.6; may be repeated."


def objectives_table() -> str:
    """All rows as Markdown, for the documentation."""
    lines = ["| name | unit | how it is known | |", "|---|---|---|---|"]
    for name, kind in OBJECTIVES.items():
        better = "; larger is better" if kind.maximize else ""
        lines.append(f"| `{name}` | {kind.unit} | {kind.how} | {kind.description}{better} |")
    return "\n".join(lines)


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
        VALUE.check(f"--reference-point for {name}", value)


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
        if not equals or math.isnan(value):
            raise ConfigError(f"--max needs NAME=VALUE with a number above 0, e.g. params_share=0.6, got '{word}'.")
        if name not in OBJECTIVES:
            raise ConfigError(unknown("name after --max", name, OBJECTIVES))
        VALUE.check(f"--max {name}", value)
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
