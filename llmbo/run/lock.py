"""One process at a time works on a run folder."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from llmbo.errors import StorageError

LOCK = ".lock"  # in the run folder; dies with the process that holds it
LOOKING = 1.0  # seconds that a starting run waits for a lock: whoever looks at it holds it for an instant


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the run folder; the lock dies with the process that holds it."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=LOOKING)
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"Another process is working on '{folder}': wait for it, or choose another --name."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"Cannot write the run folder '{folder}' ({reason}): choose another --name or working directory."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # input that was refused leaves nothing behind
            if {path.name for path in folder.iterdir()} == {LOCK}:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the run folder's lock; None where that cannot be told."""
    if not (folder / LOCK).exists():
        return False
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return None
