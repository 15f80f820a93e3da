"""The peak follows from weights, cache and one block at a time, and what torch's allocator hands out says the same."""

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.cost import Serving, cost_of
from pruning.latency import blocks_of
from pruning.memory import MemoryTable, _Allocations, measure_memory_table, peak_bytes

WIDTHS = {"attention": [0, 1, 2], "mlp": [0, 6, 12, 18, 24]}
CONTEXT, SEQUENCES = 40, 3


def test_allocations_are_counted_with_what_was_freed_in_between() -> None:
    """A megabyte in, two out of the first, one of them given back, a fourth made while three are there."""
    with _Allocations(torch.device("cpu")) as counted:
        first = torch.zeros(250_000)
        second = first + 1
        third = first.exp()
        del first
        fourth = second * third
        del second, third
    assert (counted.peak, counted.left) == (3_000_000, 1_000_000)
    assert fourth.nbytes == 1_000_000


def test_every_family_is_predicted_closely(
    model: PreTrainedModel, anatomy: Anatomy, random_architecture: Callable[..., Architecture]
) -> None:
    done: list[int] = []
    measured = measure_memory_table(model, WIDTHS, CONTEXT, SEQUENCES, done.append)
    assert done == list(range(1, len(blocks_of(anatomy, WIDTHS)) + 1))
    table = MemoryTable.from_dict(measured.to_dict())
    for seed in range(3):
        architecture = random_architecture(anatomy, seed, whole=True)  # as `WIDTHS` are
        units = torch.tensor(architecture.kv_groups), torch.tensor(architecture.neurons)
        predicted = table.peak(anatomy, *units)
        # These weights are next to nothing beside the activations, and windows of 6 tokens cut most of the cache away.
        allowed = 0.1 if {*anatomy.attention_spans} == {None} else 0.25
        assert float(predicted) == pytest.approx(peak_bytes(model, architecture, CONTEXT, SEQUENCES), rel=allowed)
        torch.testing.assert_close(
            table.peak(anatomy, *(part.expand(2, 4, -1) for part in units)), predicted.expand(2, 4)
        )
        serving = Serving(CONTEXT, SEQUENCES, model.dtype.itemsize)
        cost = cost_of(anatomy, architecture, serving)
        assert predicted > cost.weight_bytes + cost.kv_bytes


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_widths_that_were_measured_are_predicted_to_the_byte(model: PreTrainedModel, anatomy: Anatomy) -> None:
    table = measure_memory_table(model, WIDTHS, CONTEXT, SEQUENCES)
    for groups, neurons in (((1, 2, 0, 2, 1), (6, 24, 12, 0, 18)), ((2, 1, 1, 1, 0), (0, 0, 6, 6, 24))):
        architecture = Architecture(groups, neurons)
        predicted = table.peak(anatomy, torch.tensor(groups), torch.tensor(neurons))
        assert int(predicted) == peak_bytes(model, architecture, CONTEXT, SEQUENCES)
