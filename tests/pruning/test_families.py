"""Third parties' families join by entry points: a good one obeys the laws, any other is refused when it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PersimmonConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pruning.anatomy import anatomy_of, family_of
from pruning.architecture import Architecture
from pruning.errors import InvalidFamily, UnsupportedModel
from pruning.export import Pruned, load_pruned, save_hf, save_padded
from pruning.families import FAMILIES, find_family, known_families
from pruning.family import Places
from pruning.masks import PruningMask, Ranking, masked
from pruning.shrinking import shrink
from pruning.supernet import Supernet

Install = Callable[..., None]
POINTS = "[llmbo.families]\npersimmon = other:PERSIMMON\n"
CODE = """
from pruning import Family, Places
PERSIMMON = Family(
    "persimmon",
    "Persimmon",
    Places(
        "self_attn", "input_layernorm", {"query_key_value": (("query", "key", "value"),)}, "dense",
        counts={"num_heads": "query_heads"},
    ),
    Places("mlp", "post_attention_layernorm", {"dense_h_to_4h": (("neuron",),)}, "dense_4h_to_h"),
)
"""


@pytest.fixture
def persimmon() -> PreTrainedModel:
    config = PersimmonConfig(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval()


def test_a_plugin_obeys_the_laws(
    persimmon: PreTrainedModel, install: Install, windows: Tensor, logits: Any, tmp_path: Path,
    random_architecture: Callable[..., Architecture], random_ranking: Callable[..., Ranking],
) -> None:  # fmt: skip
    install("other", CODE, POINTS)
    anatomy = anatomy_of(persimmon)
    architecture, ranking = random_architecture(anatomy, 3, "BAMB-"), random_ranking(anatomy, 3)
    mask = PruningMask.from_architecture(architecture, ranking)
    small = shrink(persimmon, mask)
    expected = logits(small, windows)
    with masked(persimmon, mask):
        torch.testing.assert_close(logits(persimmon, windows), expected, rtol=0, atol=1e-9)
    with Supernet(persimmon, ranking) as supernet, supernet.active(architecture) as active:
        torch.testing.assert_close(logits(active, windows), expected, rtol=0, atol=1e-9)
    for save in (save_hf, save_padded):  # both read back in a process where no plug-in can be
        save(Pruned(small, anatomy, architecture), tmp_path / save.__name__)
        torch.testing.assert_close(logits(load_pruned(tmp_path / save.__name__), windows), expected, rtol=0, atol=1e-9)


def test_messages_list_plugins_and_load_none(
    persimmon: PreTrainedModel, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnsupportedModel, match="'persimmon' is not supported"):
        anatomy_of(persimmon)
    install("other", CODE, POINTS + "lost = nowhere:LOST\n")
    assert known_families() == sorted({*FAMILIES, "persimmon", "lost"})
    unknown = LlamaConfig()
    unknown.model_type = "cohere_next"
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "cohere_next", "CohereNextForCausalLM")
    with pytest.raises(UnsupportedModel, match=r"'cohere_next' is not supported: .*gpt2.* lost, .*persimmon"):
        family_of(unknown)
    assert family_of(LlamaConfig()) is FAMILIES["llama"]
    assert find_family("nobody") is None


@pytest.mark.parametrize(
    ("points", "code", "message"),
    [
        ("mine = nowhere:X", "", "'mine = nowhere:X' of the package 'other'.*No module named 'nowhere'"),
        ("mine = other:X", "", "'mine = other:X'.*no attribute 'X'"),
        ("mine = other:X", "raise RuntimeError('one\\ntwo')", ": one. Update or uninstall"),
        ("mine = other:X", "assert False", ": AssertionError. Update or uninstall"),
        ("mine = other:X", "X = {}", "expected a `pruning.Family`, got a dict"),
        ("mine = other:PERSIMMON", CODE, "it is a family 'persimmon', which must be its name too"),
        ("mine = other:X", CODE.replace('"key"', '"kee"'), "'query_key_value' must be a tuple of parts.*'kee'"),
    ],
)
def test_a_broken_plugin_is_refused(install: Install, points: str, code: str, message: str) -> None:
    install("other", code, f"[llmbo.families]\n{points}\n")
    with pytest.raises(InvalidFamily, match=message) as refusal:
        find_family("mine")
    assert "\n" not in str(refusal.value) and "llmbo.families" in str(refusal.value)
    assert find_family("llama") is FAMILIES["llama"]


def test_no_plugin_takes_the_place_of_another_family(install: Install) -> None:
    install("other", CODE, "[llmbo.families]\nllama = other:PERSIMMON\npersimmon = other:PERSIMMON\n")
    with pytest.raises(InvalidFamily, match=r"'llama = other:PERSIMMON' of the package 'other'.*'llama' already"):
        find_family("llama")
    assert find_family("persimmon").model_type == "persimmon"
    install("another", CODE, POINTS.replace("other", "another"))
    with pytest.raises(InvalidFamily, match=r"'another'.* and .*'other'.* one of them must go"):
        find_family("persimmon")
    assert find_family("opt") is FAMILIES["opt"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("self_attn", "attn"), ("input_layernorm", "ln_1"), ('"dense_4h_to_h"),', '"dense_4h_to_h"), layers="blocks",')],
)
def test_a_plugin_that_names_what_is_not_there_is_refused(
    persimmon: PreTrainedModel, install: Install, right: str, wrong: str
) -> None:
    install("other", CODE.replace(right, wrong), POINTS)
    with pytest.raises(
        InvalidFamily, match=r"family 'persimmon' does not fit a PersimmonForCausalLM: .*has no attri"
    ) as refusal:
        anatomy_of(persimmon)
    assert "\n" not in str(refusal.value)


PROJECTIONS = {"q_proj": (("query",),)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"inputs": {"q_proj": ("query",)}},
            "'q_proj' must be a tuple of parts, each a tuple of roles .*got \\('query',\\)",
        ),
        ({"inputs": {"q_proj": (("q",),)}}, "'q_proj' must be .*query, key, value, neuron.*'q'"),
        ({"inputs": {"q_proj": ((),)}}, "'q_proj' must be"),
        ({"counts": {"num_heads": "H"}}, "'num_heads' must count one of .*query_heads.*got 'H'"),
        ({"config_counts": {"heads": "kv"}}, "'heads' must count one of .*kv_heads.*got 'kv'"),
    ],
)
def test_what_is_no_role_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidFamily, match=message):
        Places(**{"module": "", "norm": "norm", "inputs": PROJECTIONS, "output": "o_proj", **change})


def test_every_row_says_what_users_know_it_by() -> None:
    assert all(family.models and family.notes for family in FAMILIES.values())
