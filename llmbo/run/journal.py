"""Optuna's journal, for processes that are killed, suspended or out of disk in the middle of a line."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

GRACE = 30  # seconds after which a lock is taken from a process that has died with it
BLOCK = 1 << 16  # bytes that are read at once to find where the last whole line ends


class Journal(JournalFileBackend):
    """A file to which lines are appended under a lock, which is a link and holds on NFS too.

    What a killed process or a full disk has left of a line goes before the next is written: both would be one line, and the
    journal unreadable from there on.
    """

    def __init__(self, path: Path) -> None:
        file = str(path.absolute())  # the lock points at it, and its age tells whether the lock's holder lives
        super().__init__(file, JournalFileSymlinkLock(file, GRACE))

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._lock.acquire()
        try:
            _cut_broken_line(self._file_path)
            with open(self._file_path, "ab") as file:
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        finally:
            with suppress(
                RuntimeError
            ):  # another process has taken it, as from one that is dead: this one was suspended
                self._lock.release()


def _cut_broken_line(path: str) -> None:
    with open(path, "rb+") as file:
        end = start = file.seek(0, os.SEEK_END)
        while start > 0:
            start = max(0, start - BLOCK)
            file.seek(start)
            last = file.read(min(BLOCK, end - start)).rfind(b"\n")
            if last >= 0:
                if start + last + 1 < end:
                    file.truncate(start + last + 1)
                return
        file.truncate(0)
