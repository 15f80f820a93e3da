"""What every command shares: how faults become one line and an exit code, and how lists are typed."""

import gc
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from llmbo.errors import ConfigError, LlmboError, ReplyAwaited, first_line, out_of_memory, printable

# Typer's own: newer versions bring a click with them, older ones use the one that is installed.
USAGE_ERROR: Any = typer.BadParameter.__base__
EXIT_NO_ANSWER = 1
EXIT_BAD_INPUT = 2
EXIT_NOTHING_COUNTS = 3  # it ended and is stored, but there is no front: what follows in a script must not go on
EXIT_REPLY_AWAITED = 4
EXIT_INTERRUPTED = 130
running = "llmbo"  # and the command, for messages


@contextmanager
def one_line_errors(interrupted: str, smaller: str = "") -> Iterator[None]:
    """Turn faults that are not ours into one line on stderr and an exit code; ours keep their traceback.

    Args:
        interrupted: What to say when SIGINT or SIGTERM ends the command.
        smaller: Options of the command that it needs less memory with when they are smaller.
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
    except ReplyAwaited as error:
        say(str(error), err=True)
        raise typer.Exit(EXIT_REPLY_AWAITED) from None
    except Exception as error:
        if asked:  # in the middle of an import it comes out as another exception
            _interrupted(interrupted)
        explained = _explained(error, smaller)
        if explained is None:
            raise
        say(f"error: {' '.join(explained.split())}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


@contextmanager
def imports() -> Iterator[None]:
    """Around a command's own imports: a million objects, all to stay. Not to look for garbage among them, now and at the end, saves a third
    of the time that they take."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _interrupted(told: str) -> NoReturn:
    say(told, err=True)
    raise typer.Exit(EXIT_INTERRUPTED) from None


def say(text: str, err: bool = False, nl: bool = True) -> None:
    """Print untrusted text: to stdout, or to stderr with `err`."""
    typer.echo(printable(text), err=err, nl=nl)


class OneLineGroup(TyperGroup):
    """Says what is wrong with a command line as everything else is said: in one line on stderr."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            say(f"error: {' '.join(error.format_message().split())}", err=True)
            raise typer.Exit(EXIT_BAD_INPUT) from None


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


def _explained(error: Exception, smaller: str) -> str | None:
    """One line for what the machine, not the program, did wrong; None for a fault of ours, which deserves its traceback."""
    from llmbo.run.database import DATABASE_ERRORS
    from pruning.errors import PruningError

    if isinstance(error, (LlmboError, PruningError)):
        return str(error)
    reason = first_line(error.__cause__ or error)
    if out_of_memory(error):
        remedy = f" or use a smaller {smaller}" if smaller else ""
        return f"Out of memory: free some{remedy}, then run the same command again."
    if isinstance(error, (*DATABASE_ERRORS, OSError)):
        return f"{running} cannot read or write ({reason}): mend that and run the same command again; what is finished is kept."
    return None
