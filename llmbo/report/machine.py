"""Where a report was made: versions, platform, and the memory that it took. Imports nothing that would take some itself."""

import platform
import re
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmbo.version import __version__

PACKAGES = ("torch", "transformers", "botorch", "gpytorch", "optuna")


def environment() -> dict[str, Any]:
    """Versions and peak memory of this process, as `RunPart` wants them."""
    return {
        "versions": {
            "python": platform.python_version(),
            "llmbo": __version__,
            **{name: version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "peak_memory_bytes": _peak_memory(),
    }


def _peak_memory() -> int:
    """Bytes this process held in memory at most.

    Linux's `ru_maxrss` survives `exec`, so it may be the peak of the process that started this one; `VmHWM` is our own.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
