"""The recipe behind an allocation: named numbers that say what every step up is worth, for a model of any size.

Every block climbs its grid levels one by one, and each step has a price: what it would cost to take it back, in nats of KL per
parameter. Two estimates of it are at hand (`llmbo.problem.family`), and neither knows what else is pruned. A recipe mixes them and puts
numbers of its own on top, all in logarithms, since errors of prices are factors:

    log price = m + e (f log F + (1 - f) log S - m) + t (l / top - 1/2)
                + a + b u + c (u^2 - 1/3) + first 2^-i + last 2^-(L - 1 - i) + w log R + p

    F, S   prices by Fisher scores and by the sensitivity of whole blocks, each divided by its geometric mean over all steps
    i, u   the layer, of L, and its depth 2 i / (L - 1) - 1        l   the level that the step leads to, of `top`
    m      mean of f log F + (1 - f) log S over the steps of the block's kind
    R      how much dearer the block was found at pruned members (`llmbo.problem.expansion`), interpolated in the share
    p      the block's own bonus: `profile`, which alone is bound to one number of layers

Prices never rise within a block. After that, blocks exchange a level where this was best at pruned members, as far as `width_exchanges`
says (`llmbo.problem.expansion.best_exchanges`); this, too, is interpolated in the share. Numbers that end in `_by_size` are taken times
log2(1 / share) - 1/2 and added to those that they are named after: they count for nothing at a share of 0.71.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from llmbo.errors import ConfigError, first_line, unknown
from pruning.block import BLOCK_KINDS

LARGEST_BONUS = 2.0  # of a log price; numbers at both ends of their bounds make no block dearer by more


def _number(default: float, low: float, high: float, words: str) -> Any:
    return dataclasses.field(default=default, metadata={"low": low, "high": high, "words": words})


@dataclass(frozen=True)
class AllocationRecipe:
    """What is put into the formula above. The values here are the dense model's prices as they are: `DENSE_PRICES`.

    Args:
        profile: A bonus for every block, attention first; empty for none. In writing, `{"attention": [...], "mlp": [...]}`.

    Raises:
        ConfigError: A number lies outside its bounds, or is none.
    """

    fisher_weight: float = _number(0.5, 0.0, 1.0, "f: more of Fisher scores, less of the sensitivity of whole blocks")
    fisher_weight_by_size: float = _number(0.0, -0.5, 0.5, "more of it for small models")
    attention: float = _number(0.0, -1.0, 1.0, "a: attention dearer, MLPs cheaper")
    attention_by_size: float = _number(0.0, -1.0, 1.0, "more of it for small models")
    attention_exponent: float = _number(1.0, 0.5, 1.5, "e: attention's prices farther apart")
    attention_level_tilt: float = _number(0.0, -1.0, 1.0, "t: attention's last groups dearer than its first")
    attention_slope: float = _number(0.0, -1.0, 1.0, "b: attention of late layers dearer")
    attention_slope_by_size: float = _number(0.0, -1.0, 1.0, "more of it for small models")
    attention_curve: float = _number(0.0, -1.0, 1.0, "c: attention at both ends dearer than in the middle")
    attention_first: float = _number(0.0, -1.5, 1.5, "attention of the first layers dearer")
    mlp_exponent: float = _number(1.0, 0.5, 1.5, "e: MLPs' prices farther apart")
    mlp_level_tilt: float = _number(0.0, -1.0, 1.0, "t: an MLP's last neurons dearer than its first")
    mlp_level_tilt_by_size: float = _number(0.0, -1.0, 1.0, "more of it for small models")
    mlp_slope: float = _number(0.0, -1.0, 1.0, "b: MLPs of late layers dearer")
    mlp_slope_by_size: float = _number(0.0, -1.0, 1.0, "more of it for small models")
    mlp_curve: float = _number(0.0, -1.0, 1.0, "c: MLPs at both ends dearer than in the middle")
    mlp_first: float = _number(0.0, -1.5, 1.5, "MLPs of the first layers dearer")
    mlp_last: float = _number(0.0, -1.5, 1.5, "MLPs of the last layers dearer")
    pruned_members: float = _number(0.0, 0.0, 1.0, "w: more of what was measured at pruned members")
    width_exchanges: float = _number(1.0, 0.0, 1.0, "more of the width exchanges that were best at pruned members")
    profile: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name, bound in BOUNDS.items():
            _check(name, getattr(self, name), *bound)
        for value in self.profile:
            _check("profile", value, -LARGEST_BONUS, LARGEST_BONUS)

    @classmethod
    def of(cls, numbers: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; what is not named stays at the dense model's prices.

        Raises:
            ConfigError: A name is unknown, the profile's halves are no lists of one length, or as the class says.
        """
        for name in numbers:
            if name not in (*BOUNDS, "profile"):
                raise ConfigError(unknown("number of a recipe", name, [*BOUNDS, "profile"]))
        return cls(**{**numbers, "profile": _profile(numbers.get("profile") or {})})

    @classmethod
    def clamped(cls, theta: Tensor, profile: Tensor | None = None) -> Self:
        """From `len(BOUNDS)` numbers in their order and `d` bonuses, with what lies outside of its bounds at them."""
        low, high = bounds()
        own = () if profile is None or not profile.any() else profile.clamp(-LARGEST_BONUS, LARGEST_BONUS).tolist()
        numbers = dict(zip(BOUNDS, theta.double().maximum(low).minimum(high).tolist(), strict=True))
        return cls(**numbers, profile=tuple(own))

    @property
    def bare(self) -> Self:
        """The same without what is measured at pruned members."""
        return replace(self, pruned_members=0.0, width_exchanges=0.0)

    @property
    def theta(self) -> Tensor:
        """All numbers in their order, float64; the profile is none of them."""
        return torch.tensor([getattr(self, name) for name in BOUNDS], dtype=torch.float64)

    def bonus(self, num_layers: int) -> Tensor:
        """The profile for a model of so many layers, `d` float64; zeros without one.

        Raises:
            ConfigError: It is for another number of layers.
        """
        if self.profile and len(self.profile) != 2 * num_layers:
            raise ConfigError(
                f"The recipe's profile has {len(self.profile) // 2} numbers for each kind, the model has {num_layers} layers: "
                "give one for every layer."
            )
        return torch.tensor(self.profile or [0.0] * (2 * num_layers), dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Numbers by name, and the profile if there is one."""
        numbers: dict[str, Any] = {name: getattr(self, name) for name in BOUNDS}
        L = len(self.profile) // 2
        halves = dict(zip(BLOCK_KINDS, (list(self.profile[:L]), list(self.profile[L:])), strict=True))
        return numbers | ({"profile": halves} if L else {})


def _check(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        shown = repr(value)
        raise ConfigError(
            f"The recipe's {name} must lie between {low:g} and {high:g}, got {shown if len(shown) < 40 else shown[:37] + '...'}."
        )


def _profile(halves: Any) -> tuple[float, ...]:
    """Attention's bonuses and the MLPs'; a kind that is not named has none."""
    if not isinstance(halves, Mapping) or any(kind not in BLOCK_KINDS for kind in halves):
        raise ConfigError('The recipe\'s profile must be like {"attention": [0.1, ...], "mlp": [0.2, ...]}.')
    lengths = {len(half) if isinstance(half, list | tuple) else -1 for half in halves.values()}
    if len(lengths) > 1 or -1 in lengths:
        raise ConfigError("The recipe's profile must be lists of as many numbers as there are layers.")
    nothing = [0.0] * next(iter(lengths), 0)
    return tuple(value for kind in BLOCK_KINDS for value in halves.get(kind, nothing))


_NUMBERS = [item for item in fields(AllocationRecipe) if item.metadata]
BOUNDS: Mapping[str, tuple[float, float]] = {
    item.name: (item.metadata["low"], item.metadata["high"]) for item in _NUMBERS
}
WORDS: Mapping[str, str] = {item.name: item.metadata["words"] for item in _NUMBERS}
DENSE_PRICES = AllocationRecipe()
DEFAULT_RECIPE = AllocationRecipe(  # tuned on SmolLM2 with two texts at once, see docs/explanation.md
    fisher_weight=0.37,
    fisher_weight_by_size=0.12,
    attention=-0.05,
    attention_by_size=0.43,
    attention_exponent=1.02,
    attention_level_tilt=0.02,
    attention_slope=0.03,
    attention_slope_by_size=0.07,
    attention_curve=0.24,
    attention_first=0.76,
    mlp_exponent=1.08,
    mlp_level_tilt=-0.34,
    mlp_level_tilt_by_size=-0.47,
    mlp_slope=0.27,
    mlp_slope_by_size=-0.4,
    mlp_curve=0.08,
    mlp_first=0.67,
    mlp_last=-0.18,
)
RECIPES: Mapping[str, AllocationRecipe] = {"default": DEFAULT_RECIPE, "dense-prices": DENSE_PRICES}


def recipe_of(word: str) -> AllocationRecipe:
    """What `--recipe` names: one of `RECIPES`, or a JSON file of numbers by name.

    Raises:
        ConfigError: It is neither, or as `AllocationRecipe`.
    """
    if word in RECIPES:
        return RECIPES[word]
    path = Path(word)
    if not path.is_file():
        raise ConfigError(
            f"--recipe must be {', '.join(RECIPES)} or a JSON file of numbers by name, got '{word}', which is no file."
        )
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--recipe {word} cannot be read as JSON ({first_line(error)}): expected numbers by name."
        ) from error
    if not isinstance(numbers, dict):
        raise ConfigError(
            f'--recipe {word} must hold numbers by name, like {{"mlp_slope": 0.3}}, got {type(numbers).__name__}.'
        )
    return AllocationRecipe.of(numbers)


def bounds() -> tuple[Tensor, Tensor]:
    """Lowest and highest values of all numbers, in their order."""
    low, high = zip(*BOUNDS.values(), strict=True)
    return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
