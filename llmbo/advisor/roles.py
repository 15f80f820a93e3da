"""What is asked of an advisor and what comes back: the records that pass between the parts of this package."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, Self

from llmbo.advisor.context import Context
from llmbo.advisor.replies import MAX_SHARES, RejectionKind
from llmbo.types import Direction


@dataclass(frozen=True)
class Question:
    """One request for advice.

    Args:
        round: The round that the advice is for.
        count: Proposals or directions wanted; for the filter, candidates it may drop.
        candidates: What the filter reviews; a decision names one by its position.
        seed: Of everything random in the answer.
    """

    hook: str
    context: Context
    round: int
    count: int
    seed: int
    candidates: tuple[tuple[int, ...], ...] = ()

    @property
    def max_items(self) -> int:
        return len(self.candidates) if self.hook == "filter" else self.count

    @property
    def priced(self) -> bool:
        """Whether the answer may speak in recipes."""
        return self.context.setting.family.prices is not None

    @property
    def shares(self) -> int:
        """At how many shares a recipe is tried: each is a trial of a first design, and one row of a pool later."""
        return MAX_SHARES if self.hook == "propose" else 1

    @property
    def max_candidates(self) -> int:
        return self.count * (self.shares if self.priced else 1)


@dataclass(frozen=True)
class Candidate:
    """`recipe`: as `Proposal` has it."""

    x: tuple[int, ...]
    why: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Decision:
    """`index` is the candidate's position in the question."""

    index: int
    keep: bool
    confidence: float
    why: str = ""


@dataclass(frozen=True)
class Rejection:
    """A refusal is data: it is stored, reported, and told to the advisor."""

    text: str
    reason: str
    kind: RejectionKind


@dataclass(frozen=True)
class Answer:
    """What became of a reply. `stopped` says why there is none, when there is none."""

    candidates: tuple[Candidate, ...] = ()
    directions: tuple[Direction, ...] = ()
    decisions: tuple[Decision, ...] = ()
    rejections: tuple[Rejection, ...] = ()
    stopped: str | None = None

    def __bool__(self) -> bool:
        return bool(self.candidates or self.directions or self.decisions)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Inverse of `to_dict`, also after a round trip through JSON."""
        return cls(
            tuple(Candidate(tuple(item["x"]), item["why"], item.get("recipe", {})) for item in data["candidates"]),
            tuple(
                Direction(item["name"], why=item.get("why", ""), **_numbers(item, "levels", "profile", "at"))
                for item in data["directions"]
            ),
            tuple(Decision(**item) for item in data["decisions"]),
            tuple(Rejection(**item) for item in data["rejections"]),
            data["stopped"],
        )


def _numbers(item: Mapping[str, Any], *keys: str) -> dict[str, tuple[float, ...]]:
    return {key: tuple(item.get(key, ())) for key in keys}


@dataclass(frozen=True)
class Exchange:
    """One prompt and what came of it. Holds no secret.

    Args:
        reply: The model's text, or None when there was none.
        error: Why there was none, or why the reply counts as cut or refused.
        mode: How the server was asked for JSON.
        attempts: Requests made, retries and fallbacks included.
        cost: In dollars; None if the price is not known.
        digest: Of the prompt as it was sent (`render.Prompt`); empty without a prompt, and in older recordings.
    """

    system: str = ""
    user: str = ""
    reply: str | None = None
    error: str | None = None
    model: str = ""
    mode: str = ""
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0
    seconds: float = 0.0
    digest: str = ""


class Transcript(Protocol):
    """Keeps the exchanges of one consultation; what it already holds is never asked for again."""

    def recorded(self) -> Sequence[Exchange]: ...

    def record(self, exchange: Exchange) -> Exchange:
        """The exchange as it is kept: censored. Use this one."""
        ...


class Advisor(Protocol):
    """Answers questions. Third parties' advisors do too: entry-point group `llmbo.advisors`, see docs/advisor.md."""

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        """Advice for one hook of one round. Never raises for what a model or server does wrong."""
        ...
