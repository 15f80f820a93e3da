"""Names, origins, reasons and replies from models, reports and servers never reach a terminal or a spreadsheet as commands."""

import contextlib
import csv
import io
import json
import re
import shutil
import sqlite3
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.table import Table
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.display.console import Console
from llmbo.display.dashboard import Dashboard, Progress, Snapshot
from llmbo.display.progress import Display
from llmbo.display.results import summary
from llmbo.errors import printable
from llmbo.report import Report
from llmbo.types import Proposal, TrialState

# A colour, a title (OSC), a clipboard (OSC 52), C1's CSI, turned text and its isolates, marks, overwriting, bell, NUL, a cursor.
COMMANDS = (
    "\x1b[31m", "\x1b]0;title\x07", "\x1b]52;c;eA==\x1b\\", "\x9b31m", "\x9d0;t\x9c", "\u202e", "\u2066", "\u2069", "\u200e", "\u200f",
    "\u061c", "\r", "\x08", "\x07", "\x00", "\x7f", "\x0c", "\x1bP", "\x1b[2J", "\x85",
)  # fmt: skip
HOSTILE = "evil" + "".join(COMMANDS) + "[bold]m[/nothing]:smile:"


def obeyed(text: str) -> list[str]:
    """What in it a terminal would obey: by Unicode's categories, not by the table that is tested."""
    return [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in "\n\t"]


@pytest.mark.parametrize("command", COMMANDS, ids=ascii)
def test_a_command_loses_its_power_and_the_words_around_it_stay(command: str) -> None:
    assert obeyed(command) and obeyed(printable(f"be{command}fore")) == []
    assert re.fullmatch("be.*fore", printable(f"be{command}fore"))


def test_ordinary_text_is_left_alone() -> None:
    text = "Größe ≤ 0,5 · 模型\tעברית 🙂 é\n"
    assert printable(text) == text
    assert printable("\ud800") == "\N{REPLACEMENT CHARACTER}"
    assert [
        c for c in map(chr, range(0x3000)) if unicodedata.category(c) == "Cc" and c not in "\n\t" and printable(c)
    ] == []


@pytest.fixture
def hostile(finished: Any, tmp_path: Path) -> Path:
    """A run whose report and database say such things wherever words may stand."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(finished.folder / "runs" / "tiny", folder)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    report["run"] |= {"name": HOSTILE, "command": HOSTILE}
    report["model"] |= {"name": HOSTILE, "source": HOSTILE}
    report["data"]["source"] = HOSTILE
    report["warnings"] = [HOSTILE]
    for trial in report["trials"]:
        trial |= {"origin": HOSTILE, "why": f"={HOSTILE}", "failure": HOSTILE}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    with sqlite3.connect(folder / "study.db") as connection:
        changed = connection.execute(
            "update trial_user_attributes set value_json = ? where key = 'origin'", (json.dumps(HOSTILE),)
        )
        assert changed.rowcount > 0
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["report", "{run}"], ["report", "{run}", "--format", "csv"], ["report", "{run}", "--format", "md"], ["watch", "{run}"],
        ["report", HOSTILE.replace("\x00", "")], ["optimize", "--model", f"./{HOSTILE}"], ["evaluate", f"./{HOSTILE}"],
        ["optimize", "--model", "./x", "--strategy", HOSTILE], [HOSTILE], ["export", "{run}", "--trial", HOSTILE],
        ["export", "{run}", "--trial", "0", "--format", HOSTILE, "--out", "x"], ["compare", HOSTILE.replace("\x00", "")],
        ["export", "{run}", "--trial", "99", "--format", "hf", "--out", "x"], ["rerank", "{run}", "--top", "2", "--steps", "1"],
        ["profile", "--model", "./x", "--measure", HOSTILE],
    ],
    ids=lambda words: ascii(" ".join(words))[:40],
)  # fmt: skip
def test_no_command_prints_it_raw(hostile: Path, words: list[str]) -> None:
    with contextlib.chdir(hostile.parents[1]):
        answer = CliRunner().invoke(app, [word.replace("{run}", str(hostile)) for word in words])
    assert answer.exit_code in (0, 2) and answer.output.strip(), repr(answer.exception)
    assert obeyed(answer.stdout) == [] and obeyed(answer.stderr) == [], ascii(answer.output)


def test_nor_does_what_is_drawn_on_a_terminal(toy: Any, hostile: Path) -> None:
    """No styles here, so whatever a terminal would obey, but a few of rich's own, came from outside."""
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=160, height=40)
    report = Report.model_validate_json((hostile / "report.json").read_text(encoding="utf-8"))
    console.print(summary(report))
    console.print(HOSTILE, f"warning: {HOSTILE}")
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    trials = [
        toy.trial(n, Proposal(x, HOSTILE), state=TrialState.COMPLETE) for n, x in enumerate(toy.random_points(6, 1))
    ]
    console.print(
        Dashboard(Snapshot(HOSTILE, HOSTILE, 9, Progress(trials, toy.objectives, toy.dense), 1.0, note=HOSTILE))
    )
    assert "evil" in console.file.getvalue() and "[bold]m[/nothing]:smile:" in console.file.getvalue()  # type: ignore[attr-defined]
    assert obeyed(console.file.getvalue()) == []  # type: ignore[attr-defined]


def test_nor_do_live_pictures_and_lines(toy: Any, capsys: Any) -> None:
    for terminal in (True, False):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, color_system=None, width=100, height=30)
        with Display(console, 2, title=HOSTILE) as display:
            display.objectives, display.dense = toy.objectives, toy.dense
            with display.phase(HOSTILE, 3) as advance:
                advance(1)
            trial = toy.trial(0, Proposal(toy.random_points(1, 1)[0], HOSTILE))
            with display.phase("search", 2):
                display.on_trial_start(Proposal(trial.x, HOSTILE), 0)
                display.on_trial_end(trial, [trial])
            display.warn(HOSTILE)
        own = re.sub(r"\x1b\[(\?25[lh]|\d*[AHJK]|2K)|\r", "", file.getvalue())  # how rich moves the cursor
        assert "evil" in own and obeyed(own) == [], ascii(own)


def test_a_model_card_is_as_tame(hostile: Path, tmp_path: Path) -> None:
    from llmbo.config.formats import FORMATS
    from llmbo.deploy.card import model_card
    from llmbo.deploy.request import ExportRequest
    from llmbo.deploy.target import Target
    from llmbo.report.schema import Refitted
    from llmbo.run.rebuild import Cut

    report = Report.model_validate_json((hostile / "report.json").read_text(encoding="utf-8"))
    target = Target(FORMATS["hf"], "float32", 5)
    request = ExportRequest(report, hostile, report.trials[0], target, tmp_path / "out", "table")
    cut = Cut(torch.nn.Module(), None, "table", Refitted(objectives=report.trials[0].objectives))  # type: ignore[arg-type]
    card = model_card(request, cut, HOSTILE, "load {path}", HOSTILE)
    assert "evil" in card and obeyed(card) == []


def test_words_that_a_spreadsheet_would_run_are_quoted_and_numbers_stay(hostile: Path) -> None:
    formulas = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"]
    report = json.loads((hostile / "report.json").read_text(encoding="utf-8"))
    for trial, word in zip(report["trials"], formulas, strict=False):
        trial |= {"why": word, "gain": -1.5, "failure": "-1.5"}
    report["run"]["name"] = "=name"
    (hostile / "report.json").write_text(json.dumps(report), encoding="utf-8")
    answer = CliRunner().invoke(app, ["report", str(hostile), "--format", "csv", "--out", str(hostile / "trials.csv")])
    assert answer.exit_code == 0, answer.output
    with (hostile / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["trials"])
    for row, word in zip(rows, formulas, strict=False):
        assert row["run"] == "'=name" and row["gain"] == "-1.5" == row["failure"]
        assert row["why"].lstrip("'").endswith(word.strip()[-3:]) and row["why"][0] not in "+-@\t\r\n"
        assert row["why"].startswith("'")
    for row in rows:
        for name, cell in row.items():
            assert not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) or float(cell) < 0, (name, cell)


def test_everything_is_printed_in_one_place() -> None:
    """A `print`, `typer.echo` or console of rich's own would pass it by. JSON is ASCII, which escapes all of it."""
    root = Path(__file__).parents[2] / "llmbo"
    ways = re.compile(
        r"(?<![\w.])print\(|typer\.(secho|echo)\(|from rich\.console import .*\bConsole\b|sys\.std(out|err)\.write"
    )
    known = {
        "__main__.py": 1,
        "cli/common.py": 1,
        "display/console.py": 1,
        "display/dashboard.py": 1,
        "display/progress.py": 1,
    }
    found = {
        str(path.relative_to(root)): len(ways.findall(path.read_text(encoding="utf-8"))) for path in root.rglob("*.py")
    }
    assert {name: count for name, count in found.items() if count} == known
