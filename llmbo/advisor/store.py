"""Keeps every exchange and answer before it is used, so that nothing is asked twice and a resumed run gets the same advice.

The truth lies beside the trials, in the run's database; `advisor.jsonl` in the run folder is a copy for people and for
`--advisor replay:FILE`, one line per consultation.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

from pydantic import TypeAdapter, ValidationError

from llmbo.advisor.censor import Censor, environment_key
from llmbo.advisor.roles import Answer, Candidate, Exchange
from llmbo.errors import ConfigError, DamagedError, first_fault, first_line
from llmbo.files import replace_file

FILE = "advisor.jsonl"
FOLLOWED = "followed"  # note: candidates that a direction led to
MAX_REASON = 300  # characters of why there was no reply


class Notes(Protocol):
    """Where consultations are stored: key -> JSON value, written in one transaction each."""

    def notes(self) -> dict[str, Any]: ...

    def set_note(self, key: str, value: Any) -> None: ...


@dataclass
class MemoryNotes:
    """Notes that die with the process."""

    values: dict[str, Any] = field(default_factory=dict)

    def notes(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.values))

    def set_note(self, key: str, value: Any) -> None:
        self.values[key] = value


@dataclass
class Consultation:
    """What was asked for one hook of one round, and what came of it; `answer` is None while it goes on."""

    round: int
    hook: str
    exchanges: list[Exchange] = field(default_factory=list)
    answer: Answer | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.round:05d}:{self.hook}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "round": self.round,
            "hook": self.hook,
            "exchanges": [asdict(exchange) for exchange in self.exchanges],
            "answer": None if self.answer is None else self.answer.to_dict(),
            "extra": self.extra,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises:
            ValidationError: It is none.
        """
        return TypeAdapter(cls).validate_python(data)


class AdviceStore:
    """All consultations of a run. Whatever an advisor says comes out of here censored, and is used as it comes out.

    Args:
        file: Where the copy for people goes, or None.
    """

    def __init__(self, notes: Notes, file: Path | None = None) -> None:
        self._notes = notes
        self._file = file
        self._censor = Censor(environment_key())
        self._consultations: dict[str, Consultation] = {}
        for key, value in sorted(notes.notes().items()):
            if ":" in key:
                try:
                    self._consultations[key] = self._censored(value)
                except ValidationError as error:
                    raise DamagedError(
                        f"The stored advice '{key}' is damaged ({first_fault(error)}): restore the run's database from a copy, "
                        "or start over with --fresh."
                    ) from None
        self._failed: list[Exchange] = []
        if self._consultations:
            self._copy()

    def all(self) -> list[Consultation]:
        """In the order of rounds."""
        return [self._consultations[key] for key in sorted(self._consultations)]

    def of(self, round: int, hook: str) -> Consultation | None:
        return self._consultations.get(f"{round:05d}:{hook}")

    def open(self, round: int, hook: str) -> "OpenConsultation":
        """The consultation of this hook and round, gone on with if it was broken off."""
        return OpenConsultation(self, self.of(round, hook) or Consultation(round, hook))

    def exchanges(self) -> Sequence[Exchange]:
        """Implements `client.Spending`."""
        return [exchange for consultation in self.all() for exchange in consultation.exchanges]

    def failed(self) -> Sequence[Exchange]:
        return list(self._failed)

    def keep(self, consultation: Consultation) -> Consultation:
        """Store the consultation as it is now, and give what was stored."""
        kept = self._censored(consultation.to_dict())
        asked = self._consultations.get(kept.key, Consultation(kept.round, kept.hook)).exchanges
        self._failed += [exchange for exchange in kept.exchanges[len(asked) :] if exchange.error is not None]
        self._consultations[kept.key] = kept
        self._notes.set_note(kept.key, kept.to_dict())
        self._copy()
        return kept

    def _censored(self, consultation: Any) -> Consultation:
        """Cut only now: what is cut off a spelling of the key would leave the rest of it.

        Raises:
            ValidationError: What was stored is no consultation.
        """
        kept = Consultation.from_dict(self._censor(consultation))
        exchanges = [replace(exchange, error=_clipped(exchange.error)) for exchange in kept.exchanges]
        answer = kept.answer and replace(kept.answer, stopped=_clipped(kept.answer.stopped))
        return replace(kept, exchanges=exchanges, answer=answer)

    def remember(self, key: str, make: Callable[[], Any]) -> Any:
        """A value that is measured once in a run: `make` it, store it, and give what was stored from then on."""
        stored = self._notes.notes()
        if key not in stored:
            self._notes.set_note(key, make())
            stored = self._notes.notes()
        return stored[key]

    def known(self, key: str) -> Any:
        """What `remember` stored, or None."""
        return self._notes.notes().get(key)

    def candidates(self, hook: str) -> tuple[Candidate, ...]:
        """Everything that was proposed for a hook."""
        answers = (consultation.answer for consultation in self.all() if consultation.hook == hook)
        return tuple(candidate for answer in answers if answer is not None for candidate in answer.candidates)

    def note_directions(self, followed: Mapping[tuple[int, ...], str]) -> None:
        """Remember which direction led to a candidate."""
        self._notes.set_note(FOLLOWED, [[list(x), name] for x, name in (self.followed() | dict(followed)).items()])

    def followed(self) -> dict[tuple[int, ...], str]:
        """Candidate -> the direction that led to it."""
        return {tuple(x): name for x, name in self.known(FOLLOWED) or ()}

    def _copy(self) -> None:
        if self._file is None:
            return
        lines = [json.dumps(consultation.to_dict(), ensure_ascii=False) + "\n" for consultation in self.all()]
        replace_file(self._file, "".join(lines))


@dataclass
class OpenConsultation:
    """One consultation while it goes on. Implements `roles.Transcript`."""

    advice: AdviceStore
    consultation: Consultation

    def recorded(self) -> Sequence[Exchange]:
        return self.consultation.exchanges

    def record(self, exchange: Exchange) -> Exchange:
        kept = replace(self.consultation, exchanges=[*self.consultation.exchanges, exchange])
        self.consultation = self.advice.keep(kept)
        return self.consultation.exchanges[-1]

    def close(self, answer: Answer, **extra: Any) -> Answer:
        kept = replace(self.consultation, answer=answer, extra=self.consultation.extra | extra)
        self.consultation = self.advice.keep(kept)
        assert self.consultation.answer is not None
        return self.consultation.answer


def _clipped(reason: str | None) -> str | None:
    return reason[:MAX_REASON] if reason else None


def read_jsonl(file: Path) -> list[Consultation]:
    """The consultations of a recording; a broken last line, which a full disk leaves, is skipped.

    Raises:
        ConfigError: The file is not there or is no recording.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise ConfigError(f"--advisor replay:{file} cannot be read ({reason}): give a run's advisor.jsonl.") from error
    found, lines = [], text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(Consultation.from_dict(json.loads(line)))
        except (ValueError, RecursionError) as error:
            if number == len(lines) and found:
                break
            reason = first_fault(error) if isinstance(error, ValidationError) else first_line(error)
            raise ConfigError(
                f"--advisor replay:{file}: line {number} is no recorded consultation ({reason}): give a run's advisor.jsonl."
            ) from error
    return found
