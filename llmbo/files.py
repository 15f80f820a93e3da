"""Files that are there whole or not at all."""

import os
from pathlib import Path


def replace_file(path: Path, content: bytes | str) -> None:
    """Write beside it, then rename: the old file stays whole until the new one is, whoever else writes it meanwhile.

    Args:
        content: Text is written as UTF-8.

    Raises:
        OSError: The folder is not there, or takes nothing.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
