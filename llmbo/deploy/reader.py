"""The process that reads an export back, started before anything is imported or loaded: its own imports take as long."""

from contextlib import AbstractContextManager, nullcontext

from llmbo.config.formats import FORMATS
from pruning.export.reader import Read, reader


def started(format: str) -> AbstractContextManager[Read | None]:
    """For `export`; None where the format is unknown or starts its own when it has written."""
    takes = format in FORMATS and "read" in FORMATS[format].options
    return reader("reload_hf.py") if takes else nullcontext()
