"""What a study holds -> trials, proposals, settings and facts, checked. Needs no model.

Raises ValueError, or what Optuna raises, for what makes no sense; `database.explained` makes one line of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import optuna
from optuna.trial import FrozenTrial
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from llmbo.config.objectives import feasible, measured_limits, parse_limits
from llmbo.errors import ConfigError, first_fault
from llmbo.report.origin import DataPart, ElsewherePart, ModelPart
from llmbo.report.schema import ImportancePart, ItemScores, Recipe, Refitted
from llmbo.types import Measurement, Proposal, Source, Trial, TrialState

ROUND = "round:"
HELDOUT, ELSEWHERE = "heldout", "elsewhere:"
_ROUND_DIGITS = 5
LONGEST = 100_000  # characters of a text; an advisor's reasons have some thousand
T = TypeVar("T")
Values = dict[str, FiniteFloat]
Windows = dict[str, list[FiniteFloat]]
Predicted = Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)]


def _sensible(limits: list[str]) -> list[str]:
    try:
        parse_limits(limits)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return limits


class _Record(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, str_max_length=LONGEST)


class _Settings(_Record):
    """What is read of a run's settings without making a `RunConfig` of them: its plug-ins may be gone."""

    objectives: list[str]
    reference_point: list[FiniteFloat] | None
    maximum: Annotated[list[str], AfterValidator(_sensible)]


class _Report(_Record):
    status: str
    settings: dict[str, Any]
    seconds: Values
    peak_memory_bytes: int


class _Refitted(Refitted):
    """`digest`: of the windows of another text. `windows`: by the name of a field, what its values are means of."""

    digest: str
    windows: dict[str, Windows] = Field(default_factory=dict)


class _Heldout(_Record):
    values: Values
    windows: Windows = {}


class _Elsewhere(ElsewherePart):
    dense: Values


class _Facts(_Record):
    dtype: str
    device: str
    model: ModelPart
    data: DataPart
    dense: Values
    importance: list[ImportancePart]
    items: str | None = None
    versions: dict[str, str] = {}
    free: dict[str, Any] = {}
    dense_heldout: Values | None = None
    elsewhere: _Elsewhere | None = None
    budget: int = 0
    profiles: dict[str, Any] | None = None
    run: _Report | None = None


class _Proposal(_Record):
    x: list[int]
    origin: str
    why: str = ""
    source: str | None = None
    recipe: Recipe = {}
    predicted: Predicted | None = None
    pending: list[int] = []

    def made(self) -> Proposal:
        source = Source.restored(self.source, self.origin)
        return Proposal(tuple(self.x), self.origin, self.why, source, self.recipe, _pair(self.predicted))


class _Attributes(_Record):
    """Of a trial. `place`: among the stored proposals; older versions kept none, there it is the trial's number."""

    origin: str
    round: int
    place: int | None = None
    why: str = ""
    source: str | None = None
    recipe: Recipe = {}
    predicted: Predicted | None = None
    values: Values = {}
    windows: Windows = {}
    failure: str | None = None


_SETTINGS, _FACTS, _ATTRIBUTES = TypeAdapter(_Settings), TypeAdapter(_Facts), TypeAdapter(_Attributes)
_PROPOSALS, _HELDOUT, _EARLIER = TypeAdapter(list[_Proposal]), TypeAdapter(_Heldout), TypeAdapter(dict[int, Values])
# What the finished front is judged by beside held-out windows: each fills the report's field of this name.
JUDGEMENTS: dict[str, TypeAdapter[Any]] = {
    "items": TypeAdapter(dict[str, ItemScores]),
    "samples": TypeAdapter(dict[str, str]),
    "refitted": TypeAdapter(_Refitted),
}


def check_settings(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Refuse settings and facts that this version cannot read."""
    _fits(_SETTINGS, settings, "settings")
    _fits(_FACTS, facts, "facts")


def round_key(number: int, token: int | None) -> str:
    """Name of a round's attribute: with its writer's token, so that a former owner's late write overwrites nothing."""
    return f"{ROUND}{number:0{_ROUND_DIGITS}d}" + ("" if token is None else f"@{token:08d}")


def rounds_of(attributes: Mapping[str, Any], max_levels: Sequence[int] = ()) -> list[list[Proposal]]:
    """The proposals of every round; where two owners wrote one, the later owner's count.

    Args:
        max_levels: Of the space; empty where that is not known.
    """
    latest = {key[: len(ROUND) + _ROUND_DIGITS]: key for key in sorted(attributes) if key.startswith(ROUND)}
    rounds = [[item.made() for item in _fits(_PROPOSALS, attributes[key], key)] for key in latest.values()]
    for x in (proposal.x for proposals in rounds for proposal in proposals if max_levels):
        if len(x) != len(max_levels) or not all(0 <= level <= most for level, most in zip(x, max_levels, strict=True)):
            raise ValueError("what was proposed is no candidate of this run")
    return rounds


def digest_elsewhere(facts: Mapping[str, Any]) -> str:
    """Of the windows of another text that a run was judged on; empty if there were none."""
    digest: str = (facts.get("elsewhere") or {}).get("digest", "")
    return digest


def heldout_kind(digest: str = "") -> str:
    """Kind of the judgements that are held-out measurements: on the run's own text, or on windows of another with this digest."""
    return f"{ELSEWHERE}{digest}" if digest else HELDOUT


def heldout_of(attributes: Mapping[str, Any], digest: str = "") -> dict[int | None, Measurement]:
    """Held-out measurements by trial number, and the dense model's (None). Earlier versions kept all in one attribute, without windows.

    Args:
        digest: Of windows of another text; empty for the run's own.
    """
    kind = heldout_kind(digest)
    earlier = _fits(_EARLIER, attributes.get(kind, {}), kind, strict=False)
    found: dict[int | None, Measurement] = {number: Measurement(values) for number, values in earlier.items()}
    for number, key in _judged(attributes, kind):
        kept = _fits(_HELDOUT, attributes[key], key)
        found[number] = Measurement(kept.values, kept.windows)
    return found


def judgement_key(kind: str, number: int | None) -> str:
    """Name of the attribute that holds a judgement of a trial, or of the dense model."""
    return f"{kind}:{'dense' if number is None else number}"


def judgements_of(attributes: Mapping[str, Any], kind: str) -> dict[int | None, dict[str, Any]]:
    """What is stored of a row of `JUDGEMENTS`, by trial number; None stands for the dense model."""
    found: dict[int | None, dict[str, Any]] = {}
    for number, key in _judged(attributes, kind):
        _fits(JUDGEMENTS[kind], attributes[key], key)
        found[number] = attributes[key]
    return found


def _judged(attributes: Mapping[str, Any], kind: str) -> Iterator[tuple[int | None, str]]:
    """Trials that have such an attribute, and its name."""
    for key in (key for key in attributes if key.startswith(f"{kind}:")):
        number = key.removeprefix(f"{kind}:")
        yield None if number == "dense" else int(number), key


def frozen_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Optuna's trials by place. A place belongs to the first trial made for it, should a former owner have made another."""
    places: dict[int, FrozenTrial] = {}
    for trial in study.get_trials(deepcopy=False):
        places.setdefault(trial.user_attrs.get("place", trial.number), trial)
    if sorted(places) != list(range(len(places))):
        raise ValueError(f"of {len(places)} trials, some have no place")
    return [places[place] for place in range(len(places))]


def trial_of(frozen: FrozenTrial, number: int, x: tuple[int, ...], settings: Mapping[str, Any]) -> Trial:
    kept = _fits(_ATTRIBUTES, frozen.user_attrs, f"trial {number}")
    values = dict(kept.values)
    seconds = values.pop("seconds", None)
    state = {"COMPLETE": TrialState.COMPLETE, "FAIL": TrialState.FAILED}.get(frozen.state.name, TrialState.RUNNING)
    expected = settings.get("objectives", ()) if state is TrialState.COMPLETE else ()
    if missing := [name for name in expected if name not in values]:
        raise ValueError(f"trial {number} has no {missing[0]}")
    if frozen.state.is_finished() and seconds is None:
        raise ValueError(f"trial {number} has no seconds")
    return Trial(
        number=number,
        round=kept.round,
        x=x,
        origin=kept.origin,
        state=state,
        seconds=seconds,
        values=values,
        failure=kept.failure,
        feasible=state is not TrialState.COMPLETE or feasible(values, _limits(settings)),
        why=kept.why,
        source=Source.restored(kept.source, kept.origin),
        recipe=kept.recipe,
        windows=kept.windows,
        predicted=_pair(kept.predicted),
    )


def _pair(predicted: list[float] | None) -> tuple[float, float] | None:
    return (predicted[0], predicted[1]) if predicted else None


def _limits(settings: Mapping[str, Any]) -> dict[str, float]:
    """On what is measured; every candidate keeps the others."""
    return measured_limits(parse_limits(settings.get("maximum", ())))


def _fits(schema: TypeAdapter[T], value: object, place: str, strict: bool | None = None) -> T:
    try:
        return schema.validate_python(value, strict=strict)
    except ValidationError as error:
        raise ValueError(f"{place}, {first_fault(error)}") from None
