"""Where the command line begins: its first second, before a command has begun, and the moment when nothing can be written."""

import os
import signal
import sys
from typing import NoReturn


def main() -> None:
    """Run the command line; whatever goes wrong around a command is one line and an exit code too."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _quit)
    try:
        from llmbo.cli import app

        app()
    except OSError as error:  # e.g. a full disk behind stdout; commands explain their own
        command = " ".join(["llmbo", *sys.argv[1:2]])
        print(f"error: {command} cannot write its output ({error.strerror or error}).", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left of it would fail once more
        sys.exit(1)


def _quit(signum: int, frame: object) -> NoReturn:
    """At once: an exception in the middle of an import comes out as another one."""
    os.write(2, b"Interrupted.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
