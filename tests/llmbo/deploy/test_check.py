"""`llmbo models --check`: what can become of a model, from a folder without weights."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, T5Config
from typer.testing import CliRunner

from llmbo.cli import app

Build = Callable[[str], PreTrainedModel]
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip


def check(folder: object) -> Any:
    return CliRunner().invoke(app, ["models", "--check", str(folder)])


@pytest.fixture
def bytewise() -> PreTrainedTokenizerFast:
    """A tokenizer that llama.cpp knows."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("row", "changed", "gguf"),
    [
        ("llama", {}, "layers of any size$"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "none: .*scaling 'dynamic'"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "none: .*scaling 'yarn'"),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 16}, "none: .*scaling 'longrope'"),
        ("llama", {"hidden_act": "relu"}, "none: .*activation 'relu'"),
        ("gemma2", {}, "equal layers, no others: .*layers of unequal size"),
        ("gpt2", {}, "equal layers with all heads, no others: .*layers of unequal size"),
        ("opt", {}, "none: .*no architecture for 'opt'"),
    ],
)  # fmt: skip
def test_every_format_says_what_it_holds(
    row: str, changed: dict[str, Any], gguf: str, build: Build, bytewise: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = build(row).config
    type(config)(**config.to_dict() | changed).save_pretrained(tmp_path)
    bytewise.save_pretrained(tmp_path)
    result = check(tmp_path)
    assert result.exit_code == 0, result.output
    family, search, *formats = result.stdout.splitlines()
    assert family.startswith(f"family: {config.model_type} ") and f" in {config.num_hidden_layers} layers" in family
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert f"0 to {groups} of its KV groups" in search and "0 to 24 neurons" in search
    assert [line.split(":")[0] for line in formats] == ["--format hf", "--format gguf", "--format padded"]
    assert formats[0].endswith(": layers of any size") and formats[2].endswith(": layers of any size")
    assert re.search(f"^--format gguf: {gguf}", formats[1])


def test_a_single_kv_group_is_told(build: Build, bytewise: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = build("llama").config
    type(config)(**config.to_dict() | {"num_key_value_heads": 1}).save_pretrained(tmp_path)
    bytewise.save_pretrained(tmp_path)
    assert "a layer keeps all of its attention or none" in check(tmp_path).stdout


def test_another_tokenizer_goes_into_no_gguf_file(model_folder: Path) -> None:
    assert re.search(r"--format gguf: none: .*WordLevel", check(model_folder).stdout)


def test_what_cannot_be_pruned_is_one_line(build: Build, tmp_path: Path) -> None:
    T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path / "t5")
    build("llama").config.save_pretrained(tmp_path / "mute")  # without a tokenizer
    for name, says in (("t5", "encoder-decoder"), ("mute", "mute"), ("nowhere", "There is no model folder")):
        result = check(tmp_path / name)
        assert result.exit_code == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ") and says in line
