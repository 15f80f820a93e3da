"""Is there room for what is going to be written?"""

import shutil
from pathlib import Path

from llmbo.errors import StorageError

DISK_MARGIN = 100 << 20  # tokenizer, card and file system overhead, bytes


def check_disk(out: Path, needed: int) -> None:
    """Raise StorageError unless `needed` bytes and a margin are free where `out` will be."""
    place = next((path for path in out.absolute().parents if path.is_dir()), out.absolute())
    free, needed = shutil.disk_usage(place).free, needed + DISK_MARGIN
    if free < needed:
        raise StorageError(
            f"Too little disk space for '{out}': {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free."
        )
