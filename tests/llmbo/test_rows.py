"""An objective is a row of one table and one function: everything else follows, for the rows there are and for a new one."""

import contextlib
import importlib
import json
import math
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import typer
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.config.objectives import OBJECTIVES, QUANTITIES
from llmbo.problem import file_size, hardware
from llmbo.report import json_schema
from llmbo.report.comparison import counting
from llmbo.report.quantities import quality_of, quantities
from llmbo.types import Trial, TrialState
from pruning import latency as blocks
from pruning.export.gguf_size import GgufSize

ROOT = Path(__file__).parents[2]
GENERATED: dict[str, Callable[[str], str]] = runpy.run_path(str(ROOT / "experiments" / "generated.py"))["GENERATED"]
COMMAND: Any = typer.main.get_command(app).commands["optimize"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", GENERATED)
def test_what_is_generated_is_up_to_date(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == GENERATED[name](text), "run `make generated`"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_says_how_its_value_is_come_by(name: str) -> None:
    row = OBJECTIVES[name]
    assert [row.measured, bool(row.function), row.table is not None, row.file].count(True) == 1
    assert row.unit and row.description
    if row.function:
        assert callable(resolve_name(row.function))


def page_data(page: Path) -> dict[str, Any]:
    block = page.read_text(encoding="utf-8").partition('<script type="application/json" id="data">')[2]
    return json.JSONDecoder().raw_decode(block.lstrip())[0]


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Times and joules in proportion to the number of parameters, a cache of its own, and files without the tests' tokenizer."""

    def run(model: PreTrainedModel, *others: object) -> dict[str, list[float]]:
        size = sum(parameter.numel() for parameter in model.parameters())
        return {"prefill": [1e-6 * size], "decode": [1e-7 * size] * 4}

    monkeypatch.setattr(blocks, "_run", run)
    monkeypatch.setattr(hardware, "energy_counter", lambda device: time.perf_counter)
    monkeypatch.setattr(file_size, "GgufSize", lambda model, _, *others: GgufSize(model, None, *others))
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("clocks")
def test_every_row_can_be_searched_for_and_is_shown(llmbo: Any) -> None:
    item = '{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": %d}\n'
    (llmbo.folder / "items.jsonl").write_text((2 * (item % 0) + 2 * (item % 1)) * 2, encoding="utf-8")
    options = {
        "objectives": "accuracy,params_share",
        "items": "items.jsonl",
        "reference_point": "0.01,1",
        "context": 16,
    }
    limits = [f"--max={name}=1e15" for name, row in OBJECTIVES.items() if not row.maximize]
    with contextlib.chdir(llmbo.folder):
        done = CliRunner().invoke(app, [*llmbo.flags(budget=4, **options), *limits])
    assert done.exit_code == 0, done.output
    report = llmbo.report()
    known = page_data(llmbo.folder / "runs" / "tiny" / "report.html")["quantities"]
    fields = json.loads(json_schema())["$defs"]["Values"]["properties"]
    options_help = {option.name: option.help for option in COMMAND.params}
    documented = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    for name, row in OBJECTIVES.items():
        for point in report["front"]:
            assert point["objectives"][name] > 0 and point["heldout"][name] > 0, name
        assert {key: known[name][key] for key in ("unit", "format", "maximize", "measured")} == {
            "unit": row.unit, "format": row.format, "maximize": row.maximize, "measured": not row.known,
        }  # fmt: skip
        assert name in fields and name in options_help["objectives"]
        assert f"| `{name}` | {row.unit} |" in documented
        assert (f"but {name}" in options_help["maximum"]) is row.maximize
    assert {bound["name"]: bound["unit"] for bound in report["constraints"]} == {
        name: row.unit for name, row in OBJECTIVES.items() if not row.maximize
    }


def test_every_number_of_a_report_has_a_row(finished: Any) -> None:
    report = finished.report()
    known = quantities(report["objectives"])
    assert set(known) == {*QUANTITIES, "gain"} and list(report["dense"]["objectives"])[:3] == [
        "kl",
        "loss",
        "perplexity",
    ]
    assert set(report["dense"]["objectives"]) <= set(known)


@pytest.mark.parametrize(
    ("objectives", "quality", "gain"),
    [
        ([("kl", "nats/token", False), ("params", "parameters", True)], "kl", ("nats/token", "plain")),
        (
            [("params", "parameters", True), ("accuracy", "share of items", False)],
            "accuracy",
            ("share of items", "share"),
        ),
        ([("polite", "smiles", False), ("loss", "nats/token", False)], "loss", ("nats/token", "plain")),
        ([("params", "weights", True), ("polite", "smiles", False)], "polite", ("smiles", "plain")),
    ],
)
def test_a_gain_is_in_the_unit_of_the_quality(
    objectives: list[tuple[str, str, bool]], quality: str, gain: tuple[str, str]
) -> None:
    """Whether this version has a row for it or not."""
    parts = [{"name": n, "unit": unit, "known": known, "direction": "maximize"} for n, unit, known in objectives]
    assert quality_of(parts) == quality
    known = quantities(parts)
    assert (known["gain"]["unit"], known["gain"]["format"]) == gain and known["gain"]["maximize"]
    for name, unit, _ in objectives:
        assert known[name]["unit"] == unit and known[name]["maximize"]  # as the report says
    assert known[quality]["measured"]


COUNTING = [
    ("complete", True, {"kl": 0.1}, True),
    ("complete", True, {"kl": 0.1, "error": 0.01}, False),
    ("complete", True, {"kl": 0.1, "error": 0.0}, False),
    ("complete", False, {"kl": 0.1}, False),
    ("running", True, {}, False),
    ("failed", True, {}, False),
]


@pytest.mark.parametrize(("state", "feasible", "values", "expected"), COUNTING)
def test_a_trial_counts_for_the_search_as_for_the_page(
    state: str, feasible: bool, values: dict[str, float], expected: bool
) -> None:
    record = Trial(0, 0, (), "x", TrialState(state), values, feasible=feasible)
    stored = {"state": state, "feasible": feasible, "objectives": {"error": None, **values} if values else None}
    assert record.counts is expected and counting({"trials": [stored]}) == [expected]
    if feasible:  # the first reports did not say so
        assert counting({"trials": [{key: stored[key] for key in ("state", "objectives")}]}) == [expected]


# A counted and a measured objective that do not exist: the row, and the lines that work it out, in two files each.
HEADS = """
    "heads": ObjectiveKind(
        "query heads", "of all layers", format="count", integer=True, function="pruning.cost:heads"
    ),
"""
COUNT_HEADS = """

def heads(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor, serving: Serving) -> Tensor:
    return kv_groups.sum(-1) * anatomy.queries_per_group
"""
BITS = """
    "bits": ObjectiveKind("bits/token", "the loss in bits", measured=True, default=lambda dense: dense + 2),
"""


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    """The package with both, in a folder of its own."""
    for part in ("llmbo", "pruning", "prompts", "experiments/generated.py", "docs"):
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(exist_ok=True)
        copy(ROOT / part, tmp_path / part)
    for file, old, new in (
        ("llmbo/config/objectives.py", '\n    "flops": ', f'{HEADS}{BITS.lstrip(chr(10))}    "flops": '),
        ("pruning/cost.py", "\n\ndef kv_bytes(", f"{COUNT_HEADS}\n\ndef kv_bytes("),
        (
            "llmbo/problem/proxy.py",
            'return {**quality, "perplexity": ',
            'return {**quality, "bits": quality["loss"] / math.log(2), "perplexity": ',
        ),
    ):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    return tmp_path


def test_a_new_objective_takes_its_row_and_its_function(extended: Path, llmbo: Any) -> None:
    old, told = ROOT / "tests" / "llmbo" / "data" / "first_version" / "runs" / "tiny", llmbo.folder / "told.json"
    commands = {
        "search": llmbo.flags(budget=5, objectives="bits,heads", max="heads=14"),
        "table": ["report", "tiny", "--format", "csv"],
        "page": ["report", str(old), "--out", "old.html"],  # of before the objective
        "help": ["optimize", "--help"],
    }

    def in_the_copy() -> None:
        """All of it in a fork that knows nothing of this tree: what both take from elsewhere is imported already."""
        for name in list(sys.modules):
            if name.partition(".")[0] in ("experiments", "llmbo", "prompts", "pruning"):
                del sys.modules[name]
        sys.path.insert(0, str(extended))
        os.chdir(llmbo.folder)
        command_line: Any = importlib.import_module("llmbo.cli")
        assert command_line.__file__.startswith(str(extended))
        said = {}
        for what, words in commands.items():
            done = CliRunner(env={"COLUMNS": "400"}).invoke(command_line.app, words)
            assert done.exit_code == 0, done.output
            said[what] = done.stdout
        runpy.run_module("experiments.generated", run_name="__main__")
        told.write_text(json.dumps(said), encoding="utf-8")

    process = get_context("fork").Process(target=in_the_copy)
    process.start()
    process.join()
    assert process.exitcode == 0
    said, report = json.loads(told.read_text(encoding="utf-8")), llmbo.report()
    assert [part["unit"] for part in report["objectives"]] == ["bits/token", "query heads"]
    assert report["constraints"] == [{"name": "heads", "unit": "query heads", "maximum": 14.0, "known": True}]
    assert report["dense"]["objectives"]["heads"] == 16
    for trial in report["trials"]:
        values, groups = trial["objectives"], trial["architecture"]["kv_groups"]
        assert values["heads"] == 2 * sum(groups) <= 14 and isinstance(values["heads"], int)
        assert values["bits"] == pytest.approx(values["loss"] / math.log(2))
    assert all(point["heldout"]["bits"] > 0 for point in report["front"])
    data = page_data(llmbo.folder / "runs" / "tiny" / "report.html")
    assert data["quality"] == "bits" and data["quantities"]["bits"]["measured"]
    assert data["quantities"]["heads"] == {
        "unit": "query heads", "format": "count", "maximize": False, "measured": False, "brief": False,
    }  # fmt: skip
    assert "heads" in said["table"].splitlines()[0].split(",") and (llmbo.folder / "old.html").exists()
    assert "params_share, heads, flops" in said["help"] and "accuracy, bits" in said["help"]
    assert "| `heads` | query heads | counted | of all layers |" in (extended / "docs" / "objectives.md").read_text()
    fields = json.loads((extended / "docs" / "report.schema.json").read_text())["$defs"]["Values"]
    assert "heads" in fields["properties"] and "heads" not in fields["required"]
