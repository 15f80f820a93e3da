"""A result folder is whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pruning.errors import UnsupportedExport


def check_out(out: Path) -> None:
    """Refuse a place that cannot become the result folder.

    Raises:
        UnsupportedExport: It is a file, or a folder with something in it, or no folder can be made there.
    """
    above = next(path for path in out.absolute().parents if path.exists())
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
        files: Small texts by file name, written when the body is done.
    """
    check_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield folder
        for name, content in files.items():
            (folder / name).write_text(content, encoding="utf-8")
        for path in (folder, *folder.rglob("*")):  # temporary folders are private, results are not
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
