"""Refits of a grid: as the closed form has them, kept on disk, taken up again where a walk was stopped."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.block import BlockKind
from pruning.compensation import RIDGE, CompensationTable
from pruning.errors import InvalidArchitecture
from pruning.importance import METHODS, activation
from pruning.refits import Fitted, Order, RefitCache, fit, layer_name
from pruning.statistics import collect_statistics
from pruning.surgeon import surgeon_ranking
from pruning.tensor_files import TensorFiles
from pruning.transfers import PinnedMemory

WIDTHS: dict[BlockKind, list[int]] = {"attention": [0, 1, 2], "mlp": [0, 5, 11, 24]}
ONE_FAMILY = pytest.mark.parametrize("model", ["llama-biased"], indirect=True)


def fitted(model: PreTrainedModel, windows: Tensor, folder: Path | None, **options: object) -> Fitted:
    return fit(model, windows, WIDTHS, TensorFiles(folder), scored=2, **options)  # type: ignore[arg-type]


def assert_same(found: Fitted, expected: Fitted, anatomy: Anatomy) -> None:
    for block in anatomy.blocks:
        assert torch.equal(found.ranking.of(block.kind), expected.ranking.of(block.kind))
        for layer in range(anatomy.num_hidden_layers):
            for units in WIDTHS[block.kind][1:-1]:
                assert found.refits is not None and expected.refits is not None
                assert torch.equal(
                    found.refits.weight(layer, block, units), expected.refits.weight(layer, block, units)
                )
    for method in METHODS.values():
        assert torch.equal(method(found.statistics).layers, method(expected.statistics).layers)


@pytest.mark.parametrize("order", ["surgeon", "activation"])
def test_refits_are_those_of_the_table_that_holds_everything(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, order: Order
) -> None:
    found = fitted(model, windows, None, order=order)
    statistics = collect_statistics(model, windows, scored=2)
    ranking = surgeon_ranking(model, statistics) if order == "surgeon" else activation(statistics).ranking()
    table = CompensationTable(model, statistics, ranking, RIDGE)
    for block in anatomy.blocks:
        assert torch.equal(found.ranking.of(block.kind), table.ranking.of(block.kind))
        for layer in range(anatomy.num_hidden_layers):
            for units in WIDTHS[block.kind][1:-1]:
                assert found.refits is not None
                torch.testing.assert_close(
                    found.refits.weight(layer, block, units), table.weight(layer, block, units), rtol=0, atol=1e-6
                )


@ONE_FAMILY
def test_without_refits_units_come_by_energy(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    """Nothing then makes up for what is removed."""
    found = fit(model, windows, None, TensorFiles(None))
    expected = activation(found.statistics).ranking()
    assert found.refits is None
    assert all(torch.equal(found.ranking.of(block.kind), expected.of(block.kind)) for block in anatomy.blocks)


@ONE_FAMILY
def test_a_width_beside_the_grid_is_refused(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> None:
    refits = fitted(model, windows, None).refits
    assert refits is not None
    with pytest.raises(
        InvalidArchitecture, match=r"Layer 1 has no refit for 6 units of mlp: expected one of \[5, 11\]"
    ):
        refits.weight(1, anatomy.mlp, 6)


@ONE_FAMILY
def test_what_is_on_disk_is_not_computed_again(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fitted(model, windows, None)
    assert_same(fitted(model, windows, tmp_path), expected, anatomy)
    monkeypatch.setattr("pruning.refits.collect_statistics", None)
    assert_same(fitted(model, windows, tmp_path), expected, anatomy)


@ONE_FAMILY
@pytest.mark.parametrize("stop", [1, 3, 5, 8])
def test_a_stopped_walk_goes_on_at_the_layer_it_was_in(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    tmp_path: Path,
    stop: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopping(done: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(model, windows, tmp_path, on_layer=stopping)
    there = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(there) == [f"{layer_name(index)}.safetensors" for index in range(min(stop, 5))]
    factored: list[int] = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda matrix: (factored.append(1), cholesky(matrix))[1])
    assert_same(fitted(model, windows, tmp_path), fitted(model, windows, None), anatomy)
    # For the order and for the refits of each block; the second fit, in memory, does all of it.
    assert len(factored) == 2 * 2 * (5 - min(stop, 5)) + 2 * 2 * 5
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in there.items())


@ONE_FAMILY
def test_a_damaged_file_is_made_anew(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, tmp_path: Path) -> None:
    expected = fitted(model, windows, tmp_path)
    for name in (layer_name(2), "statistics"):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        assert_same(fitted(model, windows, tmp_path), expected, anatomy)


def _reordered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: part * (not key.startswith("order")) for key, part in tensors.items()}


@ONE_FAMILY
@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in (layer_name(2), "statistics") for change in (
            lambda tensors: {key: part[:-1].clone() for key, part in tensors.items()},
            lambda tensors: {key: part.half() for key, part in tensors.items()},
            lambda tensors: dict(list(tensors.items())[1:]),
        )),
        (layer_name(2), _reordered),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_this_call_leaves_is_made_anew(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    tmp_path: Path,
    name: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    """Of other shapes, numbers or names, or with orders that are none."""
    expected = fitted(model, windows, None)
    fitted(model, windows, tmp_path)
    save_file(change(load_file(tmp_path / f"{name}.safetensors")), tmp_path / f"{name}.safetensors")
    assert_same(fitted(model, windows, tmp_path), expected, anatomy)


def test_what_every_family_leaves_is_taken_up_again(
    family_model: PreTrainedModel, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        fitted(family_model, windows, tmp_path)
        monkeypatch.setattr("pruning.refits.collect_statistics", None)


@ONE_FAMILY
def test_a_full_disk_says_so_once_and_memory_takes_the_rest(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, tmp_path: Path, files_at_most: Callable[[int], object]
) -> None:
    told: list[str] = []
    expected = fitted(model, windows, None)
    with files_at_most(4096):  # type: ignore[attr-defined]
        found = fit(model, windows, WIDTHS, TensorFiles(tmp_path, told.append), scored=2)
    assert len(told) == 1 and str(tmp_path) in told[0] and "goes on without" in told[0]
    assert not list(tmp_path.glob(".*"))  # no half of a file
    assert_same(found, expected, anatomy)


def test_what_killed_processes_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    old, new, own = (
        tmp_path / name for name in (".layer_000.aaaaaaaa.partial", ".layer_000.bbbbbbbb.partial", ".mine")
    )
    for path in (old, new, own):
        path.write_bytes(b"half")
    for path in (old, own):
        os.utime(path, (0, 0))
    TensorFiles(tmp_path).put("layer_001", {"weight": torch.ones(2)})
    assert {path.name for path in tmp_path.iterdir()} == {new.name, own.name, "layer_001.safetensors"}


@ONE_FAMILY
def test_what_is_handed_on_outlives_its_source(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from pruning.refits import names_of

    for number, files in enumerate((TensorFiles(tmp_path / "cache"), TensorFiles(None))):
        expected = fit(model, windows, WIDTHS, files, scored=2)
        files.hand_on(tmp_path / f"run{number}", names_of(anatomy))
        if files.folder:
            shutil.rmtree(files.folder)
        with monkeypatch.context() as patch:
            patch.setattr("pruning.refits.collect_statistics", None)
            assert_same(fitted(model, windows, tmp_path / f"run{number}"), expected, anatomy)


@ONE_FAMILY
@pytest.mark.parametrize("waiting", [0, 3000, 10**6])
def test_the_cache_on_the_device_is_bounded_and_invisible(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so is what waits for it in memory that it is copied from: each refit is read once where all have room there."""
    from pruning.refits import GridRefits

    monkeypatch.setattr("pruning.transfers.CHUNK_BYTES", 8192)
    files, reads = TensorFiles(None), list[object]()
    expected = fit(model, windows, WIDTHS, files, scored=2)
    assert expected.refits is not None
    cache, read = RefitCache(3 * anatomy.hidden_size * 11 * 8, waiting), RefitCache._read
    monkeypatch.setattr(RefitCache, "_read", lambda self, key, how: (reads.append(key), read(self, key, how))[1])
    small = GridRefits(files, expected.ranking, "cpu", cache)
    for _ in range(2):
        for layer in range(5):
            for units in (5, 11):
                found = small.weight(layer, anatomy.mlp, units)
                assert torch.equal(found, expected.refits.weight(layer, anatomy.mlp, units))
                assert small.cache.held == sum(size for _, size in small.cache.kept.values()) <= small.cache.most
    assert 1 < len(small.cache.kept) < 10
    assert len([key for key in reads if "mlp" in str(key)]) == {0: 30, 3000: 30, 10**6: 20}[waiting]


def test_others_keep_room_on_the_host_and_a_host_that_locks_no_more_is_read_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Processes that fill memory of their own at once see each other's chunks in what is left."""
    chunk, taken = 8192, list[int]()
    monkeypatch.setattr("pruning.transfers.CHUNK_BYTES", chunk)
    empty, tensor = torch.empty, torch.arange(chunk // 8)

    def counted(size: int, **how: Any) -> Tensor:
        taken.extend([size] if size else [])
        if len(taken) > 5:
            raise RuntimeError("CUDA error: out of memory")
        return empty(size, dtype=how["dtype"])

    monkeypatch.setattr("pruning.transfers.torch.empty", counted)
    monkeypatch.setattr(
        "pruning.transfers.psutil.virtual_memory", lambda: SimpleNamespace(available=6 * chunk - sum(taken))
    )
    one, other = PinnedMemory(100 * chunk, 3 * chunk), PinnedMemory(100 * chunk, 3 * chunk)
    kept = [memory.keep(tensor) for memory in (one, other, one, other, one)]
    assert [each is not None for each in kept] == [True, True, True, False, False]
    assert all(torch.equal(each, tensor) for each in kept if each is not None)
    greedy = PinnedMemory(100 * chunk)
    assert [greedy.keep(tensor) is None for _ in range(4)] == [False, False, True, True] and len(taken) == 6
