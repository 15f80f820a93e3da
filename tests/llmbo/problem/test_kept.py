"""Preparations on disk: found by what they are made from, listed, cleared; runs keep what they need of them."""

import contextlib
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.models.loading import load_model
from llmbo.models.mapping import copies
from llmbo.problem.kept import MADE_FROM, clear, files_of, kept
from llmbo.problem.method import DEFAULT, Method
from llmbo.problem.recipe import DENSE_PRICES
from pruning.compensation import FIRST_RIDGE, RIDGE
from pruning.tensor_files import TensorFiles


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMBO_PREPARED", str(tmp_path / "kept"))
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "models"))  # what tests clear is not the user's
    return tmp_path / "kept"


@pytest.fixture
def trials(llmbo: Any) -> Any:
    """(name, flags) -> what a run of four trials measures."""

    def run(name: str, **flags: object) -> list[tuple[Any, Any]]:
        done = llmbo(name=name, **{"budget": 4, **flags})
        assert done.exit_code == 0, done.output
        return [(trial["architecture"], trial["objectives"]) for trial in llmbo.report(name)["trials"]]

    return run


def test_a_second_run_of_a_model_and_text_prepares_nothing_and_finds_the_same(
    trials: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trials("one")
    for measured in (
        "pruning.refits.collect_statistics",
        "llmbo.problem.preparation.block_sensitivity",
        "llmbo.problem.exchanges.exchange_costs",
    ):
        monkeypatch.setattr(measured, None)
    assert trials("two") == first
    assert len(kept()) == 1 and kept()[0].bytes > 1000


def test_another_text_grid_or_method_is_another_preparation(trials: Any, prepared: Path) -> None:
    changes: list[dict[str, object]] = [
        {}, {"calibration_tokens": 192}, {"seed": 1}, {"no_compensation": True}, {"neuron_step": 4},
    ]  # fmt: skip
    for count, change in enumerate(changes, 1):
        trials(f"run{count}", budget=1, **change)
        assert len(kept()) == count, change


def test_a_run_whose_recipe_names_no_order_goes_on_by_energy(
    trials: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was no other then. A new run of the same model and text prepares anew."""
    with monkeypatch.context() as patch:
        patch.setattr("llmbo.run.assemble.DEFAULT", replace(DEFAULT, order="activation"))
        patch.setattr(Method, "recipe", property(lambda method: {"ridge": asdict(method.ridge)}))
        first = trials("old")
    assert trials("old", budget=6)[:4] == first
    assert [json.loads((one.folder / MADE_FROM).read_bytes())["order"] for one in kept()] == ["activation"]
    trials("new")
    assert {json.loads((one.folder / MADE_FROM).read_bytes())["order"] for one in kept()} == {"activation", "surgeon"}
    assert Method.of(DEFAULT.recipe) == replace(DEFAULT, refit_members=())
    first_version = Method(ridge=FIRST_RIDGE, order="activation", allocation=DENSE_PRICES, priced_by="params")
    assert Method.of(None) == replace(first_version, refit_members=())


def test_it_is_listed_and_cleared_and_the_run_still_exports(
    trials: Any, llmbo: Any, model_folder: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*words: object) -> str:
        with contextlib.chdir(llmbo.folder):
            done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    trials("one")
    assert "128 tokens" in said("cache") and "in 1 preparations" in said("cache") and "of weights" not in said("cache")
    mapped = load_model(str(model_folder), "bfloat16", "cpu", "disk").model
    (copy,) = copies()
    shutil.copytree(copy.folder, copy.folder.with_name(f".{copy.folder.name}.abcdefgh.partial"))  # of a killed process
    for line in (f"{model_folder} bfloat16", "unfinished", f"{copy.bytes * 2 / 1e6:.0f} MB in 2 copies of weights"):
        assert line in said("cache")
    with FileLock(copy.folder.with_name(f"{copy.folder.name}.lock")):  # somebody writes it
        assert "MB removed" in said("cache", "--clear") and not kept() and len(copies()) == 2
    assert "of weights removed" in said("cache", "--clear") and not copies()
    assert mapped(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all()
    with monkeypatch.context() as patch:
        patch.setattr("pruning.refits.collect_statistics", None)
        said("export", "one", "--trial", 1, "--format", "hf", "--out", "small")
    path = llmbo.folder / "runs" / "one" / "prepared" / "layer_001.safetensors"
    damaged = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(damaged[:8], "little")
    for name, place in json.loads(damaged[8:begin]).items():
        if name.startswith(("attention.", "mlp.")):  # the trial takes one of each
            damaged[begin + place["data_offsets"][1] - 1] ^= 64
    path.unlink()  # another file than the cache's
    path.write_bytes(damaged)
    with contextlib.chdir(llmbo.folder):
        words = ("export", "one", "--trial", "1", "--format", "hf", "--out", "damaged")
        done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "layer_001.safetensors' is damaged: remove it" in done.output
    shutil.rmtree(llmbo.folder / "runs" / "one" / "prepared")  # even that can be made again, and is kept then
    said("export", "one", "--trial", 1, "--format", "hf", "--out", "again")
    small, again = ((llmbo.folder / name / "model.safetensors").read_bytes() for name in ("small", "again"))
    assert small == again and len(kept()) == 1 and any((llmbo.folder / "runs" / "one" / "prepared").iterdir())


@pytest.mark.parametrize("within", [False, True], ids=["between files", "within a file"])
def test_a_run_that_is_cleared_under_goes_on_and_keeps_its_own(
    trials: Any, llmbo: Any, prepared: Path, monkeypatch: pytest.MonkeyPatch, within: bool
) -> None:
    """Between two files the folder is made anew, and listed; within one, memory takes the rest."""
    cleared: list[int] = []

    def put(files: TensorFiles, name: str, tensors: Any, plain: Any = TensorFiles.put) -> Any:
        cleared.append(0 if within else clear())
        return plain(files, name, tensors)

    def save(tensors: Any, path: Path, *metadata: object) -> None:
        cleared.append(clear() if len(cleared) == 5 else 0)
        save_file(tensors, path, *metadata)

    monkeypatch.setattr(TensorFiles, "put", put)
    if within:
        monkeypatch.setattr("pruning.tensor_files.save_file", save)
    trials("one")
    assert sum(cleared) and len(kept()) == (not within)
    assert len(list((llmbo.folder / "runs" / "one" / "prepared").glob("*.safetensors"))) == 5
    clear()
    assert not list(prepared.iterdir())


def test_a_file_that_is_not_what_a_stage_leaves_is_made_anew(trials: Any, prepared: Path) -> None:
    first = trials("one")
    for name, change in (("sensitivity", torch.nan), ("exchange", torch.inf), ("kl", None)):
        for path in prepared.glob(f"*/{name}_*"):
            old = load_file(path)
            save_file(
                {"a": torch.zeros(3)} if change is None else {key: part * change for key, part in old.items()}, path
            )
    assert trials("two") == first


def test_a_model_that_was_changed_in_place_is_another(model_folder: Path) -> None:
    """Also where the fingerprint, which takes samples, does not see it."""
    loaded, windows = load_model(str(model_folder), "float32", "cpu"), torch.ones(2, 16, dtype=torch.long)

    def folder() -> Path | None:
        return files_of(loaded, windows, None, RIDGE, "surgeon", 2, print).folder

    with torch.no_grad():
        before, weight = folder(), loaded.model.get_parameter("model.layers.1.mlp.down_proj.weight")
        assert folder() == before
        weight[3, 5] += 1e-3
        assert folder() != before
        weight.copy_(weight.flip(0))
        assert folder() != before


def test_a_folder_that_cannot_be_written_costs_nothing_else(trials: Any, prepared: Path) -> None:
    prepared.write_text("a file, not a folder")
    assert len(trials("one")) == 4
