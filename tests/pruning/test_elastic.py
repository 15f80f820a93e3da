"""A change that hangs in the super-network is, for every sub-network, the change of the dense model's weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.elastic import adapt, merge, take_out
from pruning.masks import PruningMask, Ranking, masked
from pruning.projection import matrix_of
from pruning.supernet import Supernet


@pytest.mark.parametrize("model", ["llama-biased", "phi3", "gpt2", "gpt-neox", "exaone4"], indirect=True)
def test_a_sub_network_of_an_adapted_model_is_that_of_the_merged_one(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_architecture: Callable[..., Architecture],
    random_ranking: Callable[[Anatomy, int], Ranking], logits: Callable[[PreTrainedModel, Tensor], Tensor],
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    architecture, ranking = random_architecture(anatomy, 1, "ABMB-"), random_ranking(anatomy, 1)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model.requires_grad_(False)
    with Supernet(model, ranking) as supernet:
        with unchanged(model):  # hung in and taken out again
            adapt(supernet, 2, 3.0, 0)
            take_out(supernet)
        learning = adapt(supernet, 2, 3.0, 0)
        with supernet.active(architecture) as candidate:
            plain = logits(candidate, windows)
        with torch.no_grad():
            for number, weight in enumerate(learning):
                weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        with supernet.active(architecture) as candidate:
            candidate(windows).logits.sum().backward()
            found = logits(candidate, windows)
        factors = merge(supernet)
    learned = sum(weight.grad is not None and bool(weight.grad.any()) for weight in learning)
    assert learned == 2 * 3 * sum(
        len(block.inputs) for block in anatomy.blocks
    )  # of blocks that are there, three of each kind
    with masked(model, PruningMask.from_architecture(architecture, ranking)):
        torch.testing.assert_close(found, logits(model, windows), rtol=0, atol=1e-9)
    assert (found - plain).abs().max() > 1e-3
    for name, weight in model.named_parameters():
        change = weight - before[name]
        if pair := factors.pop(name.removesuffix(".weight"), None):
            down, up = pair
            projection: Any = model.get_submodule(name.removesuffix(".weight"))
            change = change - (3 * up @ down if matrix_of(projection) is projection.weight else (3 * up @ down).T)
        assert change.abs().max() < 1e-12, name
    assert not factors
