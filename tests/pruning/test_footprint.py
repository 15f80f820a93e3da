"""Bytes by arithmetic are at least what torch hands out, and not much more."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.anchored import fit_at
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.footprint import Workload, activations, footprint
from pruning.likelihood import frozen
from pruning.memory import _Allocations
from pruning.refits import fit
from pruning.sensitivity import block_sensitivity
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.walk import FEW

MANY = 10**5  # bytes of refits
LOAD = Workload(tokens=4096, scored_tokens=2048, window=64)


def test_activations_of_a_layer_are_bounded(family_model: PreTrainedModel) -> None:
    """One of every family: without a graph and with one, as many bytes as torch hands out while a single layer runs, or up to some more."""
    model = family_model.float()
    anatomy = anatomy_of(model)
    anatomy.set_layers(model, anatomy.layers_of(model)[:1])
    states = torch.randn(24, 8, anatomy.hidden_size)

    def run(given: torch.Tensor) -> torch.Tensor:
        return model.get_decoder()(inputs_embeds=given, use_cache=False).last_hidden_state

    with frozen(model):
        with torch.no_grad():
            run(states)  # what is made once and stays
            with _Allocations(torch.device("cpu")) as plain:
                run(states)
        leaf = states.requires_grad_()
        with _Allocations(torch.device("cpu")) as graph:
            out = run(leaf)
            out.backward(torch.ones_like(out))
    forward, backward = activations(anatomy, 4, 24 * 8)
    assert plain.peak <= forward <= 2.5 * plain.peak
    assert graph.peak <= backward <= 3 * graph.peak


@pytest.mark.parametrize("model", ["llama", "gpt2"], indirect=True)
def test_what_stays_is_all_parameters_or_one_layers(anatomy: Anatomy, model: PreTrainedModel) -> None:
    total = sum(parameter.numel() for parameter in model.parameters())
    layers = anatomy.num_hidden_layers
    one = sum(parameter.numel() for parameter in anatomy.layers_of(model)[0].parameters())
    assert anatomy.layer_parameters == one
    assert footprint(anatomy, 2, LOAD, resident=True, refits=MANY).weights == 2 * total
    assert footprint(anatomy, 2, LOAD, resident=False, refits=MANY).weights == 2 * (total - (layers - 1) * one)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_depth_costs_the_device_nothing_where_layers_wait(anatomy: Anatomy) -> None:
    deep = replace(anatomy, num_hidden_layers=10 * anatomy.num_hidden_layers)
    shallow, waiting = (footprint(each, 2, LOAD, resident=False, refits=MANY) for each in (anatomy, deep))
    assert waiting.peak == shallow.peak and waiting.host > shallow.host
    assert (
        footprint(deep, 2, LOAD, resident=True, refits=MANY).peak
        > footprint(anatomy, 2, LOAD, resident=True, refits=MANY).peak
    )


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_without_refits_there_is_no_gram_matrix(anatomy: Anatomy) -> None:
    wide = replace(anatomy, mlp=replace(anatomy.mlp, units=10_000))
    assert footprint(wide, 2, LOAD, False, MANY).largest == "refits"
    assert (
        footprint(wide, 2, LOAD, False, MANY).peak - footprint(wide, 2, LOAD, False, refits=None).peak > 4 * 10_000**2
    )


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_smaller_windows_take_no_more(anatomy: Anatomy) -> None:
    peaks = [footprint(anatomy, 4, replace(LOAD, window=window), False, MANY).peak for window in (16, 32, 64, 2048)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]


@pytest.mark.parametrize("resident", [True, False])
def test_a_preparation_takes_no_more_than_the_formula_says_and_a_gram_matrix_more_would_show(
    resident: bool, tmp_path: Path
) -> None:
    """Every allocation is counted, while a model whose Gram matrices outweigh all else is fitted, priced and searched."""
    sizes = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 6, "head_dim": 16, "vocab_size": 200}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
        ).eval()
    anatomy, windows = anatomy_of(model), torch.arange(1024).view(32, 32) % 200
    widths: dict[BlockKind, list[int]] = {"attention": [0, 1, 2], "mlp": [0, 256, 512, 768, 1024]}
    load = Workload(windows.numel(), 8 * 32, 32)
    found = footprint(anatomy, 4, load, resident, refits=0)
    # On a CPU all is one memory, and the weights are there before.
    most = found.peak + found.host - found.weights + (0 if resident else anatomy.layer_parameters * 4)
    gram = 4 * 1024**2
    with _Allocations(torch.device("cpu")) as fitting:
        fitted = fit(model, windows, widths, TensorFiles(tmp_path), scored=8, batch_size=FEW)
    mapped = (
        5 * (tmp_path / "layer_000.safetensors").stat().st_size
    )  # into memory from the disk: torch counts that, too
    assert most - gram < fitting.peak - mapped <= most
    with Supernet(model, fitted.ranking, fitted.refits, resident) as supernet:
        with _Allocations(torch.device("cpu")) as pricing:
            block_sensitivity(supernet, windows[:8], widths, torch.Generator().manual_seed(0))
        with _Allocations(torch.device("cpu")) as searching:
            supernet.quality(Architecture((1,) * 6, (512,) * 6), windows)
        with _Allocations(torch.device("cpu")) as anchoring:
            members = [Architecture((1,) * 6, (neurons,) * 6) for neurons in (512, 256)]
            fit_at(supernet, members, windows, widths, TensorFiles(tmp_path), batch_size=FEW)
    anchored = footprint(anatomy, 4, replace(load, anchors=2), resident, refits=0)
    layer = 0 if resident else anatomy.layer_parameters * 4
    allowed = anchored.hidden + anchored.host + layer + anchored.phases["anchors"] + 2 * mapped
    assert allowed - gram < anchoring.peak <= allowed, (anchoring.peak, allowed)
    assert pricing.peak <= most - found.phases["refits"] + found.phases["sensitivity"]
    assert searching.peak <= most - found.phases["refits"] + found.phases["candidates"]
