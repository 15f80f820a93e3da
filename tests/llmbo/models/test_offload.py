"""A model is never in memory twice, and its layers wait where they were told to."""

import gc
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmbo.errors import ConfigError
from llmbo.models.loading import LoadedModel, load_model
from llmbo.models.mapping import is_mapped
from llmbo.models.placement import SPARE, leave_layers, spread

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
RANDOM_MODEL: dict[str, Any] = runpy.run_path(str(EXPERIMENTS / "random_model.py"))
NOTHING = 16e6  # bytes that loading takes besides the weights
TOKENS = torch.arange(2, 14)[None]
needs_linux = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux counts this memory")


@pytest.fixture(scope="module")
def wide(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, in two files, tied, with matrices of 36 MB each: of such a size malloc maps every block anew."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    config = RANDOM_MODEL["random_config"](1088, 1, 17, 17, 16384, vocab=62)
    config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    RANDOM_MODEL["write_random_model"](config, folder, shard_bytes=80_000_000, tokenizer=tokenizer)
    assert len(list(folder.glob("*.safetensors"))) == 2
    return folder


def anonymous() -> int:
    """Bytes of this process that no file holds."""
    found = re.search(r"^Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def peak(load: Callable[[], LoadedModel]) -> tuple[LoadedModel, float]:
    """What is loaded, and how many bytes of memory that took at most."""
    gc.collect()
    most = before = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        loaded = load()
    finally:
        done.set()
        watcher.join()
    return loaded, max(most, anonymous()) - before


def size(loaded: LoadedModel) -> int:
    return sum(weight.nbytes for weight in loaded.model.parameters())


@needs_linux
def test_what_is_mapped_takes_no_memory(wide: Path) -> None:
    """No matrix is copied either, for checks or the fingerprint."""
    for dtype, offload in (("bfloat16", "none"), ("auto", "disk")):
        loaded, taken = peak(lambda dtype=dtype, offload=offload: load_model(str(wide), dtype, "cpu", offload))
        assert taken < NOTHING and is_mapped(loaded.model)
        assert loaded.offload == offload and loaded.dtype == "bfloat16" and loaded.notes == ()


@needs_linux
def test_what_is_cast_takes_the_weights_once_and_a_shard_when_it_stays_on_disk(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path))
    monkeypatch.setattr("llmbo.models.mapping.SHARD", 75_000_000)  # one matrix in float32
    plain, taken = peak(lambda: load_model(str(wide), "float32", "cpu", "cpu"))
    assert taken < size(plain) + NOTHING and not is_mapped(plain.model) and not list(tmp_path.iterdir())
    loaded, taken = peak(lambda: load_model(str(wide), "float32", "cpu", "disk"))
    assert is_mapped(loaded.model) and taken < 75e6 + NOTHING < 0.5 * size(loaded)
    (note,) = loaded.notes
    assert re.search(rf"'{wide}' are stored in bfloat16: a copy of them in float32 is kept in {tmp_path}", note)
    monkeypatch.setattr("llmbo.models.mapping.save_file", None)  # no second time
    again, taken = peak(lambda: load_model(str(wide), "float32", "cpu", "disk"))
    assert taken < NOTHING and again.model.name_or_path == str(wide)
    assert again.fingerprint == loaded.fingerprint == plain.fingerprint and loaded.source == plain.source
    assert torch.equal(loaded.model(TOKENS).logits, plain.model(TOKENS).logits)


@needs_linux
def test_what_a_command_takes_is_watched_from_outside(wide: Path) -> None:
    """At its peak, and not what it maps."""
    file = max(wide.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    program = (
        "import mmap, sys, time; file = open(sys.argv[1], 'rb'); mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)\n"
        "seen = sum(mapped[::4096]); held = b'1' * 50_000_000; time.sleep(0.1); del held; time.sleep(0.05); sys.exit(3)"
    )
    code, most = runpy.run_path(str(EXPERIMENTS / "anonymous.py"))["run"]([sys.executable, "-c", program, str(file)])
    assert code == 3 and 50e6 < most < 50e6 + NOTHING and file.stat().st_size > NOTHING


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_long_ago(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "change", [pickled, pickled_long_ago, None], ids=lambda change: getattr(change, "__name__", "")
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_kind_of_file_can_be_mapped(
    change: Callable[[Path], None] | None,
    dtype: str,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stored in float32, some in a way that cannot be mapped: then a copy is, and a line says so."""
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if change:
        change(folder)
    plain = load_model(str(folder), dtype, "cpu")
    loaded = load_model(str(folder), dtype, "cpu", "disk")
    assert is_mapped(loaded.model) and {weight.dtype for weight in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert torch.equal(loaded.model(TOKENS).logits, plain.model(TOKENS).logits)
    copied = dtype != "float32" or change is pickled_long_ago
    assert len(loaded.notes) == copied and (tmp_path / "cache").exists() == copied
    assert not loaded.model.training


def test_another_state_of_the_folder_has_another_copy(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(model_folder, tmp_path / "model")
    before = load_model(str(folder), "bfloat16", "cpu", "disk")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.down_proj.weight.data[0, 1] += 1
    model.save_pretrained(folder)
    after, plain = (load_model(str(folder), "bfloat16", "cpu", offload) for offload in ("disk", "none"))
    assert torch.equal(after.model(TOKENS).logits, plain.model(TOKENS).logits)
    assert not torch.equal(after.model(TOKENS).logits, before.model(TOKENS).logits)


def test_layers_wait_and_all_else_goes_to_the_device(model_folder: Path) -> None:
    """The device stands for one with memory of its own; a layer's buffers go with it, its parameters alone are brought."""
    model = load_model(str(model_folder), "float32", "cpu", "disk").model
    for layer in model.model.layers:
        layer.self_attn.register_buffer("table", torch.ones(3), persistent=False)
    waiting = {name: weight.data_ptr() for name, weight in model.model.layers.named_parameters()}
    leave_layers(model, "meta")
    assert {name: weight.data_ptr() for name, weight in model.model.layers.named_parameters()} == waiting
    elsewhere = {name for name, weight in model.named_parameters() if weight.device.type == "meta"}
    assert elsewhere == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    buffers = dict(model.named_buffers())
    assert {buffer.device.type for buffer in buffers.values()} == {"meta"}
    assert {"model.rotary_emb.inv_freq", "model.layers.0.self_attn.table"} <= set(buffers)
    assert not {name for name in model.state_dict() if "table" in name} and model.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="layers wait on another device, and there is a CPU alone")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_wait_on_a_card_and_all_else_on_the_device(
    dtype: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU computes. In the dtype that they are stored in or another, weights reach the card from mapped files."""
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path))
    loaded, plain = (load_model(str(model_folder), dtype, "cpu", offload) for offload in ("gpu", "none"))
    layers = loaded.model.model.layers
    assert {weight.device.type for weight in layers.parameters()} == {"cuda"}
    assert {buffer.device.type for buffer in loaded.model.buffers()} == {"cpu"}
    elsewhere = [weight for weight in loaded.model.parameters() if weight.device.type == "cpu"]
    assert len(elsewhere) == 3 and loaded.model.device.type == "cpu"
    assert loaded.fingerprint == plain.fingerprint and bool(loaded.notes) == (dtype != "float32")


def test_layers_are_spread_over_as_few_cards_as_hold_them() -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        number, size, cards = (int(torch.randint(1, most, (), generator=draw)) for most in (40, 100, 6))
        free = {f"cuda:{card}": int(torch.randint(1000, (), generator=draw)) for card in range(cards)}
        holds = {card: int(SPARE * room / size) for card, room in free.items()}
        places = spread(number, size, free)
        assert len(places) == min(number, sum(holds.values()))
        assert all(places.count(card) <= holds[card] for card in free)
        used = set(places)
        best = sorted(holds.values(), reverse=True)
        assert not used or sum(best[: len(used) - 1]) < number
    assert spread(3, 10, {"cuda:1": 12, "cuda:3": 23}) == ["cuda:3", "cuda:3", "cuda:1"] and spread(3, 10, {}) == []


def test_cards_that_are_full_by_now_are_told(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbo.models.placement.other_cards", lambda device: {"cuda:1": 1000})
    with pytest.raises(
        ConfigError, match=rf"'{model_folder}' has \d layers, and GPUs beside cpu have room for 0: try --off"
    ):
        load_model(str(model_folder), "float32", "cpu", "gpu")


def test_an_unknown_place_is_refused(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"--offload 'disc'.*did you mean disk"):
        load_model(str(model_folder), "float32", "cpu", "disc")
