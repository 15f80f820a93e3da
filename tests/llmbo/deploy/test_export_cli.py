"""`llmbo export` from the outside: what it writes, and the one line it says when it refuses."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import chdir
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llmbo
from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.deploy import disk
from llmbo.deploy.fit import best_within
from llmbo.deploy.target import Target
from llmbo.errors import ConfigError
from llmbo.models.loading import load_model
from llmbo.problem.texts import load_windows
from llmbo.run.rebuild import read_run
from pruning.export import load_pruned
from pruning.likelihood import quality

Export = Callable[..., Result]


@pytest.fixture
def export(finished: Any) -> Export:
    """`export("tiny", trial=3, format="hf", out=...)` in the finished run's working directory."""

    def call(run: str, folder: Path = finished.folder, **flags: object) -> Result:
        words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        before = signal.getsignal(signal.SIGTERM)
        try:
            with chdir(folder):
                return CliRunner().invoke(app, ["export", run, *words])
        finally:
            signal.signal(signal.SIGTERM, before)

    return call


@pytest.fixture
def trial(finished: Any) -> dict[str, Any]:
    """The smallest front point."""
    return finished.report()["front"][0]


def refused(result: Result) -> str:
    assert result.exit_code == 2 and result.stdout == "", result.output
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines == result.stderr.splitlines()[-1:]
    return lines[0]


def test_an_exported_trial_measures_what_the_run_measured(
    export: Export, finished: Any, trial: dict[str, Any], tmp_path: Path
) -> None:
    flags = {"trial": trial["trial"], "format": "hf", "out": tmp_path / "out"}
    child = get_context("fork").Process(target=export, args=("tiny",), kwargs=flags)
    child.start()
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob(".out.*.partial/model.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)  # until it writes; then it reads back for seconds
    child.kill()
    child.join()
    assert list(tmp_path.glob(".out.*.partial")) and not (tmp_path / "out").exists()
    result = export("tiny", **flags, max_shard_size=20_000)
    assert result.exit_code == 0, result.output
    shards = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 25_000 for shard in shards)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "fresh process" in result.stdout and len(result.stdout.splitlines()) == 2
    report = finished.report()
    config = RunConfig.from_settings(report["run"]["settings"], name="tiny")
    model = load_pruned(tmp_path / "out")
    measured = quality(model, load_windows(config, load_model(config.model, "float32", "cpu")).proxy)
    assert abs(measured.loss - trial["objectives"]["loss"]) < 1e-4
    assert model.num_parameters() == trial["objectives"]["params"]
    told = json.loads((tmp_path / "out" / "llmbo.json").read_text())
    assert told["architecture"] == trial["architecture"] and told["heldout"] == trial["heldout"]
    assert told["elsewhere"] == trial["elsewhere"] and told["elsewhere_text"] == report["elsewhere"]
    assert (told["run"], told["trial"]) == ("tiny", trial["trial"]) and len(told["mask_digest"]) == 16
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model:") and "trust_remote_code=True" in card and "license: unknown" in card
    assert f"{trial['heldout']['loss']:.3f}" in card and report["run"]["command"] in card
    assert (tmp_path / "out" / "tokenizer.json").is_file()

    again = refused(export("tiny", trial=trial["trial"], format="hf", out=tmp_path / "out"))
    assert "is not empty" in again


def test_the_best_model_within_a_budget_is_taken(export: Export, finished: Any, tmp_path: Path) -> None:
    """Of the whole front, whatever is asked for; several budgets are all kept."""
    report = read_run(str(finished.folder / "runs" / "tiny"))
    points, target = [point.objectives for point in report.front], Target.of(report, "hf")
    assert len(points) > 3
    for name in ("params", "params_share", "kv_bytes", "kl"):
        for bound in sorted(getattr(point, name) for point in points):
            for share in (1.0, 0.8, 0.6):
                budgets = {name: bound} | ({} if name == "params_share" else {"params_share": share})
                kept = [p for p in points if all(getattr(p, key) <= value for key, value in budgets.items())]
                if not kept:
                    with pytest.raises(ConfigError, match="the nearest is trial"):
                        best_within(report, budgets, target)
                    continue
                best = best_within(report, budgets, target).objectives
                assert best in kept and best.kl == min(point.kl for point in kept)
    bound = sorted(point.params for point in points)[1]
    wanted = best_within(report, {"params": bound}, target).trial
    result = export("tiny", fit=f"params<={bound}", format="hf", out=tmp_path / "out")
    assert result.exit_code == 0 and f"/out: trial {wanted}, " in result.stdout and " MB" in result.stdout, (
        result.output
    )
    assert json.loads((tmp_path / "out" / "llmbo.json").read_text())["trial"] == wanted
    assert llmbo.load_run(finished.folder / "runs" / "tiny").best_within({"params": bound}).trial == wanted


@pytest.mark.parametrize(
    ("run", "flags", "says"),
    [
        ("nowhere", {}, "There is no run 'nowhere'.*Known runs: tiny"),
        ("tiny", {"trial": 99}, "no trial 99: it has 0 to 17; on the front are"),
        ("tiny", {"trial": -1}, "--trial must be at least 0, got -1"),
        ("tiny", {"format": "onnx"}, "Unknown --format 'onnx': expected one of hf, gguf, vllm, padded"),
        ("tiny", {"dtype": "q8_0"}, "--format hf has no --dtype 'q8_0': expected one of auto, float32"),
        ("tiny", {"format": "gguf"}, "WordLevel.*--format hf"),
        ("tiny", {"quantize": "q8_0"}, "--format hf cannot be quantised .*: take --format gguf"),
        (
            "tiny",
            {"format": "gguf", "quantize": "q8_0", "dtype": "f16"},
            "--dtype f16 and --quantize q8_0 .* leave one out",
        ),
        ("tiny", {"format": "gguf", "quantize": "q4_k"}, "Unknown --quantize 'q4_k': did you mean .*recipe:FILE"),
        (
            "tiny",
            {"format": "gguf", "quantize": "recipe:no/such.json"},
            "recipe 'no/such.json' cannot be used: No such file",
        ),
        (
            "tiny",
            {"format": "gguf", "quantize": "searched:small"},
            "--quantize searched: must be a size such as 500MB, .* got 'small'",
        ),
        *(
            ("tiny", {"max_shard_size": size}, f"--max-shard-size .* '{size}'")
            for size in ("huge", "1.5GB", "-1", "5 GB", "GB", "nan")
        ),
        *(
            ("tiny", {"max_shard_size": size}, "--max-shard-size must be at ")
            for size in ("0", "0GB", "9999TB", 10**30)
        ),
        ("tiny", {"out": __file__}, "is a file"),
        ("tiny", {"out": f"{__file__}/deeper"}, "cannot be made, since .* is a file"),
        ("tiny", {"model": "/no/such/model"}, "no model folder '/no/such/model'"),
        ("tiny", {"fit": "params<=1e8"}, "either --trial, or --fit"),
        ("tiny", {"trial": None}, "either --trial, or --fit"),
        ("tiny", {"trial": None, "fit": "params=1e8"}, "--fit needs NAME<=VALUE.*got 'params=1e8'"),
        ("tiny", {"trial": None, "fit": "parms<=1e8"}, "name after --fit 'parms': did you mean params"),
        ("tiny", {"trial": None, "fit": "params>=1e8"}, "less params is better, so it must be params<=1e8"),
        ("tiny", {"trial": None, "fit": "energy<=3"}, "holds no energy, only kl, loss, params, "),
        (
            "tiny",
            {"trial": None, "fit": "params_share<=0.01"},
            r"has params_share<=0.01: the nearest is trial \d+ with .* 0\.\d+\. Ask",
        ),
    ],
)
def test_bad_input(
    run: str, flags: dict[str, Any], says: str, export: Export, trial: dict[str, Any], tmp_path: Path
) -> None:
    import re

    given = {"trial": trial["trial"], "format": "hf", "out": tmp_path / "out", **flags}
    given = {name: value for name, value in given.items() if value is not None}
    assert re.search(says, refused(export(run, **given)))
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


def test_what_the_run_did_not_measure(export: Export, finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished.folder / "runs" / "tiny", tmp_path / "runs" / "tiny")
    path = tmp_path / "runs" / "tiny" / "report.json"
    data = json.loads(path.read_text())
    data["trials"][1] |= {"state": "failed", "objectives": None, "failure": "out of memory"}
    data["trials"][2] |= {"state": "running", "objectives": None}
    path.write_text(json.dumps(data))
    flags = {"format": "hf", "out": tmp_path / "out", "folder": tmp_path}
    assert "Trial 1 of the run 'tiny' failed (out of memory)" in refused(export("tiny", trial=1, **flags))
    assert "Trial 2 of the run 'tiny' is not finished" in refused(export("tiny", trial=2, **flags))
    path.write_text(json.dumps(data | {"model": data["model"] | {"model_type": "opt"}}))
    assert "no architecture for 'opt' models" in refused(export("tiny", trial=3, **flags | {"format": "gguf"}))
    data["trials"][3]["objectives"]["loss"] += 1
    shutil.rmtree(path.parent / "prepared")  # what was kept is not measured again
    path.write_text(json.dumps(data))
    assert "rebuilt model's proxy loss is" in refused(export("tiny", trial=3, **flags))
    path.write_text(json.dumps(data | {"front": None}))
    assert "is damaged or of another version" in refused(export("tiny", trial=3, **flags))
    path.write_text("{")
    assert "cannot be read" in refused(export("tiny", trial=3, **flags))
    path.unlink()
    assert "no report.json yet" in refused(export("tiny", trial=3, **flags))
    assert not (tmp_path / "out").exists()


def test_another_base_model_or_text(export: Export, finished: Any, tmp_path: Path, text_file: Path) -> None:
    settings = finished.report()["run"]["settings"]
    shutil.copytree(settings["model"], tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    flags = {"trial": 3, "format": "hf", "out": tmp_path / "out"}
    assert "had another model or text (fingerprint" in refused(export("tiny", model=tmp_path / "other", **flags))
    content = text_file.read_text()
    try:
        text_file.write_text(content.replace("w1 ", "w2 "))
        assert "had another model or text (sha256" in refused(export("tiny", **flags))
    finally:
        text_file.write_text(content)
    assert not (tmp_path / "out").exists()


def test_too_little_disk(
    export: Export, trial: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    said = refused(export("tiny", trial=trial["trial"], format="hf", out=tmp_path / "new" / "out"))
    assert "Too little disk space" in said and "0.00 GB are free" in said
    assert list(tmp_path.iterdir()) == []


def test_a_uniform_search_finds_models_for_stock_configs(llmbo: Any, export: Export, tmp_path: Path) -> None:
    assert llmbo(uniform=True, deploy="hf-stock", budget=3).exit_code == 0
    trials = llmbo.report()["trials"]
    assert all(len(set(widths)) == 1 for trial in trials for widths in trial["architecture"].values())
    assert "--uniform is a strategy of its own" in refused(llmbo(uniform=True, strategy="random", name="other"))
    assert "hf-stock has a strategy of its own" in refused(llmbo(deploy="hf-stock", strategy="random", name="other"))
    assert export("tiny", tmp_path, trial=0, format="hf", out=tmp_path / "out").exit_code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
