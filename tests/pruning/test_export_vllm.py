"""A folder for vLLM computes what the shrunk model does, and tells every layer in the words that vLLM reads."""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export import Pruned, save_hf, save_vllm
from pruning.export.rebuild import rebuilt
from pruning.export.vllm import BACKEND, NOT_BACKEND, check_backend, check_vllm, decilm
from pruning.families import FAMILIES
from pruning.masks import PruningMask
from pruning.shrinking import shrink, shrink_to
from pruning.widths import attention_width

LLAMAS = ["llama-tied", "llama-biased", "mistral", "qwen2", "phi3"]


@pytest.fixture
def cut(random_ranking: Callable[..., Any]) -> Callable[..., Pruned]:
    """(dense model, groups, neurons) -> a scattered sub-network of these widths."""

    def draw(model: PreTrainedModel, groups: tuple[int, ...], neurons: tuple[int, ...]) -> Pruned:
        anatomy, architecture = anatomy_of(model), Architecture(groups, neurons)
        return Pruned(
            shrink(model, PruningMask.from_architecture(architecture, random_ranking(anatomy, 0))),
            anatomy,
            architecture,
        )

    return draw


@pytest.mark.parametrize("model", LLAMAS, indirect=True)
@pytest.mark.parametrize("neurons", [(5, 24, 0, 7, 0), (0, 0, 9, 3, 3)])
def test_a_folder_computes_what_the_model_does(
    model: PreTrainedModel, neurons: tuple[int, ...], windows: Tensor, cut: Any, logits: Any, tmp_path: Path
) -> None:
    """Blocks without MLP, without attention, without both, and a first layer without attention."""
    all_groups = anatomy_of(model).num_key_value_heads
    groups = tuple(all_groups * kept for kept in ((0, 1, 1, 0, 0) if neurons[0] else (1, 0, 1, 0, 1)))
    pruned = cut(model, groups, neurons)
    check = save_vllm(pruned, tmp_path / "out")
    assert check.difference < 1e-6 and "fresh process" in check.by
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    kept = [pair for pair in zip(groups, neurons, strict=True) if any(pair)]
    assert (config["architectures"], config["model_type"]) == (["DeciLMForCausalLM"], "nemotron-nas")
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"} and "per_layer_config" not in config
    assert config["num_hidden_layers"] == len(kept) and config["intermediate_size"] == max(neurons)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for layer, (block, (attends, width)) in enumerate(zip(config["block_configs"], kept, strict=True)):
        attends = attends or layer == 0  # vLLM begins the residual stream there
        assert (block["attention"]["no_op"], block["ffn"]["no_op"]) == (not attends, not width)
        assert block["ffn"]["intermediate_size"] == (width or None)
        own = [name for name in weights if name.startswith(f"model.layers.{layer}.")]
        for part, there in (("self_attn", attends), ("input_layernorm", attends), ("mlp", width), ("post_att", width)):
            assert any(f".{part}" in name for name in own) == bool(there)
        if attends:
            heads = config["num_attention_heads"] // block["attention"]["n_heads_in_group"]
            assert len(weights[f"model.layers.{layer}.self_attn.k_proj.weight"]) == heads * config["head_dim"]
        if width:
            assert len(weights[f"model.layers.{layer}.mlp.up_proj.weight"]) == width
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    length = min(windows.shape[1], found.config.max_position_embeddings)  # of Mistral its sliding window
    expected = logits(pruned.model, windows[:, :length])
    torch.testing.assert_close(logits(found, windows[:, :length]), expected, rtol=0, atol=1e-10)
    found.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_vllm_cannot_hold_is_refused(model: PreTrainedModel, build: Any, cut: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedExport, match=r"gone in layers 0, 3: search with --deploy vllm"):
        save_vllm(cut(model, (1, 2, 0, 1, 2), (5,) * 5), tmp_path / "out")
    for name in ("qwen3", "gemma2", "gemma3", "gpt2", "gpt-neox", "opt"):
        other = build(name)
        with pytest.raises(UnsupportedExport, match=rf"Llama-like models only .* not of '{other.config.model_type}'"):
            check_vllm(other, None, Architecture.full(anatomy_of(other)))
    for change, says in (
        ({"hidden_act": "gelu"}, "no activation 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "no rotary scaling 'yarn'"),
    ):
        model.config.update(change)
        with pytest.raises(UnsupportedExport, match=says):
            check_vllm(model, None, Architecture.full(anatomy_of(model)))
        model.config.hidden_act = "silu"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["llama-biased", "qwen3", "gpt2"], indirect=True)
@pytest.mark.parametrize("first", [0, 1])
def test_the_transformers_backend_finds_what_it_looks_for(
    model: PreTrainedModel, first: int, windows: Tensor, cut: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM goes about it: the model without its head, from the config alone, and attention by the number of its layer."""
    save_hf(cut(model, (first, 2, 0, 1, 0), (5, 24, 9, 7, 0)), tmp_path / "out")
    calls: list[int] = []

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(module.layer_idx)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attend)
    config = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    config._attn_implementation = "vllm"
    base = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float64).eval()
    told = [parameter.annotation for parameter in inspect.signature(type(base).__init__).parameters.values()]
    assert all(kind is inspect.Parameter.empty or isinstance(config, kind) for kind in told[:1])  # it counts `self` in
    for index in range(4):
        own = [part for part in base.modules() if getattr(part, "layer_idx", None) == index]
        assert sum("ALL_ATTENTION_FUNCTIONS" in inspect.getsource(type(part).forward) for part in own) == 1
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    base.load_state_dict(whole.base_model.state_dict())
    with torch.inference_mode():
        found, expected = (each(windows, use_cache=False).last_hidden_state for each in (base, whole.base_model))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert calls == [0, 1, 3][1 - first :]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_the_transformers_backend_is_asked_for_known_families_only(model: PreTrainedModel, build: Any) -> None:
    check_backend(model, None, Architecture.of((1, 2, 0, attention_width(2, 1), 2), (5, 0, 9, 9, 9)))
    assert {*BACKEND} == {told["base"]["model_type"] for told in SERVED.values() if told["format"] == "hf"}
    for name, says in (("gptj", "cannot replace the attention of"), ("gpt2", "does not load the biases of")):
        other = build(name)
        with pytest.raises(
            UnsupportedExport, match=rf"Transformers backend {says} '{name}' .*: search with --deploy hf"
        ):
            check_backend(other, None, Architecture.full(anatomy_of(other)))
    assert {*BACKEND} | {*NOT_BACKEND} == {*FAMILIES} and not {*BACKEND} & {*NOT_BACKEND}


SERVED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "vllm.json").read_text())


@pytest.mark.parametrize("name", SERVED)
def test_vllm_itself_has_served_what_is_written(name: str) -> None:
    """`make test-vllm` leaves what it found, and the tensors that it was found with."""
    told = SERVED[name]
    assert told["served_as"] == {"vllm": "DeciLMForCausalLM", "hf": "TransformersForCausalLM"}[told["format"]]
    assert told["generated_alike"] and told["largest_difference"] < 1e-3
    config = AutoConfig.for_model(**told["base"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    architecture = Architecture.from_dict(told["architecture"])
    pruned = Pruned(shrink_to(model, architecture), anatomy_of(model), architecture)
    made = decilm(pruned) if told["format"] == "vllm" else rebuilt(pruned.model, pruned.anatomy, architecture)
    state = made.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert {key: list(values.shape) for key, values in state.items()} == told["tensors"]
