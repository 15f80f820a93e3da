"""`llmbo compare` on a tiny llama: what it writes, that it goes on where it stopped, that it is fair, what it refuses."""

import hashlib
import json
import math
import random
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from experiments.advice import __main__ as advice
from llmbo.advisor.store import read_jsonl
from llmbo.cli import app
from llmbo.comparison import session
from llmbo.comparison.arms import log_kl_by_size
from llmbo.comparison.config import Arm, CompareConfig, ProblemConfig, read_config
from llmbo.comparison.problems import OpenProblem, judged_objectives
from llmbo.comparison.runner import check_designs, run_arm
from llmbo.comparison.schema import HELDOUT, SIZES, Comparison
from llmbo.comparison.session import arm_key
from llmbo.comparison.statistics import LEVEL
from llmbo.comparison.store import Evaluation, EvaluationStore, Round
from llmbo.comparison.strategies import COMPARED, strategy_of
from llmbo.config import RunConfig
from llmbo.errors import StrategyError
from llmbo.problem.objectives import Objective, build_objectives, ref_point, to_maximize
from llmbo.search.pareto import hypervolume
from llmbo.search.strategies import ProposerFactory
from llmbo.types import Proposal, Source, Trial
from pruning.errors import UnreadableText

# Every setting that counted when rounds were first stored under what they are made from.
FIRST_KEYED = [
    "budget", "batch", "seed", "strategy", "objectives", "reference_point", "maximum", "context", "serve_batch", "latency_target",
    "racing", "compensation", "min_share", "neuron_step", "calibration_tokens", "proxy_tokens", "heldout_tokens", "window",
    "dtype", "device", "advisor", "advisor_hooks", "advisor_share", "advisor_context", "advisor_every", "advisor_max_calls",
    "advisor_max_tokens", "advisor_max_cost", "advisor_max_seconds", "advisor_deadline", "advisor_price",
]  # fmt: skip
CONFIGS = Path(__file__).parents[3] / "experiments" / "configs"
STRATEGIES = (
    '["threshold", "random", "nsga2-seeded", {strategy = "nsga2-seeded", label = "small population", population = 4}]'
)
TOP = {"strategies": STRATEGIES, "seeds": "[0, 1]", "checkpoints": "[12, 16]", "judged_points": "6"}


@dataclass(frozen=True)
class Compare:
    """`llmbo compare` in this process, on a config that is written for the purpose."""

    folder: Path
    problem: dict[str, str]

    def write(self, top: dict[str, str] | None = None, problem: dict[str, str] | None = None) -> Path:
        def lines(table: dict[str, str]) -> str:
            return "".join(f"{key} = {value}\n" for key, value in table.items())

        path = self.folder / "tiny.toml"
        body = lines({**TOP, **(top or {})}) + "[problem]\n" + lines({**self.problem, **(problem or {})})
        path.write_text(body, encoding="utf-8")
        return path

    def __call__(self, *flags: str, top: dict[str, str] | None = None, problem: dict[str, str] | None = None) -> Result:
        path = self.write(top, problem)
        before = signal.getsignal(signal.SIGTERM)
        try:
            with chdir(self.folder):
                return CliRunner().invoke(app, ["compare", str(path), *flags])
        finally:
            signal.signal(signal.SIGTERM, before)

    def result(self, out: str = "comparisons/tiny") -> dict[str, Any]:
        return json.loads((self.folder / out / "comparison.json").read_text(encoding="utf-8"))

    def count(self, table: str) -> int:
        with sqlite3.connect(self.folder / "comparisons" / "evaluations.db") as connection:
            return int(connection.execute(f"select count(*) from {table}").fetchone()[0])


def tiny_problem(model_folder: Path, text_file: Path) -> dict[str, str]:
    return {
        "model": f'"{model_folder}"', "text": f'"text:{text_file}"', "window": "16", "calibration_tokens": "128",
        "proxy_tokens": "64", "heldout_tokens": "64", "dtype": '"float32"', "device": '"cpu"', "reference_point": "[5.0, 1.0]",
    }  # fmt: skip


@pytest.fixture
def compare(tmp_path: Path, model_folder: Path, text_file: Path) -> Compare:
    return Compare(tmp_path, tiny_problem(model_folder, text_file))


@pytest.fixture(scope="session")
def compared(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Compare:
    """A finished comparison. Read it only."""
    done = Compare(tmp_path_factory.mktemp("compared"), tiny_problem(model_folder, text_file))
    answer = done()
    assert answer.exit_code == 0, answer.output
    return done


def test_rounds_that_were_stored_before_there_was_a_setting_are_found() -> None:
    """Also before those to come: what a new setting meant until then belongs into `EARLIER`."""

    def key(**settings: Any) -> str:
        return arm_key(replace(arm, problem=ProblemConfig(replace(run, **settings))), 3, config, problem)

    run = RunConfig("tiny", calibration_tokens=1024, recipe="dense-prices", neuron_multiple=32)
    arm = Arm("mine", "random", {"num_initial": 4}, ProblemConfig(run))
    config, problem = Mock(batch=2), Mock(identity="0123", space=Mock(query_heads=False))
    what = ["random", {"num_initial": 4}, {name: getattr(run, name) for name in FIRST_KEYED}, 2, "0123"]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    assert key() == f"mine/3/{digest}" == key(memory="24GB", offload="disk", model="elsewhere")
    assert len({key(), key(chat=True), key(window=64), key(compensation=False)}) == 4


def test_a_text_that_cannot_be_read_is_told_before_the_first_problem_is_opened(tmp_path: Path) -> None:
    arms = [
        Arm("mine", "random", {}, ProblemConfig(RunConfig("no-model", text=text)))
        for text in ("builtin", "text:gone.txt")
    ]
    config = Mock(arms=arms)
    config.name = "it"
    with pytest.raises(UnreadableText, match=r"gone\.txt"):
        session.compare(config, tmp_path / "out", tmp_path / "cache.db", False, Mock(), print)


def without_clocks(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in ("environment", "summaries")}
    timed = ("seconds", "proposal_seconds")
    return {**kept, "arms": [{k: v for k, v in arm.items() if k not in timed} for arm in result["arms"]]}


def test_the_result_holds_what_was_asked_for(compared: Compare) -> None:
    result = compared.result()
    Comparison.model_validate(result)
    assert result["status"] == "complete"
    labels = ["threshold", "random", "nsga2-seeded", "small population"]
    assert [(arm["label"], arm["seed"]) for arm in result["arms"]] == [
        (label, seed) for seed in (0, 1) for label in labels
    ]
    for arm in result["arms"]:
        assert len(arm["trials"]) == len(arm["trace"]) == len(arm["seconds"]) == 16
        assert arm["trace"] == sorted(arm["trace"]) and arm["seconds"] == sorted(arm["seconds"])
        for point in arm["checkpoints"]:
            assert point["hypervolume"] == pytest.approx(arm["trace"][point["evaluations"] - 1], abs=1e-6)
            assert point["heldout_hypervolume"] > 0 and len(point["points"]) <= 6
    assert {(reach["label"], reach["baseline"]) for reach in result["reach"]} == {
        (a, b) for a in labels for b in labels if a != b
    }


def test_strategies_with_the_same_design_start_alike(compared: Compare) -> None:
    starts = {arm["label"]: [trial["digest"] for trial in arm["trials"][:12]] for arm in compared.result()["arms"]}
    assert starts["threshold"] == starts["nsga2-seeded"] == starts["small population"] != starts["random"]


def test_means_and_tests_follow_from_the_arms(compared: Compare) -> None:
    result = compared.result()
    finals = {
        label: [arm["trace"][-1] for arm in result["arms"] if arm["label"] == label]
        for label in ("threshold", "random")
    }
    summary = next(s for s in result["summaries"] if s["label"] == "random")["checkpoints"]["16"]["hypervolume"]
    assert summary["mean"] == pytest.approx(sum(finals["random"]) / 2, abs=1e-6)
    assert summary["low"] <= summary["mean"] <= summary["high"]
    test = next(
        t for t in result["tests"] if (t["label"], t["metric"], t["evaluations"]) == ("random", "hypervolume", 16)
    )
    assert result["method"] == "threshold"
    assert test["difference"]["mean"] == pytest.approx((sum(finals["threshold"]) - sum(finals["random"])) / 2, abs=1e-6)


def test_kl_at_equal_size_follows_from_the_fronts(compared: Compare) -> None:
    """By nothing but the trials' own values; what is told on the page is percent of KL."""
    result = compared.result()

    def curve(arm: dict[str, Any]) -> np.ndarray:
        sizes, kls = np.array([(t["values"]["params_share"], t["values"]["kl"]) for t in arm["trials"]]).T
        return np.array([np.log(kls[sizes <= size].min()) if (sizes <= size).any() else np.nan for size in SIZES])

    def of(label: str) -> list[np.ndarray]:
        return [curve(arm) for arm in result["arms"] if arm["label"] == label]

    pairs = zip(of("threshold"), of("random"), strict=True)
    differences = [np.nanmean(other - ours) for ours, other in pairs]
    tests = {(t["label"], t["metric"], t["evaluations"]): t["difference"] for t in result["tests"]}
    found = tests["random", "log_kl", 16]
    assert found["mean"] == pytest.approx(np.mean(differences), abs=1e-5) and found["low"] < found["mean"]
    page = (compared.folder / "comparisons" / "tiny" / "comparison.html").read_text(encoding="utf-8")
    assert f">{100 * math.expm1(-found['mean']):+.1f} %<" in page
    heldout = tests["random", "heldout_log_kl", 16]["mean"]
    assert (
        f"{100 * math.expm1(heldout):+.1f} %" in compared().output and abs(heldout) > 0.01
    )  # random's, by the family's


def test_kl_by_size_is_that_of_the_best_model_that_fits() -> None:
    points = [(0.8, 0.1), (0.5, 0.7), (1.0, 0.0), (0.9, None), (0.66, 0.3), (0.7, 0.5)]
    found = dict(zip(SIZES, log_kl_by_size(points), strict=True))
    assert found[0.48] is None and found[0.02] is None
    assert {size: math.exp(found[size] or 0) for size in (0.5, 0.64, 0.66, 0.78, 0.8, 0.98)} == pytest.approx(
        {0.5: 0.7, 0.64: 0.7, 0.66: 0.3, 0.78: 0.3, 0.8: 0.1, 0.98: 0.1}, abs=1e-5
    )
    assert log_kl_by_size([(1.0, 0.0), (0.5, None)]) == []


def test_nobody_dominates_the_union_front(compared: Compare) -> None:
    result = compared.result()
    front = [(p["values"]["kl"], p["values"]["params_share"]) for p in result["union_front"]]
    trials = [t["values"] for arm in result["arms"] for t in arm["trials"]]
    for kl, share in front:
        assert not any(
            t["kl"] <= kl and t["params_share"] <= share and (t["kl"] < kl or t["params_share"] < share) for t in trials
        )
    assert len(front) == len(set(front)) and any(p["heldout"] for p in result["union_front"])
    for arm in result["arms"]:  # what no arm was judged by is not measured for the union's sake
        judged = {number for checkpoint in arm["checkpoints"] for number in checkpoint["points"]}
        digests = {trial["digest"] for trial in arm["trials"] if trial["number"] in judged}
        assert all(p["heldout"] for p in result["union_front"] if p["digest"] in digests)


def test_the_page_is_one_file_that_names_everybody(compared: Compare) -> None:
    page = (compared.folder / "comparisons" / "tiny" / "comparison.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert f" {100 * LEVEL:.0f} % " in page  # how sure the bands are said to be
    assert not any(word in page for word in ("<script", "src=", "@import", "url(http"))
    assert all(label in page for label in ("threshold", "random", "nsga2-seeded", "small population"))


def test_evaluations_are_shared_and_a_finished_comparison_costs_none(compared: Compare) -> None:
    evaluations, expected = compared.count("evaluations"), compared.result()
    trials = {trial["digest"] for arm in expected["arms"] for trial in arm["trials"]}
    with sqlite3.connect(compared.folder / "comparisons" / "evaluations.db") as connection:
        rows = connection.execute("select evaluator, count(*) from evaluations group by evaluator").fetchall()
    assert (
        len(rows) == 2 and max(count for _, count in rows) <= len(trials) + 14
    )  # the family's curve beside the trials
    assert compared().exit_code == 0
    assert compared.count("evaluations") == evaluations
    assert without_clocks(compared.result()) == without_clocks(expected)


def test_a_killed_comparison_goes_on_and_loses_one_evaluation_at_most(
    compare: Compare, compared: Compare, forked: Any
) -> None:
    process = forked(["compare", str(compare.write())], compare.folder)
    database = compare.folder / "comparisons" / "evaluations.db"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.running:
            if database.exists() and _rows(database) > 25:
                break
            time.sleep(0.02)
    finally:
        process.kill()
    before = compare.count("evaluations")
    assert before > 25
    assert compare().exit_code == 0
    assert compare.count("evaluations") == compared.count("evaluations")
    assert without_clocks(compare.result())["arms"] == without_clocks(compared.result())["arms"]


def _rows(database: Path) -> int:
    try:
        with sqlite3.connect(database) as connection:
            return int(connection.execute("select count(*) from evaluations").fetchone()[0])
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize("strategy", ["nsga2-seeded", "nsga2-recipes"])
def test_more_evaluations_extend_a_comparison(compare: Compare, strategy: str) -> None:
    few = {"strategies": f'["{strategy}"]', "seeds": "[3]", "judged_points": "0"}

    def go(*args: str, checkpoints: str) -> None:
        done = compare(*args, top={**few, "checkpoints": checkpoints}, problem={"recipe_search": "true"})
        assert done.exit_code == 0, done.output

    go(checkpoints="[13]")
    (short,) = compare.result()["arms"]
    go(checkpoints="[12, 18]")
    (long,) = compare.result()["arms"]
    go("--out", "anew", "--fresh", checkpoints="[12, 18]")
    (anew,) = compare.result("anew")["arms"]
    digests = [[trial["digest"] for trial in arm["trials"]] for arm in (short, long, anew)]
    assert digests[0] == digests[1][:13] and digests[1] == digests[2]
    assert all(point["heldout_hypervolume"] is None for point in long["checkpoints"])


def test_rounds_keep_what_trials_are_told_and_those_of_earlier_versions_are_read(tmp_path: Path) -> None:
    found = Proposal((1, 2), "nsga2", recipe={"mlp_slope": 0.3}, predicted=(0.1, 0.02))
    made = Round((found, Proposal((1, 1), "threshold", source=Source.PATH)), 1.5)
    with EvaluationStore.open(tmp_path / "store.db") as store:
        store.add_round("toy", "arm", 0, made)
        assert store.rounds("toy", "arm") == [made]
    with sqlite3.connect(tmp_path / "store.db") as connection:
        connection.execute("update rounds set proposals = ?", ['[[[1, 1], "threshold"], [[1, 2], "nsga2", "search"]]'])
    with EvaluationStore.open(tmp_path / "store.db") as store:
        [earlier] = store.rounds("toy", "arm")
    assert earlier.proposals == (made.proposals[1], replace(found, recipe={}, predicted=None))


def test_a_changed_problem_is_judged_on_the_same_held_out_windows(compare: Compare) -> None:
    arms = '["threshold", {strategy = "threshold", label = "more proxy", proxy_tokens = 96}]'
    answer = compare(top={"strategies": arms, "seeds": "[0]", "checkpoints": "[4]", "judged_points": "4"})
    assert answer.exit_code == 0, answer.output
    result = compare.result()
    assert [summary["comparable"] for summary in result["summaries"]] == [True, False]
    with sqlite3.connect(compare.folder / "comparisons" / "evaluations.db") as connection:
        evaluators = connection.execute("select count(distinct evaluator) from evaluations").fetchone()[0]
    assert evaluators == 3  # two proxies, one judge
    assert {test["metric"] for test in result["tests"]} == {"heldout_hypervolume", "heldout_log_kl"}
    assert "+0.0 %" in answer.output  # the same members


KNOWN = {"params_share": 0.4, "flops": 4.0e6, "kv_bytes": 200.0}  # of the smallest model
DENSE = {"loss": 3.0, "kl": 0.0, "params_share": 1.0, "flops": 1.0e7, "kv_bytes": 1000.0}


@pytest.mark.parametrize(
    ("searched", "costs"),
    [
        (("kl", "params_share"), ["params_share"]),
        (("params_share", "loss"), ["params_share"]),
        (("kl", "flops", "kv_bytes"), ["flops", "kv_bytes"]),
        (("kl", "loss", "kv_bytes"), ["kv_bytes"]),
    ],
)
def test_fronts_are_judged_by_loss_and_the_costs_that_were_searched(
    searched: tuple[str, ...], costs: list[str]
) -> None:
    """Where that is the parameter share: as comparisons have always been, reference points included."""
    judged = judged_objectives(searched, DENSE, KNOWN, 0.5)
    assert list(judged) == ["loss"] and [axis.name for axis in judged["loss"]] == ["loss", *costs]
    assert [axis.reference for axis in judged["loss"]] == [3.5, *(DENSE[name] for name in costs)]
    if costs == ["params_share"]:
        assert judged["loss"] == build_objectives(("loss", "params_share"), DENSE, KNOWN, (3.5, 1.0))


def test_a_search_for_accuracy_is_judged_by_held_out_items_too() -> None:
    judged = judged_objectives(("accuracy", "params_share"), DENSE | {"accuracy": 0.5}, KNOWN, 0.5)
    assert {quality: [axis.name for axis in axes] for quality, axes in judged.items()} == {
        "loss": ["loss", "params_share"],
        "accuracy": ["accuracy", "params_share"],
    }
    assert judged["accuracy"][0].reference == 0.25 and judged["accuracy"][0].maximize
    assert list(judged_objectives(("accuracy", "params_share"), DENSE | {"accuracy": 0.0}, KNOWN, 0.5)) == ["loss"]


def heldout_volumes(compare: Compare, result: dict[str, Any], quality: str) -> list[tuple[float, float]]:
    """Held-out hypervolume of every arm at the end, as stored and as it follows from the evaluations in the cache."""
    axes = [Objective(**axis) for axis in result["judged"][quality]]
    with sqlite3.connect(compare.folder / "comparisons" / "evaluations.db") as connection:
        rows = connection.execute("select evaluator, digest, measured from evaluations").fetchall()
    metric = next(metric for metric, name in HELDOUT.items() if name == quality)
    found = []
    for arm in result["arms"]:
        trials = {trial["number"]: trial for trial in arm["trials"]}
        shown = [trials[number] for number in arm["checkpoints"][-1]["points"]]
        values = [
            json.loads(measured)
            for trial in shown
            for _, digest, measured in rows
            if digest == trial["digest"] and json.loads(measured)["loss"] != trial["values"]["loss"]
        ]
        assert len(values) == len(shown) > 0
        found.append((arm["checkpoints"][-1][metric], hypervolume(to_maximize(values, axes), ref_point(axes))))
    return found


def test_a_search_for_two_costs_is_judged_by_both_on_held_out_windows(compare: Compare) -> None:
    problem = {"objectives": '["kl", "flops", "kv_bytes"]', "reference_point": "[5.0, 1e12, 1e12]", "context": "64"}
    top = {"strategies": '["threshold", "random"]', "seeds": "[0]", "checkpoints": "[12]", "judged_points": "6"}
    answer = compare(top=top, problem=problem)
    assert answer.exit_code == 0, answer.output
    result = compare.result()
    assert [axis["name"] for axis in result["judged"]["loss"]] == ["loss", "flops", "kv_bytes"]
    for stored, counted in heldout_volumes(compare, result, "loss"):
        assert stored == pytest.approx(counted) and stored > 1000  # of bytes, not of shares
    page = (compare.folder / "comparisons" / "tiny" / "comparison.html").read_text(encoding="utf-8")
    assert re.search(r"held-out of loss \(reference [^)]*\), flops \(reference [^)]*\), kv_bytes \(reference", page)
    longer = {**problem, "context": "128"}  # the cache knows these models, and costs of another context
    assert compare("--out", "longer", top=top, problem=longer).exit_code == 0
    for before, after in zip(result["arms"], compare.result("longer")["arms"], strict=True):
        assert before["trials"][0]["digest"] == after["trials"][0]["digest"]
        assert 2 * before["trials"][0]["values"]["kv_bytes"] == after["trials"][0]["values"]["kv_bytes"]


def test_a_search_for_accuracy_shows_it_on_items_that_it_did_not_see(compare: Compare) -> None:
    rng = random.Random(0)
    rows = [
        {"question": f"w{i} w{2 * i}", "choices": [f"w{rng.randrange(60)}" for _ in range(3)], "answer": i % 3}
        for i in range(40)
    ]
    (compare.folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    problem = {
        "objectives": '["accuracy", "params_share"]',
        "reference_point": "[0.01, 1.0]",
        "items": '"items.jsonl"',
    }
    top = {"strategies": '["threshold", "random"]', "seeds": "[0]", "checkpoints": "[12]", "judged_points": "6"}
    answer = compare(top=top, problem=problem)
    assert answer.exit_code == 0, answer.output
    result = compare.result()
    for quality in ("loss", "accuracy"):
        for stored, counted in heldout_volumes(compare, result, quality):
            assert stored == pytest.approx(counted)
    assert {test["metric"] for test in result["tests"]} == {"hypervolume", *HELDOUT, "log_kl", "heldout_log_kl"}
    page = (compare.folder / "comparisons" / "tiny" / "comparison.html").read_text(encoding="utf-8")
    assert "held-out items of accuracy (reference" in page and "<th>held-out items, 12</th>" in page


@pytest.mark.parametrize(
    ("top", "problem", "words"),
    [
        ({"strategies": '["nsga"]'}, {}, ["Unknown strategy 'nsga'", "nsga2"]),
        ({"strategies": "[]"}, {}, ["strategies is empty"]),
        ({"seeds": "[]"}, {}, ["seeds is empty"]),
        ({"seeds": "[1, 1]"}, {}, ["different"]),
        ({"seeds": '"one"'}, {}, ["seeds", "'one'"]),
        ({"checkpoint": "[20]"}, {}, ["'checkpoint'", "checkpoints"]),
        ({"checkpoints": "[8, 16]"}, {}, ["8", "initial design", "12"]),
        ({"checkpoints": "[16, 12]"}, {}, ["increasing"]),
        ({"strategies": '[{strategy = "nsga2", popluation = 4}]'}, {}, ["popluation", "population"]),
        ({"strategies": '[{strategy = "nsga2", population = "many"}]'}, {}, ["population", "'many'"]),
        ({"strategies": '["random", "random"]'}, {}, ["'random'", "label"]),
        ({"method": '"qnehvi"'}, {}, ["Unknown method 'qnehvi'"]),
        ({"strategies": '["random", "nsga2-recipes"]'}, {}, ["nsga2-recipes", "recipe_search = true"]),
        ({}, {"min_shar": "0.4"}, ["min_shar", "min_share"]),
        ({}, {"min_share": '"half"'}, ["min_share", "'half'"]),
        ({}, {"min_share": "1.5"}, ["1.5"]),
        ({}, {"budget": "10"}, ["budget"]),
        ({}, {"text": '"text:/nowhere"'}, ["/nowhere"]),
        ({}, {"reference_point": "[0.0, 1.0]"}, ["reference"]),
        ({"strategies": '["random"'}, {}, ["TOML"]),
        (
            {"strategies": '["threshold", {strategy = "threshold", label = "far", context = 512}]'},
            {"objectives": '["kl", "kv_bytes"]', "reference_point": "[5.0, 1e12]"},
            ["kv_bytes", "far", "512", "judged_points"],
        ),
        (
            {"strategies": '["threshold", {strategy = "threshold", label = "slow", objectives = ["kl", "flops"]}]'},
            {"objectives": '["kl", "decode_latency"]', "reference_point": "[5.0, 1e12]"},
            ["decode_latency", "slow", "judged_points"],
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    compare: Compare, top: dict[str, str], problem: dict[str, str], words: Sequence[str]
) -> None:
    answer = compare(top=top, problem=problem)
    assert answer.exit_code == 2
    line = answer.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), line
    assert not (compare.folder / "comparisons" / "tiny" / "comparison.json").exists()


@pytest.mark.parametrize(
    ("flags", "word"),
    [(["--problem", "nowhere"], "nowhere"), (["--seeds", "a"], "'a'"), (["--out", "/dev/null/x"], "/dev/null/x")],
)
def test_bad_flags_are_one_line(compare: Compare, flags: list[str], word: str) -> None:
    answer = compare(*flags)
    assert answer.exit_code == 2 and word in answer.stderr.strip().splitlines()[-1]
    assert "Traceback" not in answer.output


def test_a_cache_of_other_code_is_refused(compare: Compare) -> None:
    few = {"strategies": '["threshold"]', "seeds": "[0]", "checkpoints": "[2]", "judged_points": "0"}
    assert compare(top=few).exit_code == 0
    with sqlite3.connect(compare.folder / "comparisons" / "evaluations.db") as connection:
        for rowid, measured in connection.execute("select rowid, measured from evaluations").fetchall():
            values = {name: 1.1 * value for name, value in json.loads(measured).items()}
            connection.execute("update evaluations set measured = ? where rowid = ?", (json.dumps(values), rowid))
    answer = compare(top=few)
    assert answer.exit_code == 2 and "--cache" in answer.stderr


class Scripted:
    """Proposes what it is told, whatever it is asked."""

    def __init__(self, *rounds: Sequence[tuple[int, ...]]) -> None:
        self._rounds = list(rounds)

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        return [Proposal(x, "scripted") for x in self._rounds.pop(0)]


class Silent:
    def on_evaluation(self, arm: Arm, seed: int, done: int) -> None: ...

    def on_outcome(self, outcome: object) -> None: ...

    def note(self, text: str) -> None: ...


@pytest.fixture
def run(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs scripted proposals, or a strategy of the table, on the toy."""
    problem = ProblemConfig(RunConfig("toy"))
    config = CompareConfig("toy", (), (0,), (6,), 3, 0, 1.0, "toy")

    def measure(x: tuple[int, ...], origin: str) -> Evaluation:
        return Evaluation(toy.evaluate(x), 1.0)

    def go(*rounds: Sequence[tuple[int, ...]], label: str = "scripted") -> Any:
        monkeypatch.setattr(ProposerFactory, "build", lambda *parts: Scripted(*rounds))
        opened = OpenProblem(toy, toy.objectives, measure, None, {}, {}, "toy")
        with EvaluationStore.open(tmp_path / "store.db") as store:
            return run_arm(Arm(label, "nsga2-seeded", {}, problem), 0, label, config, opened, store, Silent())

    return go


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda a, b, c, d: [[a, b, c, d]], "4 candidates where 3 were asked for"),
        (lambda a, b, c, d: [[a, b], [c, a]], "evaluated before"),
        (lambda a, b, c, d: [[a, b, a]], "twice"),
        (lambda a, b, c, d: [[(0,) * len(a)]], "illegal"),
    ],
)
def test_a_strategy_that_breaks_the_rules_is_an_error(toy: Any, run: Any, change: Any, fault: str) -> None:
    with pytest.raises(StrategyError, match=fault):
        run(*change(*toy.random_points(4, 1)))


def test_strategies_that_start_differently_are_an_error(toy: Any, run: Any) -> None:
    a, b, c, d, e, f = toy.random_points(6, 1)
    first, second = run([a, b, c], [d, e, f], label="one"), run([a, b, c], [d, f, e], label="other")
    check_designs([first, first])
    with pytest.raises(StrategyError, match="did not start"):
        check_designs([first, second])


def test_a_strategy_without_more_to_propose_stays_where_it_is(toy: Any, run: Any) -> None:
    outcome = run(toy.random_points(3, 1), [])
    assert len(outcome.trials) == 3 and outcome.judgements[-1].hypervolume == outcome.trace[-1]
    assert math.isclose(outcome.seconds[-1], 3.0, abs_tol=0.5)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_of_the_project_can_be_read(path: Path) -> None:
    assert len({arm.label for arm in read_config(path).arms}) > 1


def test_every_design_is_declared(toy: Any) -> None:
    """What `check_designs` relies on: a strategy with an initial design says how many trials it has."""
    assert all("num_initial" in strategy_of(name).options for name, row in COMPARED.items() if row.design)


FEW = {"strategies": '["random"]', "seeds": "[0]", "checkpoints": "[12]", "judged_points": "0"}


@pytest.mark.parametrize("same", [True, False], ids=["another path", "other content under the same path"])
def test_rounds_belong_to_what_a_text_and_a_model_hold(compare: Compare, text_file: Path, same: bool) -> None:
    """nsga2's proposals follow from values: on another text they are not those that are stored."""
    few = {**FEW, "strategies": '["nsga2-seeded"]', "checkpoints": "[16]"}
    mine, content = compare.folder / "mine.txt", text_file.read_text(encoding="utf-8")
    mine.write_text(content if same else content[len(content) // 2 :] + content[: len(content) // 2], encoding="utf-8")
    at_first = text_file if same else mine
    assert compare(top=few, problem={"text": f'"text:{at_first}"'}).exit_code == 0
    before = compare.count("rounds")
    if not same:
        mine.write_text(content, encoding="utf-8")
    assert compare(top=few, problem={"text": f'"text:{mine}"'}).exit_code == 0
    assert compare.count("rounds") == before * (1 if same else 2)


@pytest.mark.parametrize("changed", ["machine", "weights"])
def test_rounds_belong_to_a_machine_and_to_weights(
    compare: Compare, model_folder: Path, changed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed == "machine":
        problem = compare.problem
    else:
        copy = compare.folder / "model"
        shutil.copytree(model_folder, copy)
        problem = {**compare.problem, "model": f'"{copy}"'}
    assert compare(top=FEW, problem=problem).exit_code == 0
    before = compare.count("rounds")
    if changed == "machine":
        monkeypatch.setattr("llmbo.comparison.problems.device_name", lambda device: "another CPU, 1 threads")
    else:
        weights = load_file(copy / "model.safetensors")
        name = next(key for key in weights if "down_proj" in key)
        save_file({**weights, name: 1.001 * weights[name]}, copy / "model.safetensors", {"format": "pt"})
    assert compare(top=FEW, problem=problem).exit_code == 0
    assert compare.count("rounds") == 2 * before


def test_rounds_of_an_earlier_version_are_refused_until_made_anew(compare: Compare) -> None:
    assert compare(top=FEW).exit_code == 0
    with sqlite3.connect(compare.folder / "comparisons" / "evaluations.db") as connection:
        connection.execute("update facts set fact = ?", (json.dumps({"code": "0" * 16}),))
    evaluations = compare.count("evaluations")
    answer = compare(top=FEW)
    assert answer.exit_code == 2 and "--fresh" in answer.stderr and "'tiny'" in answer.stderr
    assert len([line for line in answer.stderr.splitlines() if line.startswith("error:")]) == 1
    assert compare("--fresh", top=FEW).exit_code == 0
    assert compare.count("evaluations") == evaluations


def test_each_seed_replays_the_reply_that_was_recorded_for_it(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blind replies to what `experiments.advice ask` prints start the arm that names them, and no other."""
    by = 'by = "replay:replies/{seed}.jsonl", hooks = ["warm_start"], warm_start = 2, num_initial = 6'
    top = {
        "name": '"advice"', "checkpoints": "[8]", "judged_points": "0", "method": '"model"',
        "strategies": f'[{{strategy = "advised", label = "model", {by}}}]',
    }  # fmt: skip
    path = compare.write(top, {"recipe_search": "true"})
    with chdir(compare.folder):
        advice.main(["ask", str(path)])
        assert "RECIPES" in capsys.readouterr().out
        for seed, share in ((0, 0.55), (1, 0.75)):
            recipe = {"numbers": {"mlp_slope": 0.9, "attention": -0.5}, "at": [share], "why": f"seed {seed}"}
            (compare.folder / f"{seed}.json").write_text(json.dumps({"recipes": [recipe], "proposals": []}))
        advice.main(["record", str(path), "--replies", ".", "--by", "blind, today", "--out", "replies"])
    answer = compare(top=top, problem={"recipe_search": "true"})
    assert answer.exit_code == 0, answer.output
    for arm, share in zip(compare.result("comparisons/advice")["arms"], (0.55, 0.75), strict=True):
        [advised] = [trial for trial in arm["trials"] if trial["origin"] == "advisor:warm_start"]
        [recorded] = read_jsonl(compare.folder / "replies" / f"{arm['seed']}.jsonl")
        assert recorded.answer and recorded.exchanges[0].model == "blind, today" and recorded.exchanges[0].digest
        assert advised["values"]["params_share"] == pytest.approx(share, abs=0.15)
        assert len(recorded.answer.candidates) == 1
    first, second = (arm["trials"] for arm in compare.result("comparisons/advice")["arms"])
    assert {t["digest"] for t in first[:6]} != {t["digest"] for t in second[:6]}
    assert "is not the one" not in " ".join(answer.stderr.split())
    file = compare.folder / "replies" / "1.jsonl"
    file.write_text(file.read_text().replace(f'"digest": "{recorded.exchanges[0].digest}"', '"digest": "another"'))
    answer = compare("--fresh", top=top, problem={"recipe_search": "true"})
    (told,) = [line for line in " ".join(answer.stderr.split()).split("note: ") if "was answered in" in line]
    assert told.startswith("model, seed 1: The prompt of round 1, warm_start, is not the one")
