"""Refits at a pruned model's inputs: at its own widths those in sequence, at any other those of the model with that width there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.anchored import ABOVE, Anchor, AnchoredRefits, anchor_files, fit_at
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.compensation import Refits, Ridge
from pruning.cost import cost_of
from pruning.errors import InvalidArchitecture
from pruning.masks import PruningMask, Ranking
from pruning.refits import GridRefits, fit
from pruning.sequential import sequential_refit
from pruning.shrinking import shrink
from pruning.streams import goals_behind
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.walk import Walk

RIDGE = Ridge(0.05)
ONE_FAMILY = pytest.mark.parametrize("model", ["llama-biased"], indirect=True)


@pytest.fixture
def text() -> Tensor:
    """`40 x 10` token ids."""
    return torch.randint(97, (40, 10), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def widths(anatomy: Anatomy) -> dict[BlockKind, Sequence[int]]:
    return {"attention": range(anatomy.num_key_value_heads + 1), "mlp": (0, 5, 11, 17, 18, 24)}


@pytest.fixture
def anchor(anatomy: Anatomy) -> Architecture:
    """Every kind of layer: narrow, without attention, dense, without MLP."""
    return Architecture((1, 0, anatomy.num_key_value_heads, 1, 1), (11, 5, 24, 0, 17))


@pytest.fixture
def dense(model: PreTrainedModel, text: Tensor, widths: Mapping[BlockKind, Sequence[int]]) -> GridRefits:
    found = fit(model, text, widths, TensorFiles(None), RIDGE).refits
    assert found is not None
    return found


@pytest.fixture
def supernet(model: PreTrainedModel, dense: GridRefits) -> Iterator[Supernet]:
    with Supernet(model, dense.ranking, dense) as opened:
        yield opened


def same(a: Refits, b: Refits, anatomy: Anatomy, index: int, kind: BlockKind, units: int) -> bool:
    block = next(block for block in anatomy.blocks if block.kind == kind)
    pairs = [(refits.weight(index, block, units), refits.bias(index, block, units)) for refits in (a, b)]
    (own, bias), (other, other_bias) = pairs
    assert (bias is None) == (other_bias is None)
    return torch.allclose(own, other, rtol=1e-3, atol=1e-5) and (
        bias is None or torch.allclose(bias, other_bias, rtol=1e-3, atol=1e-5)
    )


def test_at_an_anchors_widths_they_are_those_in_sequence_and_elsewhere_those_of_a_model_that_differs_there_alone(
    model: PreTrainedModel,
    anatomy: Anatomy,
    random_ranking: Callable[[Anatomy, int], Ranking],
    anchor: Architecture,
    text: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
) -> None:
    narrow = [
        (index, block.kind, units)
        for index in range(anatomy.num_hidden_layers)
        for block in anatomy.blocks
        if 0 < (units := anchor.units(block.kind)[index]) < block.units
    ]
    with Supernet(model, random_ranking(anatomy, 0)) as supernet:
        (refits,) = fit_at(supernet, [anchor], text, widths, TensorFiles(None), RIDGE)

        own = sequential_refit(supernet, anchor, text, RIDGE)
        assert all(same(refits, own, anatomy, *place) for place in narrow)
        other = replace(anchor, neurons=(*anchor.neurons[:3], 11, anchor.neurons[4]))
        assert same(refits, sequential_refit(supernet, other, text, RIDGE), anatomy, 3, "mlp", 11)
        if anatomy.num_key_value_heads > 1:
            other = replace(anchor, kv_groups=(*anchor.kv_groups[:2], 1, *anchor.kv_groups[3:]))
            assert same(refits, sequential_refit(supernet, other, text, RIDGE), anatomy, 2, "attention", 1)


@ONE_FAMILY
def test_a_walk_that_was_stopped_goes_on_to_the_same_refits_and_one_that_was_not_never_takes_place_again(
    model: PreTrainedModel,
    supernet: Supernet,
    anatomy: Anatomy,
    anchor: Architecture,
    text: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
    tmp_path: Path,
) -> None:
    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 3:
            raise Stop

    whole, stopped = TensorFiles(tmp_path / "whole"), TensorFiles(tmp_path / "stopped")
    fit_at(supernet, [anchor], text, widths, whole, RIDGE)
    with pytest.raises(Stop):
        fit_at(supernet, [anchor], text, widths, stopped, RIDGE, on_layer=stop)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "stopped").iterdir()}
    assert len(first) == 3
    fit_at(supernet, [anchor], text, widths, stopped, RIDGE)

    for path in (tmp_path / "whole").iterdir():
        there, again = whole.get(path.stem), stopped.get(path.stem)
        assert there and again and there.keys() == again.keys()
        assert all(torch.equal(there[name], again[name]) for name in there)
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())

    def passed(*_: object) -> None:
        raise AssertionError("the model ran")

    told: list[int] = []
    with model.register_forward_pre_hook(passed), anatomy.layers_of(model)[0].register_forward_pre_hook(passed):
        fit_at(supernet, [anchor], text, widths, stopped, RIDGE, on_layer=told.append)
    assert told == [anatomy.num_hidden_layers]


@ONE_FAMILY
def test_anchors_share_the_dense_stream_and_are_fitted_as_each_alone_bit_by_bit(
    supernet: Supernet,
    anatomy: Anatomy,
    anchor: Architecture,
    text: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a walk was stopped between two of them, or one was fitted before."""
    other = replace(anchor, neurons=(17, 17, 11, 24, 0))
    alone = TensorFiles(tmp_path / "alone")
    for one in (anchor, other):
        fit_at(supernet, [one], text, widths, alone, RIDGE)
    names = [path.stem for path in (tmp_path / "alone").iterdir()]
    assert len(names) == 2 * anatomy.num_hidden_layers
    seen: list[int] = []

    def counted(walk: Walk, index: int, *rest: Any) -> Any:
        seen.append(index)
        return goals_behind(walk, index, *rest)

    monkeypatch.setattr("pruning.anchored.goals_behind", counted)
    for gone in (names, [anchor_files(other, text, RIDGE)(1)], names[:1], []):
        for name in gone:
            (tmp_path / "together" / f"{name}.safetensors").unlink(missing_ok=True)
        seen.clear()
        together = TensorFiles(tmp_path / "together")  # one that has a file open goes on having it
        found = fit_at(supernet, [anchor, other], text, widths, together, RIDGE)
        assert seen == list(range(anatomy.num_hidden_layers)) * bool(gone)
        for name in names:
            there, again = alone.get(name), together.get(name)
            assert there and again and there.keys() == again.keys()
            assert all(torch.equal(there[each], again[each]) for each in there)
        assert not torch.equal(*(refits.weight(4, anatomy.mlp, 11) for refits in found))


@ONE_FAMILY
def test_layers_that_are_brought_one_at_a_time_give_the_same(
    model: PreTrainedModel,
    dense: GridRefits,
    anatomy: Anatomy,
    anchor: Architecture,
    text: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
) -> None:
    found = []
    for resident in (True, False):
        with Supernet(model, dense.ranking, dense, resident) as supernet:
            found += fit_at(supernet, [anchor], text, widths, TensorFiles(None), RIDGE)
    assert all(same(*found, anatomy, index, "mlp", 11) for index in range(anatomy.num_hidden_layers))


@ONE_FAMILY
def test_a_sub_network_takes_the_refits_of_the_anchor_above_it_wherever_it_is_run_or_cut(
    model: PreTrainedModel,
    dense: GridRefits,
    anatomy: Anatomy,
    anchor: Architecture,
    text: Tensor,
    widths: Mapping[BlockKind, Sequence[int]],
) -> None:
    larger = Architecture((anatomy.num_key_value_heads,) * 5, (17,) * 5)
    candidates = {
        "own": anchor,
        "above": replace(larger, neurons=(18, 17, 17, 17, 17)),
        "far above": replace(larger, neurons=(24,) * 4 + (17,)),
        "between": replace(anchor, kv_groups=(1, 1, 2, 1, 1)),
    }
    with Supernet(model, dense.ranking, dense) as supernet:
        small, large = fit_at(supernet, [anchor, larger], text, widths, TensorFiles(None), RIDGE)
        refits = AnchoredRefits(anatomy, dense, [Anchor(larger, large), Anchor(anchor, small)])
        taken = {name: refits.serving(candidate) for name, candidate in candidates.items()}
        share = {name: cost_of(anatomy, candidate).share for name, candidate in candidates.items()}
        top = cost_of(anatomy, larger).share
        assert top < share["above"] <= top + ABOVE * (1 - top) < share["far above"]
        assert taken == {"own": small, "above": large, "far above": dense, "between": large}

        states = {}
        for name, candidate in candidates.items():
            with supernet.using(refits).active(candidate) as active, torch.no_grad():
                states[name] = active(text[:2]).logits
            with supernet.using(taken[name]).active(candidate) as active, torch.no_grad():
                assert torch.equal(states[name], active(text[:2]).logits)
    for name, candidate in candidates.items():
        small_model = shrink(model, PruningMask.from_architecture(candidate, refits.ranking), refits)
        with torch.no_grad():
            assert torch.allclose(states[name], small_model(text[:2]).logits, atol=1e-4)
    with pytest.raises(
        InvalidArchitecture, match=r"Layer 0 has no refit for 12 units of mlp: expected one of \[5, 11, 17, 18\]"
    ):
        refits.serving(anchor).weight(0, anatomy.mlp, 12)
