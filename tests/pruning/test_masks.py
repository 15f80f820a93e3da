"""Masks keep the best-ranked units, and the masked model computes exactly what is left."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import InvalidMask, PruningError
from pruning.masks import PruningMask, Ranking, masked
from pruning.projection import matrix_of
from pruning.widths import lacking_of, units_of

ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_best_ranked_units_stay(
    anatomy: Anatomy,
    random_architecture: Callable[..., Architecture],
    random_ranking: Callable[[Anatomy, int], Ranking],
    seed: int,
) -> None:
    architecture, ranking = random_architecture(anatomy, seed), random_ranking(anatomy, seed)
    mask = PruningMask.from_architecture(architecture, ranking)
    assert mask.architecture == architecture
    for block in anatomy.blocks:
        for layer, width in enumerate(architecture.units(block.kind)):
            best = ranking.of(block.kind)[layer, : units_of(width)].tolist()
            assert mask.kept(block.kind, layer).tolist() == sorted(best)
            if lacking_of(width):  # the best of each group
                assert ranking.heads is not None
                order = [head for head in ranking.heads[layer].tolist() if head // block.queries in best]
                assert mask.kept_heads(block, layer).tolist() == sorted(order[:: block.queries])
    assert mask.layers.tolist() == [architecture.keeps_layer(layer) for layer in range(anatomy.num_hidden_layers)]


@ONE_FAMILY
@pytest.mark.parametrize(
    ("kv_groups", "neurons"),
    [
        ((2,) * 4, (24,) * 4),
        ((2,) * 6, (24,) * 6),
        ((3,) * 5, (24,) * 5),
        ((2,) * 5, (25,) * 5),
    ],
    ids=["too few layers", "too many layers", "too many groups", "too many neurons"],
)
def test_an_architecture_of_another_model_is_refused(
    anatomy: Anatomy,
    random_ranking: Callable[[Anatomy, int], Ranking],
    kv_groups: tuple[int, ...],
    neurons: tuple[int, ...],
) -> None:
    """Nothing is repaired silently: a missing layer is not a dropped one, 25 neurons are not 24."""
    with pytest.raises(PruningError):
        PruningMask.from_architecture(Architecture(kv_groups, neurons), random_ranking(anatomy, 0))


@pytest.mark.parametrize(
    "groups",
    [
        torch.tensor([[0, 0], [0, 1]]),
        torch.tensor([[1, 2], [0, 1]]),
        torch.tensor([0, 1]),
        torch.tensor([[-1, 0], [0, 1]]),
    ],
    ids=["repeated", "out of range", "one row", "negative"],
)
def test_a_ranking_is_a_permutation_per_layer(groups: Tensor) -> None:
    neurons = torch.arange(3).repeat(2, 1)
    with pytest.raises(InvalidMask, match="`groups`"):
        Ranking(groups, neurons)
    with pytest.raises(InvalidMask, match="`neurons`"):
        Ranking(neurons, groups)


def test_a_mask_is_boolean_with_a_row_per_layer() -> None:
    good = torch.ones(3, 2, dtype=torch.bool)
    for groups, neurons in ((good.int(), good), (good, good.float()), (good[0], good), (good, good[:2])):
        with pytest.raises(InvalidMask):
            PruningMask(groups, neurons)


@ONE_FAMILY
@pytest.mark.parametrize(("groups", "neurons"), [((4, 2), (4, 24)), ((5, 3), (5, 24)), ((5, 2), (5, 23))])
def test_a_mask_of_another_model_is_refused(
    model: PreTrainedModel, groups: tuple[int, int], neurons: tuple[int, int]
) -> None:
    mask = PruningMask(torch.ones(groups, dtype=torch.bool), torch.ones(neurons, dtype=torch.bool))
    with pytest.raises(InvalidMask, match=r"Expected a \(5, (2|24)\) mask"), masked(model, mask):
        pass


def test_the_full_mask_changes_nothing(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, logits: Callable[[PreTrainedModel, Tensor], Tensor]
) -> None:
    everything = PruningMask(*(torch.ones(5, block.units, dtype=torch.bool) for block in anatomy.blocks))
    expected = logits(model, windows)
    with masked(model, everything):
        assert torch.equal(logits(model, windows), expected)


@pytest.mark.parametrize("seed", range(2))
def test_masking_is_zeroing_the_output_columns(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_mask: Callable[..., PruningMask],
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
    seed: int,
) -> None:
    mask = random_mask(anatomy, seed)
    zeroed = copy.deepcopy(model)
    for index, layer in enumerate(anatomy.layers_of(zeroed)):
        for block in anatomy.blocks:
            output = block.output_of(layer)
            heads = mask.heads if mask.heads is not None and block.kind == "attention" else mask.of(block.kind)
            width = block.columns // heads.shape[1]
            for head, stays in enumerate(heads[index]):
                if not stays:
                    matrix_of(output).data[:, head * width : (head + 1) * width] = 0
            if output.bias is not None and not mask.of(block.kind)[index].any():
                output.bias.data.zero_()
    with masked(model, mask):
        found = logits(model, windows)
    torch.testing.assert_close(found, logits(zeroed, windows), rtol=0, atol=1e-10)
    assert (found - logits(model, windows)).abs().max() > 0.1  # the mask did something


def test_the_model_is_restored(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_mask: Callable[..., PruningMask],
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:
    expected = logits(model, windows)
    with unchanged(model), masked(model, random_mask(anatomy, 0)):
        logits(model, windows)
    with unchanged(model), pytest.raises(KeyboardInterrupt), masked(model, random_mask(anatomy, 0)):
        raise KeyboardInterrupt
    assert torch.equal(logits(model, windows), expected)
