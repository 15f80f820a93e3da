"""The most anonymous memory that a command's process held, looked at from outside: what `--memory` bounds on a CPU, where mapped files do
not count. Linux only.

    python -m experiments.anonymous llmbo optimize --model llama --memory 2GB --offload disk

Python and its libraries are in it, about 0.4 GB once a model's classes are loaded.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EVERY = 0.01  # seconds
HELD = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def run(command: Sequence[str]) -> tuple[int, int]:
    """Exit code, and bytes at the peak."""
    peak = 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            if found := HELD.search(Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")):
                peak = max(peak, 1024 * int(found[1]))
            time.sleep(EVERY)
    return process.returncode, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="to watch, as typed without this")
    command, start = parser.parse_args().command, time.monotonic()
    if not command:
        parser.error("expected a command to watch, got none")
    code, peak = run(command)
    minutes = (time.monotonic() - start) / 60
    print(f"{peak / 1e9:.2f} GB of anonymous memory at the peak, {minutes:.1f} min", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
