"""Where runs lie, and how their files are read and replaced. Needs nothing heavy."""

import json
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmbo.errors import StorageError

RUNS = Path("runs")
_PARTS = ("run", "model", "data", "objectives", "dense", "trials", "front", "hypervolume")


def find_run(name: str) -> Path:
    """The folder of a run given by its folder, its name below `runs/`, or its `report.json`.

    Raises:
        StorageError: There is no such run; says which there are.
    """
    given = Path(name)
    for folder in (given, RUNS / name, *([given.parent] if given.name == "report.json" else [])):
        if folder.is_dir():
            return folder
    known = sorted(path.name for path in RUNS.iterdir() if path.is_dir()) if RUNS.is_dir() else []
    close = get_close_matches(given.name, known)
    remedy = f"Did you mean '{close[0]}'?" if close else f"Known runs: {', '.join(known)}." if known else _NO_RUNS
    raise StorageError(f"There is no run '{name}', neither as a folder nor below '{RUNS}'. {remedy}")


_NO_RUNS = "There are no runs here yet: start one with `llmbo optimize --model llama`."


def read_report(folder: Path) -> Mapping[str, Any]:
    """A run's report as it was written; parts that this version does not know are kept.

    Raises:
        StorageError: There is none yet, or it is not a report.
    """
    path = folder / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        raise StorageError(
            f"'{folder}' has no report.json yet: a run writes it when it ends or is stopped. Follow a running one with "
            f"`llmbo watch {folder}`."
        ) from None
    except (OSError, ValueError) as error:
        raise StorageError(f"'{path}' cannot be read ({error}): run the command that wrote it again.") from None
    missing = [part for part in _PARTS if not isinstance(report, dict) or part not in report]
    if missing or report["schema_version"] != 1:
        reason = f"no '{missing[0]}' in it" if missing else f"its schema_version is {report['schema_version']}"
        raise StorageError(
            f"'{path}' is not a report that this version can read ({reason}): expected schema_version 1."
        )
    return report


def replace_file(path: Path, content: bytes) -> None:
    """Write to a temporary name, then rename: the old file stays whole until the new one is."""
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
