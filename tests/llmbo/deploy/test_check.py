"""`llmbo models --check`: what can become of a model, from a folder without weights."""

import re
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, T5Config
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.config.formats import FORMATS
from llmbo.problem.space import space_of
from llmbo.search.baselines.designs import UniformProposer
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.hf import check_stock
from pruning.widths import lacking_of

Build = Callable[[str], PreTrainedModel]
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # fmt: skip


def check(folder: object, *deploy: str) -> Any:
    engines = [word for engine in deploy for word in ("--deploy", engine)]
    return CliRunner().invoke(app, ["models", "--check", str(folder), *engines])


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
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "layers of any size$"),
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
    family, search, engines, *formats = result.stdout.splitlines()
    assert family.startswith(f"family: {config.model_type} ") and f" in {config.num_hidden_layers} layers" in family
    groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
    assert f"0 {'or' if groups == 1 else 'to'} {groups} of its KV groups" in search and "0 to 24 neurons" in search
    assert [line.split(":")[0] for line in formats] == [f"--format {name}" for name in FORMATS]
    assert formats[0].endswith(": layers of any size") and formats[3].endswith(": layers of any size")
    assert re.search(f"^--format gguf: {gguf}", formats[1])
    assert ("llama.cpp" in engines.partition(";")[0]) == gguf.startswith("layers of any") and "runs in hf" in engines
    whole = "with all heads or none, and MLPs of any size, no others: .*gone in layers 0:"
    vllm = whole if not changed and row == "llama" else ": none: vLLM"
    assert re.search(vllm, formats[2])


def test_engines_narrow_what_is_searched_or_say_why_they_cannot(
    build: Build, bytewise: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for row, engines, says in (
        ("llama-mha", ("vllm", "hf"), "keeps 0 or 4 of its KV groups"),
        (
            "llama-mha",
            ("hf-stock",),
            "keeps 1 or 2 or 4 of its KV groups.*all layers the same$",
        ),  # 3 heads: hidden is 32
        ("llama-mha", ("hf-stock", "vllm", "llama.cpp"), "keeps 4 of its .*same$"),
        ("gpt2", ("hf-stock", "llama.cpp"), "keeps 4 of its .*same$"),
        ("gemma2", ("llama.cpp",), "error: --deploy llama.cpp cannot run .*unequal size: .*can: --deploy hf, hf-stock"),
        ("gpt2", ("vllm",), "error: --deploy vllm cannot .* not of 'gpt2': .* What can: --deploy hf, hf-stock"),
        ("gemma2", ("vllm-transformers", "hf"), "keeps 0 to 2 of its KV groups"),
        ("granite", ("vllm-transformers",), "error: .* scale the logits of 'granite' models: .*can: --deploy hf, "),
        (
            "llama",
            ("onnx",),
            "error: Unknown --deploy 'onnx': Expected one of hf, hf-stock, llama.cpp, vllm, vllm-transformers",
        ),
        ("llama", ("vllm", "vllm"), "error: --deploy vllm is given twice"),
    ):
        build(row).config.save_pretrained(tmp_path)
        bytewise.save_pretrained(tmp_path)
        result = check(tmp_path, *engines)
        refused = says.startswith("error")
        assert result.exit_code == 2 * refused and (len(result.stderr.splitlines()) == 1) == refused, result.output
        assert re.search(says, result.stderr if refused else result.stdout, re.MULTILINE)
        if not refused:
            assert all(engine in result.stdout.splitlines()[2] for engine in engines)
    build("gpt2").config.save_pretrained(tmp_path)
    for flag in ("--quiet", "--plan"):  # before anything is done
        with chdir(tmp_path):
            words = ["--model", str(tmp_path), "--window", "32", "--deploy", "vllm", flag]
            result = CliRunner().invoke(app, ["optimize", *words])
        assert result.exit_code == 2 and "not of 'gpt2'" in result.stderr and not (tmp_path / "runs").exists()
    assert "--check MODEL" in CliRunner().invoke(app, ["models", "--deploy", "vllm"]).stderr


def test_a_search_for_stock_models_holds_nothing_else(family_model: PreTrainedModel) -> None:
    """In any family."""
    anatomy = anatomy_of(family_model)
    space = space_of(RunConfig("it", deploy=("hf-stock",)), anatomy)
    layers, groups = anatomy.num_hidden_layers, space.widths["attention"][1:]
    assert groups and UniformProposer(space).propose([], 1, 0)
    some = anatomy.attention.queries > 1
    more = (
        space_of(RunConfig("it", deploy=("hf-stock",), query_heads=True), anatomy).widths["attention"] if some else []
    )
    assert not some or any(map(lacking_of, more))
    for kept in {*groups, *more} - {0}:
        check_stock(family_model, None, Architecture.of((kept,) * layers, (5,) * layers))
    with pytest.raises(UnsupportedExport, match="cannot tell layers of unequal size"):
        check_stock(family_model, None, Architecture(groups[-1:] * layers, (5, *(24,) * (layers - 1))))


def test_of_a_single_kv_group_query_heads_are_searched(
    build: Build, bytewise: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    config = build("llama").config
    type(config)(**config.to_dict() | {"num_key_value_heads": 1}).save_pretrained(tmp_path)
    bytewise.save_pretrained(tmp_path)
    told = check(tmp_path).stdout
    assert "0 or 1 of its KV groups, each with 1 to 4 of its 4 query heads" in told
    assert "llama.cpp" in told.splitlines()[2] and "--format hf: layers of any size" in told
    assert re.search("--format vllm: .*all heads or none, .*no others", told)
    assert "0 or 1 of its KV groups, each of 4 query heads" in check(tmp_path, "vllm").stdout
    build("olmo2").config.save_pretrained(tmp_path)
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
