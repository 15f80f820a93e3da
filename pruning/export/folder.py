"""A result folder is whole or not there."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pruning.errors import ExportFailed, UnsupportedExport

SIZE = "%SIZE-ON-DISK%"  # stands in a text for what all files but the texts take
LEFTOVER = re.compile(
    r"\..+\.[0-9a-z_]{8}\.(partial|lock)"
)  # as `folder_beside` and the first version's `mkdtemp` name them


def check_out(out: Path) -> None:
    """Refuse a place that cannot become the result folder.

    Raises:
        UnsupportedExport: It is a file, or a folder with something in it, or no folder can be made there.
    """
    above = next((path for path in out.absolute().parents if path.exists()), out.absolute())
    if not above.is_dir() or not os.access(above, os.W_OK):
        reason = "is a file" if not above.is_dir() else "cannot be written"
        raise UnsupportedExport(f"The output '{out}' cannot be made, since '{above}' {reason}: choose another place.")
    if out.exists() and not out.is_dir():
        raise UnsupportedExport(f"The output '{out}' is a file: give a folder that is empty or does not exist.")
    if out.is_dir() and any(out.iterdir()):
        raise UnsupportedExport(f"The output folder '{out}' is not empty: choose another one, or empty it.")


@contextmanager
def whole_folder(out: Path, files: Mapping[str, str]) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it becomes `out` when the body succeeds and vanishes when it does not.

    Args:
        files: Small texts by file name, written when the body is done; `SIZE` in them becomes what the other files take, in MB.

    Raises:
        UnsupportedExport: See `check_out`.
        ExportFailed: The disk is full, or something else keeps the files from being written.
    """
    check_out(out)
    try:
        with folder_beside(out) as folder:
            yield folder
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            for name, content in files.items():
                (folder / name).write_text(content.replace(SIZE, f"{size / 1e6:.1f} MB"), encoding="utf-8")
            for path in (folder, *folder.rglob("*")):  # temporary folders are private, results are not
                path.chmod(0o755 if path.is_dir() else 0o644)
            folder.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ExportFailed(f"Cannot write '{out}' ({reason}). Nothing was left there.") from error


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, for as long as the context lasts.

    What killed processes have left of such folders is removed first: the system frees the lock that tells a live one's.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(".*"):
        if LEFTOVER.fullmatch(leftover.name):
            with suppress(Timeout), _held(leftover.with_suffix(".partial")):
                pass
    folder = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
    with _held(folder):
        folder.mkdir(mode=0o700)
        yield folder


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Lock a temporary folder, which need not exist, and remove both at the end.

    Raises:
        Timeout: Another process holds it.
    """
    lock = FileLock(folder.with_suffix(".lock"), timeout=0)
    with lock:
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)
