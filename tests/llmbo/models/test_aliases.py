"""An alias becomes a folder of the cache once, and again when that folder is damaged; nothing half-made stays."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from llmbo.errors import ModelError
from llmbo.models import aliases
from llmbo.models.aliases import ALIASES, WRITTEN, Alias, resolve
from llmbo.models.loading import load_model
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export.gguf_file import write_gguf
from pruning.export.hf import Pruned
from pruning.export.quantise import Mixture


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip would install: a package `llm_tiny` with a GGUF file of a tiny llama."""
    splitting = Tokenizer(models.BPE())
    splitting.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitting.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    splitting.train_from_iterator(
        ["the cat ate the hat"] * 4, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<s>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitting, bos_token="<s>", eos_token="<s>")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    site = tmp_path_factory.mktemp("site")
    (site / "llm_tiny").mkdir()
    (site / "llm_tiny" / "__init__.py").write_text("raise AssertionError('it is found, not imported')\n")
    anatomy = anatomy_of(model)
    write_gguf(
        Pruned(model, anatomy, Architecture.full(anatomy), tokenizer),
        site / "llm_tiny" / "tiny.gguf",
        Mixture.of("f32"),
        "tiny",
    )
    return site


@pytest.fixture(scope="module")
def converted(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache after the first use. Copy it before changing it."""
    with pytest.MonkeyPatch.context() as patch:
        use(package, tmp_path_factory.mktemp("first"), patch)
        return Path(resolve("tiny")).parent


def use(package: Path, cache: Path, patch: pytest.MonkeyPatch) -> None:
    patch.syspath_prepend(str(package))
    patch.setitem(ALIASES, "tiny", Alias("tiny", "A tiny llama", "llm-tiny", "Apache-2.0"))
    patch.setenv("LLMBO_CACHE", str(cache))


@pytest.fixture
def cache(package: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one's own in which the alias is converted already."""
    shutil.copytree(converted, tmp_path / "cache")
    use(package, tmp_path / "cache", monkeypatch)
    return tmp_path / "cache"


def content(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_an_alias_is_converted_once(cache: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (cache / "llm-tiny").iterdir()}
    read: list[str] = []  # nor is its tokenizer, of megabytes, looked through again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path, own=Path.read_bytes: read.append(path.name) or own(path))
        resolve("tiny")
    assert read == ["config.json"]
    loaded = load_model("tiny", "float32", "cpu")
    assert Path(loaded.source) == cache / "llm-tiny" and loaded.notes == ()
    assert {path.name: path.stat().st_mtime_ns for path in (cache / "llm-tiny").iterdir()} == before
    assert loaded.tokenizer.decode(loaded.tokenizer("the hat")["input_ids"]) == "the hat"


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "config.json").write_text("null"),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]),
        lambda folder: (folder / "model.safetensors").write_bytes(bytes(5000)),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=["no config", "null config", "half a tokenizer", "no weights", "half the weights", "zeros", "nothing"],
)
def test_a_damaged_folder_is_made_anew(damage: Callable[[Path], None], cache: Path, converted: Path) -> None:
    damage(cache / "llm-tiny")
    assert load_model("tiny", "float32", "cpu").fingerprint
    for file in (file for file in (converted / "llm-tiny").iterdir() if file.name != WRITTEN):
        assert (cache / "llm-tiny" / file.name).read_bytes() == file.read_bytes()
    assert content(cache) == {"llm-tiny"}


def test_damage_that_headers_do_not_tell_names_the_folder(cache: Path) -> None:
    (cache / "llm-tiny" / "tokenizer_config.json").write_text("null")
    with pytest.raises(ModelError, match=rf"Remove the folder '{cache / 'llm-tiny'}'"):
        load_model("tiny", "float32", "cpu")


@pytest.mark.parametrize("limit", [100, 50_000], ids=["at once", "in the weights"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    limit: int, cache: Path, files_at_most: Callable[[int], AbstractContextManager[None]]
) -> None:
    shutil.rmtree(cache / "llm-tiny")
    with (
        files_at_most(limit),
        pytest.raises(ModelError, match=rf"Cannot write the model cache '{cache}'.*make room") as caught,
    ):
        resolve("tiny")
    assert "\n" not in str(caught.value) and content(cache) == set()
    assert Path(resolve("tiny")).is_dir()  # with room again


@pytest.mark.parametrize("own", [True, False], ids=["the user's own cache", "a folder that the user named"])
def test_leftovers_of_killed_conversions_are_removed(own: bool, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if own:
        monkeypatch.delenv("LLMBO_CACHE")
        monkeypatch.setattr(aliases, "user_cache_path", lambda name: cache)
    shutil.rmtree(cache / "llm-tiny")
    if not (child := os.fork()):  # dies when all is written and nothing in its place
        aliases.os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
        resolve("tiny")
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (left,) = content(cache)
    assert (cache / left / "model.safetensors").stat().st_size > 1e5
    (cache / "tmpab12cd34").mkdir()  # as the first version left them: elsewhere it may be anybody's
    resolve("tiny")
    assert content(cache) == ({"llm-tiny"} if own else {"llm-tiny", "tmpab12cd34"})
