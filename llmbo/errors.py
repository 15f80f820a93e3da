"""Errors that are shown to the user: one line that names the value, what was expected and the remedy."""

import difflib
from collections.abc import Collection


def first_line(error: BaseException) -> str:
    """What `error` says, cut to one line, and the next where that one ends with a colon; its type when it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


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


class EvaluationError(LlmboError):
    """Candidates cannot be evaluated on this machine."""


class StrategyError(LlmboError):
    """A strategy fails, or does not keep the rules of proposers and of fair comparisons."""
