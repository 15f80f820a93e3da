"""A model's time is the sum over its blocks, whatever the stacks it was solved from."""

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from pruning import latency
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import PruningError
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
        dense = {phase: additive(Architecture.full(anatomy), phase) for phase in latency.PHASES}
        return {phase: Timing(additive(stack, phase) / dense[phase], 0.01, dense[phase]) for phase in latency.PHASES}

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
    """With a clock that counts its calls every reading takes one second, so all ratios are one."""
    ticks = itertools.count()
    for stack in stacks_of(anatomy, {"attention": [1], "mlp": [12]}):
        found = time_architecture(model, stack, SMALL, lambda: float(next(ticks)))
        assert found == {"prefill": Timing(1.0, 0.0, 1.0), "decode": Timing(1.0, 0.0, 1.0)}


@ONE_FAMILY
def test_a_machine_that_gets_slower_changes_no_prediction(
    model: PreTrainedModel, anatomy: Anatomy, random_architecture: Callable[..., Architecture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every stack is timed at a lower speed than the one before, and now and then another process gets in the way."""
    slower = itertools.count(1)
    busy = random.Random(0)
    speed = 1.0

    def sized(model: PreTrainedModel, stack: Architecture) -> PreTrainedModel:
        nonlocal speed
        speed = 1 + next(slower) / 20
        return stack

    def run(timed: PreTrainedModel | Architecture, *others: object) -> dict[str, list[float]]:
        stack = timed if isinstance(timed, Architecture) else Architecture.full(anatomy)
        return {
            phase: [additive(stack, phase) * speed * (1 + 3 * (busy.random() < 0.2)) for _ in range(4)]
            for phase in latency.PHASES
        }

    monkeypatch.setattr(latency, "shrink_to", sized)
    monkeypatch.setattr(latency, "_run", run)
    table = measure_table(model, WIDTHS, SMALL)
    for seed in range(3):
        drawn = random_architecture(anatomy, seed)
        onto_grid = Architecture(drawn.kv_groups, tuple(-(-n // 6) * 6 for n in drawn.neurons))
        units = torch.tensor(onto_grid.kv_groups), torch.tensor(onto_grid.neurons)
        measured = latency.measured_seconds(table, model, onto_grid)
        for phase in latency.PHASES:
            assert table.phases[phase].seconds(*units).item() == pytest.approx(measured[phase], rel=1e-9)


@ONE_FAMILY
def test_a_block_is_no_faster_than_a_narrower_one(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = random.Random(1)

    def timed(model: PreTrainedModel, stack: Architecture, *others: object) -> dict[str, Timing]:
        ratio = additive(stack, "prefill") / 10 * noise.uniform(0.7, 1.3)
        return {phase: Timing(ratio, 0.01, 2.0) for phase in latency.PHASES}

    monkeypatch.setattr(latency, "time_architecture", timed)
    for phase in measure_table(model, WIDTHS, SMALL).phases.values():
        assert phase.fixed >= 0 and phase.layer >= 0
        for rows in phase.blocks.values():
            seconds = [value for _, value in rows]
            assert seconds[0] == 0 and seconds == sorted(seconds)


@ONE_FAMILY
def test_coarse_clocks_are_read_less_often_or_refused(model: PreTrainedModel) -> None:
    """A clock that ticks once in four readings shows nothing on some of them."""
    calls = itertools.count()
    with pytest.raises(PruningError, match="steps_per_reading"):
        time_architecture(model, Architecture.full(anatomy_of(model)), SMALL, lambda: next(calls) // 4)
    now = 0.0

    def joules() -> float:
        nonlocal now
        now += 1.0
        return now

    seldom = Workload(sequences=2, context=5, steps=6, repeats=3, steps_per_reading=3)
    found = time_architecture(model, Architecture.full(anatomy_of(model)), seldom, joules, ("decode",))
    assert found == {"decode": Timing(1.0, 0.0, pytest.approx(1 / 3))}
