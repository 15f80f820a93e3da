"""The report says what the store holds, in the documented format, whole or not at all."""

import csv
import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import optuna
import pytest
from rich.console import Console
from scipy.stats import ttest_1samp, ttest_rel

import llmbo
from llmbo.display.results import summary
from llmbo.report import Report, front_of, json_schema, write_report
from llmbo.report.picture import draw_front
from llmbo.report.table import as_csv, front_rows
from llmbo.run.judgement import noise
from llmbo.types import Proposal, Trial, TrialState
from pruning.importance import METHODS

FILES = ("report.json", "report.html", "front.png", "front.svg")


@pytest.fixture
def data(finished: Any) -> dict[str, Any]:
    return finished.report()


def test_a_report_follows_the_schema(data: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(json.loads(json_schema())).validate(data)
    assert Report.model_validate(data).model_dump(mode="json") == data


def test_the_memory_told_is_the_own_process_s_not_its_parent_s() -> None:
    """A child process inherits its parent's `ru_maxrss`: what is held here must not show up there."""
    tell = "from llmbo.report.machine import environment; print(environment()['peak_memory_bytes'])"
    parent = (
        "import subprocess, sys; held = b'1' * (5 << 28); "
        f"subprocess.run([sys.executable, '-c', {tell!r}], check=True); assert held"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    assert 2**22 < int(done.stdout) < 2**30


def test_an_unknown_or_missing_key_is_no_report(data: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(json.loads(json_schema()))
    assert not validator.is_valid({**data, "extra": 1})
    assert not validator.is_valid({key: value for key, value in data.items() if key != "front"})
    assert not validator.is_valid({**data, "schema_version": 3})


def test_the_front_is_the_non_dominated_trials_by_size(data: dict[str, Any]) -> None:
    trials = {trial["number"]: trial for trial in data["trials"] if trial["state"] == "complete"}
    values = {
        number: (trial["objectives"]["kl"], trial["objectives"]["params_share"]) for number, trial in trials.items()
    }
    best = {
        n for n, (a, b) in values.items() if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in values.values())
    }
    front = data["front"]
    assert {point["trial"] for point in front} == best
    sizes = [point["objectives"]["params"] for point in front]
    assert sizes == sorted(sizes)
    for point in front:
        assert point["objectives"] == trials[point["trial"]]["objectives"]
        assert point["architecture"] == trials[point["trial"]]["architecture"]


def test_the_trace_has_one_entry_for_each_complete_trial_and_never_falls(data: dict[str, Any]) -> None:
    trace = data["hypervolume"]["trace"]
    assert len(trace) == sum(trial["state"] == "complete" for trial in data["trials"])
    assert trace == sorted(trace) and data["hypervolume"]["final"] == trace[-1] > 0


def test_values_hang_together(data: dict[str, Any]) -> None:
    dense, space = data["dense"], data["space"]
    assert dense["trial"] is None and dense["objectives"]["params_share"] == 1
    assert dense["objectives"]["params"] == data["model"]["params"]
    for point in [dense, *data["front"], *data["trials"]]:
        for values in (point["objectives"], point.get("heldout")):
            if values is not None:
                assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
                assert values["params_share"] == pytest.approx(
                    1 - (data["model"]["params"] - values["params"]) / data["model"]["block_params"]
                )
        assert (
            len(point["architecture"]["kv_groups"]) == len(point["architecture"]["neurons"]) == space["dimensions"] / 2
        )
        assert set(point["architecture"]["kv_groups"]) <= set(space["kv_group_levels"])
        assert set(point["architecture"]["neurons"]) <= set(space["neuron_levels"])
        assert point["objectives"]["params_share"] >= space["min_share"]
    assert all(point["heldout"] is not None for point in [dense, *data["front"]])
    assert all(point["heldout"]["params"] == point["objectives"]["params"] for point in data["front"])
    assert any(point["heldout"]["loss"] != point["objectives"]["loss"] for point in data["front"])


def test_points_of_the_front_tell_how_sure_they_are(data: dict[str, Any], finished: Any) -> None:
    """As SciPy finds it from the windows that the run has kept, whose means are the held-out values."""
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{finished.folder / 'runs' / 'tiny' / 'study.db'}")
    digest = data["elsewhere"]["digest"]

    def kept(kind: str) -> dict[str, Any]:
        return {
            key.removeprefix(kind): value["windows"] for key, value in study.user_attrs.items() if key.startswith(kind)
        }

    windows, far = kept("heldout:"), kept(f"elsewhere:{digest}:")
    assert windows.keys() == {"dense", *(str(point["trial"]) for point in data["front"])}
    doubtful = 0
    for place, point in enumerate(data["front"]):
        noise, own = point["noise"], windows[str(point["trial"])]
        assert noise["windows"] == len(own["kl"]) == 4 and noise["by"] == "kl"
        above = [loss - dense for loss, dense in zip(own["loss"], windows["dense"]["loss"], strict=True)]
        for name, cost in (("kl", own["kl"]), ("loss", above)):
            assert point["heldout"][name] == pytest.approx(sum(own[name]) / 4, rel=1e-9)
            interval = ttest_1samp(cost, 0).confidence_interval(0.95)
            assert noise[name] == pytest.approx((interval.high - interval.low) / 2)
        smaller = [other["trial"] for other in data["front"][:place]]
        sure = [ttest_rel(own["kl"], windows[str(n)]["kl"], alternative="less").pvalue < 0.025 for n in smaller]
        assert noise["not_better_than"] == [n for n, better in zip(smaller, sure, strict=True) if not better]
        doubtful += len(noise["not_better_than"])
    run = llmbo.load_run(finished.folder / "runs" / "tiny")
    frame, runs = run.to_dataframe(), [("tiny", data)]
    rows = {row["number"]: row for row in csv.DictReader(io.StringIO(as_csv(runs, ["tiny"])))}
    headings, shown = front_rows(runs, ["tiny"])
    for point, cells in zip(data["front"], shown, strict=False):
        number, alike = point["trial"], " ".join(map(str, point["noise"]["not_better_than"]))
        assert frame.loc[number, "noise_loss"] == float(rows[str(number)]["noise_loss"]) == point["noise"]["loss"]
        assert rows[str(number)]["noise_not_better_than"] == cells[headings.index("not surely better than")] == alike
        assert cells[headings.index("± held-out kl on words.txt")] == f"{point['noise']['kl']:.4g}"
    judged = [point for point in data["front"] if point["elsewhere"]]
    assert 2 < len(judged) < len(data["front"]) and far.keys() == {"dense", *(str(point["trial"]) for point in judged)}
    assert not any(point["noise_elsewhere"] for point in data["front"] if not point["elsewhere"])
    for place, point in enumerate(judged):
        noise, own = point["noise_elsewhere"], far[str(point["trial"])]["kl"]
        interval = ttest_1samp(own, 0).confidence_interval(0.95)
        assert noise["kl"] == pytest.approx((interval.high - interval.low) / 2) and noise["kl"] != point["noise"]["kl"]
        assert point["elsewhere"]["kl"] == pytest.approx(sum(own) / len(own), rel=1e-9)
        assert set(noise["not_better_than"]) <= {smaller["trial"] for smaller in judged[:place]}
        row, cells = rows[str(point["trial"])], shown[data["front"].index(point)]
        assert float(row["noise_elsewhere_kl"]) == frame.loc[point["trial"], "noise_elsewhere_kl"] == noise["kl"]
        assert cells[headings.index("± held-out kl on python")] == f"{noise['kl']:.4g}"
    pairs = len(data["front"]) * (len(data["front"]) - 1) // 2
    assert 0 < doubtful < pairs and data["dense"]["noise"] is None


def test_points_are_told_apart_by_the_loss_that_was_searched_for_and_one_window_tells_nothing(toy: Any) -> None:
    rows = toy.random_points(6, 0)
    front = sorted(toy.trials(rows), key=lambda trial: trial.values["params"])
    windows: dict[int | None, Any] = {None: {"kl": [0.0, 0.0, 0.0], "loss": [3.0, 2.0, 4.0]}}
    for place, trial in enumerate(front):  # the loss falls with size and says little, kl rises and is sure
        kl, loss = [1.0 + place] * 3, [3.0 - place / 9, 2.0 + place, 4.0 - place]
        windows[trial.number] = {"kl": kl, "loss": loss}
    found = noise(front, windows, toy.with_objectives("loss", "params_share").objectives)
    assert list(found) == [trial.number for trial in front] and {part["by"] for part in found.values()} == {"loss"}
    last = found[front[-1].number]
    assert last["not_better_than"] == [trial.number for trial in front[:-1]] and last["kl"] == 0 < last["loss"]
    for place, trial in enumerate(front):
        windows[trial.number]["kl"] = [6.0 - place, 6.1 - place, 5.9 - place]
    by_kl = noise(front, windows, toy.objectives)
    assert not any(part["not_better_than"] for part in by_kl.values())
    kept = {key: value for key, value in windows.items() if key != front[2].number}  # an earlier version kept none
    assert noise(front, kept, toy.objectives).keys() == {*by_kl} - {front[2].number}
    alone = {key: {name: values[:1] for name, values in part.items()} for key, part in windows.items()}
    assert noise(front, alone, toy.objectives) == noise(front, {}, toy.objectives) == {}


def test_the_terminal_says_which_neighbours_may_be_alike(data: dict[str, Any]) -> None:
    report = Report.model_validate(data)
    Console(file=(screen := io.StringIO()), width=80).print(summary(report, rows=100))
    shown = screen.getvalue()
    assert max(map(len, shown.splitlines())) <= 80
    marked = {int(word[1:]) for word in shown.split() if word.startswith("~") and word[1:].isdigit()}
    rows = [point for point in data["front"] if len(data["front"]) <= 100 or point["elsewhere"]]
    expected = {b["trial"] for a, b in pairwise(rows) if a["trial"] in b["noise"]["not_better_than"]}
    assert marked == expected != set() and len(expected) < len(rows)
    for point in data["front"]:
        assert f"{point['heldout']['kl']:.3f} ±{point['noise']['kl']:.3f}" in shown
    assert f"{len(expected)} of {len(rows) - 1}" in " ".join(shown.split())


def test_the_run_is_described(data: dict[str, Any], finished: Any) -> None:
    run = data["run"]
    assert run["status"] == "complete" and run["dtype"] == "float32" and run["device"] == "cpu" and run["seed"] == 0
    assert run["settings"]["budget"] == len(data["trials"]) == 18
    assert {"python", "llmbo", "torch", "transformers", "botorch", "optuna"} <= set(run["versions"])
    assert run["seconds"]["search"] > 0 and run["peak_memory_bytes"] > 50e6
    assert [data["data"][part]["tokens"] for part in ("calibration", "proxy", "heldout")] == [128, 64, 64]
    assert data["data"]["window"] == 16 and data["data"]["available_tokens"] == 1200
    assert {trial["origin"] for trial in data["trials"]} == {"threshold", "qnehvi"}


def test_front_of_leaves_out_failed_and_running_trials(toy: Any) -> None:
    trials = toy.trials(toy.random_points(10, 0))
    better = {name: value / 2 for name, value in toy.evaluate(toy.family.at(0.0)).items()}
    unfinished = [
        Trial(10, 2, toy.family.at(0.0), "x", TrialState.FAILED, better),
        toy.trial(11, Proposal(toy.family.at(0.5), "x"), 2, TrialState.RUNNING),
    ]
    assert front_of([*trials, *unfinished], toy.objectives) == front_of(trials, toy.objectives) != []
    assert front_of([], toy.objectives) == []


def test_the_picture_is_a_png(finished: Any) -> None:
    picture = (finished.folder / "runs" / "tiny" / "front.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[-8:-4] == b"IEND"


def test_a_write_that_fails_half_way_leaves_the_old_report(
    data: dict[str, Any], tmp_path: Path, files_at_most: Callable[[int], AbstractContextManager[None]]
) -> None:
    report = Report.model_validate(data)
    write_report(report, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    changed = report.model_copy(update={"front": report.front[:1]})
    with files_at_most(1000), pytest.raises(OSError):
        write_report(changed, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    write_report(changed, tmp_path)
    assert len(Report.model_validate_json((tmp_path / "report.json").read_text()).front) == 1
    assert {path.name for path in tmp_path.iterdir()} == set(before)  # no temporary file is left


@pytest.mark.usefixtures("whole_pictures")
def test_a_report_without_trials_can_be_written(data: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted before the first trial was finished."""
    report = Report.model_validate(data)
    empty = report.model_copy(
        update={
            "trials": [],
            "front": [],
            "hypervolume": report.hypervolume.model_copy(update={"final": 0.0, "trace": []}),
        }
    )
    write_report(empty, tmp_path)
    assert (tmp_path / "front.png").stat().st_size > 1000


def test_members_of_the_family_gain_nothing_over_it(data: dict[str, Any]) -> None:
    gains = {trial["number"]: trial["gain"] for trial in data["trials"]}
    family = [trial["number"] for trial in data["trials"] if trial["origin"] == "threshold"]
    assert [gains[number] for number in family] == pytest.approx([0.0] * len(family), abs=1e-9)
    assert any(gains[number] for number in gains if number not in family)


def test_importance_has_every_method_and_layer(data: dict[str, Any]) -> None:
    rows = {(part["method"], part["kind"]): part["scores"] for part in data["importance"]}
    assert {method for method, _ in rows} == {*METHODS, "block_influence"} and ("block_influence", "layer") in rows
    assert all(len(scores) == data["model"]["num_hidden_layers"] for scores in rows.values())
    assert all(score > -1e-6 for scores in rows.values() for score in scores)


@pytest.mark.usefixtures("whole_pictures")
def test_the_same_report_gives_the_same_pictures(data: dict[str, Any]) -> None:
    report = Report.model_validate(data)
    pictures = draw_front(report)
    assert pictures == draw_front(report)
    svg = pictures["front.svg"].decode()
    assert ElementTree.fromstring(svg).tag.endswith("svg") and "dense model" in svg
    hostile = report.model_copy(update={"model": report.model.model_copy(update={"name": "<b>$x$</b>"})})
    assert "&lt;b&gt;$x$&lt;/b&gt;" in draw_front(hostile)["front.svg"].decode()
