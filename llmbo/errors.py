"""Errors that are shown to the user: one line that names the value, what was expected and the remedy."""

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# What a terminal obeys instead of showing: control characters but tab and line end, and what turns the direction of text round.
_OBEYED = [
    *range(9),
    *range(11, 32),
    *range(127, 160),
    0x61C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
]
_PRINTABLE = {**dict.fromkeys(_OBEYED), **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")}


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; torch's CPU allocator raises a plain RuntimeError, mapping a file an OSError."""
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError | OSError)
        and any(said in str(error) for said in ("can't allocate memory", "Cannot allocate memory", "out of memory"))
    )


def printable(text: str) -> str:
    """`text` without what a terminal obeys; lone surrogates, which nothing can print, as replacement characters."""
    return text.translate(_PRINTABLE)


def first_line(error: BaseException) -> str:
    """What `error` says, cut to one line, and the next where that one ends with a colon; its type when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


def first_fault(error: "ValidationError", but: str = "") -> str:
    """Where data does not fit its schema, and why; of several faults the first. Empty where all are of the kind `but`."""
    faults = [fault for fault in error.errors(include_url=False, include_input=False) if fault["type"] != but]
    if not faults:
        return ""
    place = ".".join(map(str, faults[0]["loc"]))
    more = f", and {len(faults) - 1} more faults" if len(faults) > 1 else ""
    return f"{place + ': ' if place else ''}{faults[0]['msg']}{more}"


def unknown(what: str, name: str, known: Collection[str]) -> str:
    """One line that says what was expected, the near matches first."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"Unknown {what} '{name}': {hint}Expected {'one of ' + ', '.join(known) if known else 'none'}."


class LlmboError(Exception):
    """Base of everything this package raises on purpose; the command line prints it and exits with 2."""


class ConfigError(LlmboError):
    """A setting is unknown, out of range, or does not fit the others."""


class ModelError(LlmboError):
    """The model cannot be found, loaded or pruned."""


class StorageError(LlmboError):
    """The run folder or its database cannot be used as asked."""


class AwayError(StorageError):
    """The database does not answer, or takes nothing: that may pass."""


class DamagedError(StorageError):
    """What is stored makes no sense: only then is starting over a remedy."""


class TakenOver(StorageError):
    """Nothing was heard of this process for so long that another one does its work."""


class EvaluationError(LlmboError):
    """Candidates cannot be evaluated on this machine."""


class ReplyAwaited(LlmboError):
    """An advisor that is asked by mail has not replied yet. Nothing is wrong: the same command goes on when the reply lies there.

    Args:
        letter: The prompt.
        reply: Where the reply goes.
    """

    def __init__(self, letter: Path, reply: Path) -> None:
        super().__init__(
            f"Advice is asked for in '{letter}': put the reply into '{reply}', and run the same command again."
        )
        self.letter, self.reply = letter, reply


class StrategyError(LlmboError):
    """A strategy fails, or does not keep the rules of proposers and of fair comparisons."""
