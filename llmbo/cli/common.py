"""What every command shares: how faults become one line and an exit code, and how lists are typed."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from llmbo.errors import ConfigError, LlmboError, first_line

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
running = "llmbo"  # and the command, for messages


@contextmanager
def one_line_errors(interrupted: str) -> Iterator[None]:
    """Turn faults that are not ours into one line on stderr and an exit code; ours keep their traceback.

    Args:
        interrupted: What to say when SIGINT or SIGTERM ends the command.
    """
    asked: list[int] = []

    def interrupt(signum: int, frame: object) -> NoReturn:
        asked.append(signum)
        raise KeyboardInterrupt

    former = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum, handler in former.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        _interrupted(interrupted)
    except Exception as error:
        if asked:  # in the middle of an import it comes out as another exception
            _interrupted(interrupted)
        explained = _explained(error)
        if explained is None:
            raise
        typer.echo(f"error: {explained}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _interrupted(told: str) -> NoReturn:
    typer.echo(told, err=True)
    raise typer.Exit(EXIT_INTERRUPTED) from None


def split_list(text: str) -> list[str]:
    """The parts of a comma-separated value."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    """Comma-separated numbers.

    Raises:
        ConfigError: Something else is among them.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in split_list(text))
    except ValueError:
        raise ConfigError(f"{flag} needs numbers separated by commas, got '{text}'.") from None


def _explained(error: Exception) -> str | None:
    """One line for what the machine, not the program, did wrong; None for a fault of ours, which deserves its traceback."""
    from llmbo.problem.proxy import out_of_memory
    from llmbo.run.database import DATABASE_ERRORS
    from pruning.errors import PruningError

    if isinstance(error, (LlmboError, PruningError)):
        return str(error)
    reason = first_line(error.__cause__ or error)
    if out_of_memory(error):
        return (
            "Out of memory: free some, use a smaller --window or --calibration-tokens, then run the same command again."
        )
    if isinstance(error, (*DATABASE_ERRORS, OSError)):
        return f"{running} cannot read or write ({reason}): mend that and run the same command again; what is finished is kept."
    return None
