"""A database URL -> Optuna's storage, or one line that says what is wrong with it and what helps."""

import errno
import logging
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
import psutil
from alembic.util.exc import CommandError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage, get_storage
from sqlalchemy import URL, create_engine, inspect, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    PendingRollbackError,
    ProgrammingError,
    SAWarning,
    SQLAlchemyError,
)

from llmbo.errors import AwayError, ConfigError, DamagedError, StorageError, first_line
from llmbo.run.journal import Journal
from pruning.errors import PruningError

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=SAWarning)  # of options that a driver does not know
logging.getLogger("alembic").setLevel(logging.ERROR)

try:
    from grpc import RpcError
except ImportError:  # its driver is not here: then nothing of it can be raised

    class RpcError(Exception):  # type: ignore[no-redef]
        """Never raised."""


DATABASE_ERRORS = (SQLAlchemyError, optuna.exceptions.StorageInternalError, RpcError)
_CONTENT_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ConfigError, LookupError, PruningError, RuntimeError, TypeError, ValueError
)  # fmt: skip
ERRORS = (*DATABASE_ERRORS, *_CONTENT_ERRORS, CommandError, ImportError, OSError)  # whatever reading one trips over
JOURNAL, GRPC = "journal:", "grpc:"
NETWORK = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "9p", "fuse.sshfs")  # beginnings of their names
SECONDS = 10.0  # that a proxy may take to answer
_VERSION = "alembic_version"
LONGEST = 250  # characters of a reason, which may quote what is stored
TRIES = 5  # to make the tables of a new database while other processes make them too
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXPECTED = (
    "expected e.g. sqlite:///runs.db, postgresql://user@host/database, journal:/shared/runs.log or grpc://host:13000"
)
KEPT = "then run the same command again; what is stored is kept"
_SQLITE_REMEDIES = {  # primary result code -> what helps
    sqlite3.SQLITE_BUSY: f"another program holds it: wait for that, {KEPT}",
    sqlite3.SQLITE_CANTOPEN: "check the path and its permissions, or name another --storage",
    sqlite3.SQLITE_FULL: f"free space on the disk, {KEPT}",
    sqlite3.SQLITE_IOERR: f"check the disk, {KEPT}",
    sqlite3.SQLITE_LOCKED: f"another program holds it: wait for that, {KEPT}",
    sqlite3.SQLITE_PERM: f"mend its permissions, {KEPT}",
    sqlite3.SQLITE_READONLY: f"mend its permissions, {KEPT}",
}


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back until the database is done.

    KeyboardInterrupt raised inside SQLAlchemy leaves the transaction open, and its lock then keeps the report from being written.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread only
        yield
        return
    arrived: list[int] = []
    former = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    for signum in former:
        signal.signal(signum, lambda signum, frame: arrived.append(signum))
    try:
        yield
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
    if arrived:
        signal.raise_signal(arrived[0])


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Whatever reading the database trips over, as one line.

    Raises:
        StorageError: It cannot be used; an `AwayError` where that may pass, a `DamagedError` where what it holds makes no sense.
    """
    try:
        yield
    except ERRORS as error:
        raise _unusable(url, error) from error


def open_storage(url: str) -> BaseStorage:
    """The storage behind a URL; makes the database where there is none yet, also while others make it.

    Raises:
        StorageError: It cannot be used.
    """
    with explained(url):
        _check(url)
        for _ in range(TRIES - 1):
            try:
                return _storage(url)
            except (IntegrityError, OperationalError, ProgrammingError) as error:  # another process was faster
                if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                    raise
                time.sleep(0.1)
        return _storage(url)


def find_storage(url: str) -> BaseStorage | None:
    """The storage behind a URL; None where there is no file of SQLite or a journal yet, or an empty one. Makes no file.

    Raises:
        StorageError: It cannot be used.
    """
    with explained(url):
        _check(url)
        path = _path(url)
        if path is not None and (not path.exists() or path.stat().st_size == 0):
            return None
    return open_storage(url)


def delete_run(url: str, name: str, own_file: Path | None = None) -> None:
    """Forget a stored run.

    Args:
        own_file: The run's own SQLite file, if it has one: removed as a whole, so that a damaged one can be left behind.
    """
    if own_file is not None:
        for file in (
            own_file,
            *own_file.parent.glob(f"{own_file.name}-*"),
        ):  # the database, its journal and write-ahead log
            file.unlink(missing_ok=True)
        return
    storage = open_storage(url)
    with explained(url):
        try:
            study = storage.get_study_id_from_name(name)
        except KeyError:
            return
        storage.delete_study(study)


def shown_url(url: str) -> str:
    """A database URL without its user, password and options, any of which may tell a secret."""
    if url.startswith(JOURNAL):
        return url
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # where a password ends cannot be told
        return f"{url.partition(':')[0]}:…" if "@" in url else url.partition("?")[0]
    host = parsed.host and parsed.host.rpartition("@")[2]  # a password may hold an @
    place = URL.create(parsed.drivername, host=host, port=parsed.port, database=parsed.database)
    shown = place.render_as_string()
    return shown.replace("//", "//…@", 1) if parsed.username or parsed.password else shown


def url_of(folder: Path, storage: str | None) -> str:
    """Where a run is stored: in the database that was named, else in a file of its folder."""
    return storage or f"sqlite:///{folder / 'study.db'}"


def check_shared(url: str) -> None:
    """Refuse a SQLite file that several machines may see: its locks hold on one machine only.

    Raises:
        StorageError: It is on a network file system.
    """
    if kind := network_of(url):
        path = Path(str(_path(url)))
        raise StorageError(
            f"'{path}' is on a network file system ({kind}), where SQLite loses what several processes write: start the run "
            f"with --storage journal:{path.with_suffix('.log')}, or postgresql://…"
        )


def network_of(url: str) -> str:
    """The kind of network file system that a SQLite file is on; empty for any other place or database."""
    path = _path(url)
    if path is None or url.startswith(JOURNAL):
        return ""
    places = [part for part in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(part.mountpoint)]
    kind = max(places, key=lambda part: len(part.mountpoint)).fstype if places else ""
    return kind if kind.startswith(NETWORK) else ""


def _storage(url: str) -> BaseStorage:
    if url.startswith(JOURNAL):
        return JournalStorage(Journal(Path(url.removeprefix(JOURNAL))))
    if url.startswith(GRPC):
        return _proxy(url)
    engine = create_engine(url)
    with (
        engine.connect() as connection
    ):  # Optuna writes its version last: after that, a table that is not there is damage
        made = inspect(connection).has_table(_VERSION) and connection.execute(text(f"select 1 from {_VERSION}")).first()
    engine.dispose()
    template = url.replace("{", "{{").replace("}", "}}")  # Optuna takes a URL for one
    return get_storage(RDBStorage(template, skip_table_creation=bool(made)))


def _proxy(url: str) -> BaseStorage:
    parsed = make_url(url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = GrpcStorageProxy(host=parsed.host or "localhost", port=parsed.port or 13000)
    proxy.wait_server_ready(timeout=SECONDS)
    return proxy


def _check(url: str) -> None:
    if url.startswith(JOURNAL):
        if not url.removeprefix(JOURNAL).strip("/"):
            raise ArgumentError("no path")
        return
    try:
        parsed = make_url(url)
    except ValueError as error:  # e.g. a port that is no number
        raise ArgumentError(str(error)) from error
    if url.startswith(GRPC):
        return
    parsed.get_dialect()
    if parsed.get_backend_name() == "sqlite" and (
        not parsed.database or ":memory:" in parsed.database or parsed.query.get("mode") == "memory"
    ):
        raise StorageError(
            f"--storage {url} keeps trials in memory only, where they die with the process: name a file, "
            "e.g. sqlite:///runs.db."
        )


def _path(url: str) -> Path | None:
    """The file of a journal or behind a SQLite URL, whatever driver and options it names; None for other databases."""
    if url.startswith(JOURNAL):
        return Path(url.removeprefix(JOURNAL)).absolute()
    parsed = make_url(url)
    return (
        Path(str(parsed.database).removeprefix("file:")).absolute() if parsed.get_backend_name() == "sqlite" else None
    )


def _unusable(url: str, error: BaseException) -> StorageError:
    chain = [error]
    while (cause := getattr(chain[-1], "orig", None) or chain[-1].__cause__) is not None:
        chain.append(cause)
    reason, kind = first_line(chain[-1]), StorageError
    code = next((code & 0xFF for found in chain if (code := getattr(found, "sqlite_errorcode", None))), None)

    def among(*kinds: type[BaseException]) -> bool:
        return any(isinstance(found, kinds) for found in chain)

    if among(NoSuchModuleError, ArgumentError):
        reason, remedy = "no URL of a database that is known here", EXPECTED
    elif among(ImportError):
        remedy = "install its driver with pip, or name another --storage"
    elif code in _SQLITE_REMEDIES:
        remedy, kind = _SQLITE_REMEDIES[code], AwayError
    elif any(getattr(found, "errno", None) in _NO_SPACE for found in chain):
        remedy, kind = _SQLITE_REMEDIES[sqlite3.SQLITE_FULL], AwayError
    elif code is None and among(OperationalError, PendingRollbackError, OSError, RpcError):
        remedy, kind = f"start its server or mend the URL, {KEPT}", AwayError
    elif "optuna version" in reason:
        remedy = "install the Optuna that made it, or a newer one, or choose another --name"
    else:
        kind = DamagedError
        remedy = "restore it from a copy, choose another --name or --storage, or start over with --fresh"
    return kind(f"The database {shown_url(url)} cannot be used ({reason[:LONGEST]}): {remedy}.")
