"""A model's time is the sum over its blocks, whatever the stacks it was solved from."""

import itertools
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pruning import latency
from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.latency import LatencyTable, Timing, Workload, measure_table, stacks_of, time_architecture

ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)
WIDTHS = {"attention": [0, 1, 2], "mlp": [0, 6, 12, 18, 24]}
SMALL = Workload(sequences=2, context=5, steps=2, repeats=3)


def additive(architecture: Architecture, phase: str) -> float:
    """Seconds that are a sum, with a step below 12 neurons."""
    scale = {"prefill": 1.0, "decode": 0.1}[phase]
    layers = zip(architecture.kv_groups, architecture.neurons, strict=True)
    blocks = [2.0 * g + (0.3 if g else 0) + max(n, 12) / 6 * (n > 0) + 0.5 * (g + n > 0) for g, n in layers]
    return scale * (7.0 + sum(blocks))


@ONE_FAMILY
def test_additive_times_are_predicted_exactly(
    model: PreTrainedModel, anatomy: Anatomy, random_architecture: Callable[..., Architecture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def timed(model: PreTrainedModel, stack: Architecture, *others: object) -> dict[str, Timing]:
        return {phase: Timing(additive(stack, phase), 0.01) for phase in latency.PHASES}

    monkeypatch.setattr(latency, "time_architecture", timed)
    done: list[int] = []
    table = measure_table(model, WIDTHS, SMALL, done.append)
    assert done == list(range(1, len(stacks_of(anatomy, WIDTHS)) + 1))
    table = LatencyTable.from_dict(table.to_dict())
    for seed in range(5):
        drawn = random_architecture(anatomy, seed)
        onto_grid = Architecture(drawn.kv_groups, tuple(-(-n // 6) * 6 for n in drawn.neurons))
        units = torch.tensor(onto_grid.kv_groups), torch.tensor(onto_grid.neurons)
        for phase in latency.PHASES:
            found = table.phases[phase].seconds(*units)
            assert found.item() == pytest.approx(additive(onto_grid, phase), rel=1e-9)
            many = table.phases[phase].seconds(*(part.expand(2, 3, -1) for part in units))
            torch.testing.assert_close(many, found.expand(2, 3))


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt2"], indirect=True)
def test_every_stack_can_be_run(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """With a clock that counts its calls every measurement takes one second, so all ratios are one."""
    ticks = itertools.count()
    for stack in stacks_of(anatomy, {"attention": [1], "mlp": [12]}):
        found = time_architecture(model, stack, SMALL, lambda: float(next(ticks)))
        assert found == {"prefill": Timing(1.0, 0.0), "decode": Timing(0.5, 0.0)}


@ONE_FAMILY
def test_a_busy_machine_slows_both_and_changes_no_ratio(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """The clock runs ten times as fast while the last repetition of three goes on."""
    calls = itertools.count()
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10.0 if next(calls) >= 3 * 6 else 1.0
        return now

    found = time_architecture(model, Architecture.full(anatomy), SMALL, clock)
    assert found["prefill"] == Timing(1.0, 0.0)
