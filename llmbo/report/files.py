"""Where runs lie, and how their reports are read. Needs nothing heavy."""

import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llmbo.errors import StorageError, first_fault, first_line

RUNS = Path("runs")


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
        StorageError: There is none yet, or it does not fit the schema; names the place.
    """
    from pydantic import ValidationError

    from llmbo.report.schema import Report

    path = folder / "report.json"
    try:
        report = json.loads(
            path.read_text(encoding="utf-8"), parse_float=_finite, parse_int=_short, parse_constant=lambda _: None
        )
        json.dumps(report, ensure_ascii=False).encode()  # half a character can be read, but not written
    except FileNotFoundError:
        raise StorageError(
            f"'{folder}' has no report.json yet: a run writes it when it ends or is stopped. Follow a running one with "
            f"`llmbo watch {folder}`."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"'{path}' cannot be read ({first_line(error)}): {_AGAIN}.") from None
    if isinstance(report, dict) and report.get("schema_version", 1) not in (1, 2):
        raise StorageError(
            f"'{path}' is of another version of llmbo (its schema_version is {report['schema_version']}): expected schema_version 1 or 2."
        )
    try:
        Report.model_validate(report)
    except ValidationError as error:
        if fault := first_fault(error, but="extra_forbidden"):
            raise StorageError(f"'{path}' is damaged or of another version of llmbo ({fault}): {_AGAIN}.") from None
    return report


_AGAIN = "run the command that wrote it again, which goes on from the stored trials"


def _finite(number: str) -> float | None:
    """Other numbers than JSON's are damage."""
    value = float(number)
    return value if math.isfinite(value) else None


def _short(number: str) -> int | None:
    return int(number) if len(number) < 20 else None
