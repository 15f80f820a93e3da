"""Reply text -> grid points, directions and decisions. Pure: whatever cannot be used becomes a `Rejection` with its reason."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from llmbo.advisor.formula import FormulaError, block_features, evaluated, standardized
from llmbo.advisor.recipes import asked_profile, asked_recipe, member
from llmbo.advisor.replies import (
    MAX_TEXT,
    DecisionPart,
    DirectionPart,
    EditPart,
    FormulaPart,
    Illegal,
    ProposalPart,
    RecipePart,
    formats,
    one_line,
    validated,
)
from llmbo.advisor.roles import Answer, Candidate, Decision, Question, Rejection
from llmbo.errors import LlmboError
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.recipe import AllocationRecipe
from llmbo.types import Direction

MAX_REPLY = 64_000  # characters; far more than any useful reply
MAX_REASON = 300  # likewise, of a refusal that quotes a formula
SAME_DIRECTION = 0.999  # cosine


def parse_reply(text: str, question: Question) -> Answer:
    """What a model's text comes to. Tolerates a code fence or prose around the JSON object, nothing inside it."""
    try:
        reply = extract_object(text[:MAX_REPLY], *formats(question.hook, question.priced))
    except Illegal as error:
        return Answer(rejections=(Rejection(text[:MAX_TEXT], str(error), "unparsable"),))
    return judge(reply, question)


def judge(reply: Mapping[str, Any], question: Question) -> Answer:
    """Validate a reply in the documented format item by item; one bad item does not spoil the others."""
    parts = formats(question.hook, question.priced)
    builder = _AnswerBuilder(question)
    for key, part in parts.items():
        items = reply.get(key, [] if parts.keys() & reply.keys() else None)
        if not isinstance(items, list):
            builder.rejections.append(Rejection(_shown(reply), f"'{key}' must be a list", "unparsable"))
            continue
        for item in items[: question.max_items]:
            try:
                _RESOLVERS[part](builder, validated(part, item))
            except Illegal as error:
                builder.rejections.append(Rejection(_shown(item), str(error), error.kind))
    return builder.answer()


def extract_object(text: str, *keys: str) -> dict[str, Any]:
    """The first JSON object in `text` that has one of `keys`.

    Raises:
        Illegal: There is none.
    """
    decoder = json.JSONDecoder(parse_constant=_no_constant)
    position, candidates = text.find("{"), 0
    while position >= 0 and candidates < 100:  # a bound on text made of braces
        candidates += 1
        try:
            found, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position = text.find("{", position + 1)
            continue
        if any(key in found for key in keys):
            return found
        position = text.find("{", end)
    if _open(text):
        raise Illegal("the reply ends before its JSON object does: be shorter")
    named = " or ".join(f"'{key}'" for key in keys)
    raise Illegal(f"no JSON object with the key {named} found in the reply")


def ends_early(text: str, key: str) -> bool:
    """Whether a reply breaks off within the object that it should be."""
    try:
        extract_object(text, key)
    except Illegal:
        return _open(text)
    return False


def _open(text: str) -> bool:
    return text.count("{") > text.count("}")


def rescaled(family: ThresholdFamily, offset: Tensor, target: float) -> tuple[int, ...]:
    """The family at the size where adding `offset` (`d` levels) gives a share nearest `target`."""
    return all_rescaled(family, offset[None], [target])[0]


def all_rescaled(family: ThresholdFamily, offsets: Tensor, targets: Sequence[float]) -> list[tuple[int, ...]]:
    """As `rescaled`, `n x d` offsets at once."""
    points = (family.path + offsets[:, None]).round().clamp(family.space.bounds[0], family.space.bounds[1])
    wanted = torch.tensor(targets, dtype=torch.float64)[:, None]
    best = (family.space.share(points) - wanted).abs().argmin(-1)
    return [tuple(x) for x in points[torch.arange(len(points)), best].int().tolist()]


def layer_numbers(edit: EditPart, num_layers: int) -> list[int]:
    """Layers that an edit names.

    Raises:
        Illegal: One of them does not exist.
    """
    numbers: list[int] = []
    for entry in edit.layers:
        first, last = (entry, entry) if isinstance(entry, int) else (int(end) for end in entry.split("-"))
        if first > last:
            raise Illegal(f"layers '{entry}' run backwards")
        numbers += range(first, min(last, first + num_layers) + 1)
    for number in numbers:
        if not 0 <= number < num_layers:
            raise Illegal(f"layer {number} does not exist (the model has layers 0-{num_layers - 1})")
    return numbers


@dataclass
class _AnswerBuilder:
    """Resolves the items of one reply, and collects what becomes of them."""

    question: Question
    candidates: list[Candidate] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)

    @property
    def family(self) -> ThresholdFamily:
        return self.question.context.setting.family

    def answer(self) -> Answer:
        return Answer(
            tuple(self.candidates[: self.question.max_candidates]),
            tuple(self.directions[: self.question.count]),
            tuple(self.decisions),
            tuple(self.rejections),
        )

    def proposal(self, part: ProposalPart) -> None:
        base = torch.tensor(self._base(part.base), dtype=torch.float64)
        x = _edited(base, part.edits, self.family.space.bounds[1])
        x = x.clamp(self.family.space.bounds[0], self.family.space.bounds[1])
        offset = x - self.family.profile(self.family.space.share(base[None]))[0]
        sizes = (
            [part.target_share, *part.also_at] if part.target_share is not None or not part.also_at else part.also_at
        )
        for share in sizes:
            try:
                point = tuple(x.int().tolist()) if share is None else rescaled(self.family, offset, self._size(share))
                self._add(point, part.why)
            except Illegal as error:
                self.rejections.append(Rejection(_shown(part.model_dump(exclude_none=True)), str(error), error.kind))

    def direction(self, part: DirectionPart) -> None:
        space = self.family.space
        if any(edit.neurons_keep is not None or edit.kv_keep is not None for edit in part.edits):
            raise Illegal("a direction is made of deltas: use neurons_delta and kv_delta, not keep")
        levels = _edited(torch.zeros(space.d, dtype=torch.float64), part.edits, space.bounds[1])
        if not levels.any():
            raise Illegal("the direction changes nothing")
        for other in self.directions:
            if (
                other.levels
                and float(torch.cosine_similarity(levels, torch.tensor(other.levels), dim=0)) > SAME_DIRECTION
            ):
                raise Illegal(f"the same direction as '{other.name}'", "duplicate")
        name = part.name or f"direction {len(self.directions) + 1}"
        at = tuple(map(self._size, part.at))
        self.directions.append(Direction(name, tuple(levels.tolist()), part.why, at=at))

    def recipe(self, part: RecipePart) -> None:
        try:
            profile = asked_profile(part, self.family.space.num_layers)
        except LlmboError as error:
            raise Illegal(str(error)) from None
        vectors = {"profile": standardized(profile)}
        if part.formula is not None:
            vectors[part.formula] = vector = self._vector(part.formula)
            profile = profile + part.coefficient * vector
        recipe, whys = asked_recipe(self.family, part, profile), part.why or part.formula or ""
        for share in part.at[: self.question.shares]:
            try:
                self._add(member(self.family, recipe, self._size(share)), whys, recipe.to_dict())
            except Illegal as error:
                shown = part.model_dump(exclude_none=True, exclude_defaults=True)
                self.rejections.append(Rejection(_shown(shown), str(error), error.kind))
        for name, along in vectors.items():
            if along is not None and not self._known(along):
                own = f"{name} {self.question.round}.{len(self.directions) + 1}" if name == "profile" else name
                self.directions.append(Direction(own, why=part.why, profile=tuple(along.tolist())))

    def formula(self, part: FormulaPart) -> None:
        vector = self._vector(part.formula)
        if other := self._known(vector):
            raise Illegal(f"the same direction as '{other}'", "duplicate")
        at = tuple(map(self._size, part.at))
        self.directions.append(Direction(part.name or part.formula, (), part.why, tuple(vector.tolist()), at))

    def _vector(self, formula: str) -> Tensor:
        try:
            return evaluated(formula, block_features(self.family))
        except FormulaError as error:
            raise Illegal(one_line(str(error), MAX_REASON)) from None

    def _known(self, vector: Tensor) -> str:
        """Name of a direction of this reply that goes the same way or back; empty if none does."""
        profiles = {d.name: torch.tensor(d.profile, dtype=torch.float64) for d in self.directions if d.profile}
        same = (
            n for n, p in profiles.items() if abs(float(torch.cosine_similarity(vector, p, dim=0))) > SAME_DIRECTION
        )
        return next(same, "")

    def decision(self, part: DecisionPart) -> None:
        count = len(self.question.candidates)
        if not 0 <= part.id < count:
            raise Illegal(f"candidate {part.id} does not exist (there are 0-{count - 1})")
        if any(decision.index == part.id for decision in self.decisions):
            raise Illegal(f"candidate {part.id} was decided before", "duplicate")
        self.decisions.append(Decision(part.id, part.keep, part.confidence, part.why))

    def _base(self, base: int | str) -> tuple[int, ...]:
        if isinstance(base, str):
            return self.family.at(1.0 if base == "dense" else float(base.partition(":")[2]))
        trials = self.question.context.trials
        if not 0 <= base < len(trials):
            raise Illegal(f"trial {base} does not exist (there are {len(trials)})")
        return trials[base].x

    def _size(self, share: float) -> float:
        if share < self.family.space.min_share:
            raise Illegal(f"share {share:g} is below the smallest allowed, {self.family.space.min_share:g}")
        return share

    def _add(self, x: tuple[int, ...], why: str, recipe: Mapping[str, Any] = {}) -> None:
        space = self.family.space
        point = torch.tensor([x], dtype=torch.float64)
        if not bool(space.legal(point)[0]):
            raise Illegal(space.what_forbids(x))
        taken = {trial.x: f"trial {trial.number}" for trial in self.question.context.trials}
        taken |= {candidate.x: "another proposal" for candidate in self.candidates} | {
            space.max_levels: "the dense model"
        }
        if x in taken:
            raise Illegal(f"the same as {taken[x]}", "duplicate")
        self.candidates.append(Candidate(x, why, recipe))


_RESOLVERS: dict[type, Callable[[_AnswerBuilder, Any], None]] = {
    ProposalPart: _AnswerBuilder.proposal,
    RecipePart: _AnswerBuilder.recipe,
    DirectionPart: _AnswerBuilder.direction,
    FormulaPart: _AnswerBuilder.formula,
    DecisionPart: _AnswerBuilder.decision,
}


def checked(answer: Answer, question: Question) -> Answer:
    """An answer that did not come from `judge`.

    Raises:
        ValueError, TypeError, ConfigError: It holds what cannot be evaluated or stored.
    """
    space = question.context.setting.space
    written = json.dumps(answer.to_dict(), allow_nan=False)  # as it will be stored
    answer = TypeAdapter(Answer).validate_json(written, strict=True)
    for candidate in answer.candidates:
        if len(candidate.x) != space.d:
            raise ValueError(f"a candidate needs {space.d} whole levels, got {candidate.x}")
        if not space.legal(torch.tensor([candidate.x], dtype=torch.float64)).all():
            raise ValueError(f"a candidate is outside the space: {candidate.x}")
        AllocationRecipe.of(candidate.recipe).bonus(space.num_layers)
    for direction in answer.directions:
        changes = direction.profile if question.priced and not direction.levels else direction.levels
        if len(changes) != space.d or not any(changes):
            raise ValueError(f"a direction needs {space.d} levels, not all of them 0, got {changes}")
    if any(not 0 <= decision.index < len(question.candidates) for decision in answer.decisions):
        raise ValueError(f"a decision is about none of the {len(question.candidates)} candidates")
    return answer


def merged(first: Answer, second: Answer) -> Answer:
    """A repaired reply added to what was good before."""
    known = {candidate.x for candidate in first.candidates}
    decided = {decision.index for decision in first.decisions}
    return replace(
        first,
        candidates=first.candidates + tuple(c for c in second.candidates if c.x not in known),
        directions=first.directions + tuple(d for d in second.directions if d not in first.directions),
        decisions=first.decisions + tuple(d for d in second.decisions if d.index not in decided),
        rejections=first.rejections + second.rejections,
    )


def _edited(base: Tensor, edits: list[EditPart], highest: Tensor) -> Tensor:
    """`base` (`d` levels) after all edits. Deltas may lead out of bounds, a level that does not exist is refused."""
    x, num_layers = base.clone(), len(base) // 2
    for edit in edits:
        numbers = torch.tensor(layer_numbers(edit, num_layers))
        for name, rows in (("kv", numbers), ("neurons", numbers + num_layers)):
            keep, delta = getattr(edit, f"{name}_keep"), getattr(edit, f"{name}_delta")
            if keep is not None and keep > highest[rows[0]]:
                raise Illegal(f"{name}_keep {keep} does not exist (levels are 0-{int(highest[rows[0]])})")
            if keep is not None:
                x[rows] = float(keep)
            if delta is not None:
                x[rows] += delta
    return x


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _shown(item: object) -> str:
    return json.dumps(item, default=str)[:MAX_TEXT]


def rejection_lines(rejections: tuple[Rejection, ...], limit: int = 8) -> Iterator[str]:
    """One line per reason, for a prompt."""
    for rejection in rejections[:limit]:
        yield f"{rejection.text} -> {rejection.reason}"
