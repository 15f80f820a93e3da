"""A model that is brought to its device layer by layer computes what one that stays there does, and is not written to."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.anchored import fit_at
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.exchanges import exchange_costs
from pruning.gradients import loss_gradient
from pruning.likelihood import Head, dense_distribution, frozen, last_hidden
from pruning.masks import PruningMask, Ranking
from pruning.refits import GridRefits, RefitCache, fit
from pruning.sensitivity import block_sensitivity
from pruning.sequential import sequential_refit
from pruning.shrinking import shrink
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.walk import Walk

Draw = Callable[[Anatomy, int], Ranking]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
WIDTHS: dict[BlockKind, list[int]] = {"attention": [0, 1, 2], "mlp": [0, 5, 11, 24]}
WAITING = (
    "cpu",
    *(["cuda:0"] if torch.cuda.is_available() else []),
)  # devices that can stand for another than the computing one


def test_a_walk_there_and_back_is_a_pass_of_the_whole_model(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    layers = list(anatomy.layers_of(model))
    with frozen(model):
        batches = windows.split(2)  # the last one is smaller
        walk = Walk(model, batches, keep=len(batches))
        for index, layer in enumerate(layers):
            walk.forward(index, layer)
        gradients = []
        for place, batch in enumerate(batches):
            with torch.no_grad():
                torch.testing.assert_close(walk.last_hidden(place)[1], last_hidden(model, batch), **CLOSE)
            gradients.append(walk.last_gradient(place, lambda read: loss_gradient(read, Head.of(model), batch)))  # noqa: B023
        for index, layer in reversed(list(enumerate(layers))):
            walk.backward(index, layer, gradients)
        for batch, found in zip(batches, gradients, strict=True):
            seen: list[Tensor] = []
            handle = layers[0].register_forward_pre_hook(
                lambda module, args: seen.append(args[0])  # noqa: B023
            )
            with torch.enable_grad():
                hidden = last_hidden(model, batch, leaf=True)
                seen[0].retain_grad()
                hidden.backward(loss_gradient(hidden, Head.of(model), batch))
            handle.remove()
            torch.testing.assert_close(found, seen[0].grad, **CLOSE)


def some(anatomy: Anatomy) -> list[Architecture]:
    """The dense model, a narrow one, and one with dropped blocks and a dropped layer."""
    layers = anatomy.num_hidden_layers
    return [
        Architecture.full(anatomy),
        Architecture((1,) * layers, (11,) * layers),
        Architecture((0, 1, 0, *(1,) * (layers - 3)), (5, 0, 0, *(24,) * (layers - 3))),
    ]


@pytest.mark.parametrize("place", WAITING)
def test_what_is_brought_layer_by_layer_measures_as_what_stays(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, place: str
) -> None:
    """From another device as well: everything that a search and its exports ask."""
    dense = dense_distribution(model, windows)
    found = []
    for resident, by_layer in ((True, False), (True, True), (False, True)):
        if not resident:
            for parameter in anatomy.layers_of(model).parameters():
                parameter.data = parameter.data.to(place)
        before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
        fitted = fit(model, windows, WIDTHS, TensorFiles(None), scored=2)
        with Supernet(model, fitted.ranking, fitted.refits, resident=resident) as supernet:
            supernet.by_layer = by_layer  # as on a GPU
            draw = torch.Generator().manual_seed(0)
            architecture, tried = some(anatomy)[1], {
                "attention": torch.tensor([[1, 2]] * anatomy.num_hidden_layers),
                "mlp": torch.tensor([[5, 24]] * anatomy.num_hidden_layers),
            }  # fmt: skip
            qualities = supernet.qualities(some(anatomy), windows, dense, batch_size=2)
            parts: dict[str, Any] = {
                "loss": torch.stack([own.loss for own in qualities]),
                "kl": torch.stack([own.kl for own in qualities if own.kl is not None]),
                "dense": supernet.distribution(windows).top_logprobs,
                "sensitivity": block_sensitivity(supernet, windows, WIDTHS, draw),
                "exchanges": exchange_costs(supernet, architecture, tried, windows, dense, draw),  # type: ignore[arg-type]
                "scores": {kind: block.fisher for kind, block in fitted.statistics.blocks.items()},
                "in sequence": sequential_refit(supernet, architecture, windows).to_tensors(),
                "at an anchor": fit_at(supernet, [architecture], windows, WIDTHS, TensorFiles(None))[0].weight(
                    0, anatomy.mlp, 5
                ),
            }
        mask = PruningMask.from_architecture(architecture, fitted.ranking)
        small = shrink(model, mask, fitted.refits)
        assert {p.device.type for p in small.parameters()} == {"cpu"}
        parts["cut"] = small.state_dict()
        if not resident:
            for name, p in model.named_parameters():
                assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1])
        found.append(parts)
    for name, expected in found[0].items():
        for own in found[1:]:
            torch.testing.assert_close(own[name], expected, **CLOSE)
    assert found[0]["kl"][0].abs().max() < 1e-6 < found[0]["kl"][1:].min()


@pytest.mark.parametrize("model", ["llama-biased"], indirect=True)
def test_refits_set_out_one_layer_ahead_and_room_for_two_layers_is_enough(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the very first are on their way before the layer before them is computed, and none is brought twice."""
    files = TensorFiles(None)
    fitted = fit(model, windows, WIDTHS, files, scored=0)
    assert fitted.refits is not None
    layer = sum(
        fitted.refits.weight(0, block, width).nbytes for block, width in zip(anatomy.blocks, (1, 11), strict=True)
    )
    events: list[tuple[str, int]] = []
    cache = RefitCache(2 * layer + 4 * 2 * anatomy.hidden_size * 8)  # and biases
    read, forward = RefitCache._read, Walk.forward
    monkeypatch.setattr(
        RefitCache, "_read", lambda self, key, how: (events.append(("read", int(key[0][-3:]))), read(self, key, how))[1]
    )
    monkeypatch.setattr(Walk, "forward", lambda self, i, m: (events.append(("compute", i)), forward(self, i, m))[1])
    refits = GridRefits(files, fitted.ranking, "cpu", cache)
    with Supernet(model, fitted.ranking, refits) as supernet:
        supernet.by_layer = True
        supernet.quality(some(anatomy)[1], windows)
    expected = [("read", 0), ("read", 0)]
    for index in range(anatomy.num_hidden_layers):
        expected += [("read", index + 1)] * 2 * (index + 1 < anatomy.num_hidden_layers) + [("compute", index)]
    assert events == expected
    assert cache.held <= cache.most


@pytest.mark.parametrize("model", ["llama-biased"], indirect=True)
def test_it_refuses_to_run_as_a_whole(model: PreTrainedModel, anatomy: Anatomy, random_ranking: Draw) -> None:
    with (
        Supernet(model, random_ranking(anatomy, 0), resident=False) as supernet,
        pytest.raises(ValueError, match="layer by layer"),
        supernet.active(some(anatomy)[1]),
    ):
        pass


@pytest.mark.parametrize("model", ["llama-biased"], indirect=True)
def test_each_layer_is_brought_once_for_all_candidates(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    brought: list[int] = []
    layer = Supernet.layer
    monkeypatch.setattr(Supernet, "layer", lambda self, index: (brought.append(index), layer(self, index))[1])
    with Supernet(model, random_ranking(anatomy, 0), resident=False) as supernet:
        supernet.qualities(some(anatomy), windows, batch_size=2)
    assert brought == list(range(anatomy.num_hidden_layers))


@pytest.mark.parametrize("model", ["llama-biased"], indirect=True)
def test_units_are_sorted_in_copies_as_mapped_weights_must_stay_clean(
    model: PreTrainedModel, anatomy: Anatomy, random_ranking: Draw
) -> None:
    layer = anatomy.layers_of(model)[3]
    waiting = {name: p.data_ptr() for name, p in layer.named_parameters()}
    with Supernet(model, random_ranking(anatomy, 0), resident=False) as supernet, supernet.layer(3) as brought:
        assert not {p.data_ptr() for p in brought.parameters()} & set(waiting.values())
    assert {name: p.data_ptr() for name, p in layer.named_parameters()} == waiting
