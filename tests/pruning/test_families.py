"""Third parties' families join by entry points: a good one obeys the laws, any other is refused when it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Starcoder2Config

from pruning.anatomy import anatomy_of, family_of
from pruning.architecture import Architecture
from pruning.errors import InvalidFamily, UnsupportedModel
from pruning.export import Pruned, load_pruned, save_hf, save_padded
from pruning.families import FAMILIES, Places, find_family, known_families
from pruning.masks import PruningMask, Ranking, masked
from pruning.shrinking import shrink
from pruning.supernet import Supernet

Install = Callable[..., None]
POINTS = "[llmbo.families]\nstarcoder2 = other:STARCODER2\n"
CODE = """
from pruning import Family, Places
STARCODER2 = Family(
    "starcoder2",
    "StarCoder2",
    Places(
        "self_attn", "input_layernorm",
        {"q_proj": (("query",),), "k_proj": (("key",),), "v_proj": (("value",),)}, "o_proj",
    ),
    Places("mlp", "post_attention_layernorm", {"c_fc": (("neuron",),)}, "c_proj"),
)
"""


@pytest.fixture
def starcoder() -> PreTrainedModel:
    config = Starcoder2Config(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
        use_bias=True, residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).double().eval()


def test_a_plugin_obeys_the_laws(
    starcoder: PreTrainedModel, install: Install, windows: Tensor, logits: Any, tmp_path: Path,
    random_architecture: Callable[..., Architecture], random_ranking: Callable[..., Ranking],
) -> None:  # fmt: skip
    install("other", CODE, POINTS)
    anatomy = anatomy_of(starcoder)
    architecture, ranking = random_architecture(anatomy, 3, "BAMB-"), random_ranking(anatomy, 3)
    mask = PruningMask.from_architecture(architecture, ranking)
    small = shrink(starcoder, mask)
    expected = logits(small, windows)
    with masked(starcoder, mask):
        torch.testing.assert_close(logits(starcoder, windows), expected, rtol=0, atol=1e-9)
    with Supernet(starcoder, ranking) as supernet, supernet.active(architecture) as active:
        torch.testing.assert_close(logits(active, windows), expected, rtol=0, atol=1e-9)
    for save in (save_hf, save_padded):  # both read back in a process where no plug-in can be
        save(Pruned(small, anatomy, architecture), tmp_path / save.__name__)
        torch.testing.assert_close(logits(load_pruned(tmp_path / save.__name__), windows), expected, rtol=0, atol=1e-9)


def test_messages_list_plugins_and_load_none(starcoder: PreTrainedModel, install: Install) -> None:
    with pytest.raises(UnsupportedModel, match="'starcoder2' is not supported"):
        anatomy_of(starcoder)
    install("other", CODE, POINTS + "lost = nowhere:LOST\n")
    assert known_families() == sorted({*FAMILIES, "starcoder2", "lost"})
    with pytest.raises(UnsupportedModel, match=r"'bert' is not supported.*gpt2.* lost, .*starcoder2"):
        family_of(AutoConfig.for_model("bert"))
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
        ("mine = other:STARCODER2", CODE, "it is a family 'starcoder2', which must be its name too"),
        ("mine = other:X", CODE.replace('"key"', '"kee"'), "'k_proj' must be a tuple of parts.*'kee'"),
    ],
)
def test_a_broken_plugin_is_refused(install: Install, points: str, code: str, message: str) -> None:
    install("other", code, f"[llmbo.families]\n{points}\n")
    with pytest.raises(InvalidFamily, match=message) as refusal:
        find_family("mine")
    assert "\n" not in str(refusal.value) and "llmbo.families" in str(refusal.value)
    assert find_family("llama") is FAMILIES["llama"]


def test_no_plugin_takes_the_place_of_another_family(install: Install) -> None:
    install("other", CODE, "[llmbo.families]\nllama = other:STARCODER2\nstarcoder2 = other:STARCODER2\n")
    with pytest.raises(InvalidFamily, match=r"'llama = other:STARCODER2' of the package 'other'.*'llama' already"):
        find_family("llama")
    assert find_family("starcoder2").model_type == "starcoder2"
    install("another", CODE, POINTS.replace("other", "another"))
    with pytest.raises(InvalidFamily, match=r"'another'.* and .*'other'.* one of them must go"):
        find_family("starcoder2")
    assert find_family("opt") is FAMILIES["opt"]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("self_attn", "attn"), ("input_layernorm", "ln_1"), ('"c_proj"),', '"c_proj"), layers="blocks",')],
)
def test_a_plugin_that_names_what_is_not_there_is_refused(
    starcoder: PreTrainedModel, install: Install, right: str, wrong: str
) -> None:
    install("other", CODE.replace(right, wrong), POINTS)
    with pytest.raises(
        InvalidFamily, match=r"family 'starcoder2' does not fit a Starcoder2ForCausalLM: .*has no attri"
    ) as refusal:
        anatomy_of(starcoder)
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
