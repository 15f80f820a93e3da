"""Bytes by arithmetic are at least what torch hands out, and not much more."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.footprint import Workload, activations, footprint, layer_parameters
from pruning.likelihood import frozen
from pruning.memory import _Allocations

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
    assert layer_parameters(anatomy) == one
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
