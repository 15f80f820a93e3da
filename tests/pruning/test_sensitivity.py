"""Block sensitivity equals direct computations, does not depend on the batch, and measuring them leaves no trace."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.block import BlockKind
from pruning.compensation import CompensationTable
from pruning.importance import fisher
from pruning.masks import Ranking
from pruning.sensitivity import block_sensitivity
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet

CLOSE = {"rtol": 2e-4, "atol": 1e-6}  # costs are float32
Draw = Callable[[Anatomy, int], Ranking]


def all_widths(anatomy: Anatomy) -> dict[BlockKind, list[int]]:
    return {block.kind: list(range(block.units + 1)) for block in anatomy.blocks}


def costs_of(
    model: PreTrainedModel, windows: Tensor, ranking: Ranking, anatomy: Anatomy, compensated: bool, batch_size: int = 2
) -> dict[BlockKind, Tensor]:
    table = CompensationTable(model, collect_statistics(model, windows), ranking) if compensated else None
    with Supernet(model, ranking, table) as supernet:
        return block_sensitivity(supernet, windows, all_widths(anatomy), batch_size=batch_size)


def test_without_refit_losing_the_last_unit_costs_its_fisher_score(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw
) -> None:
    ranking = random_ranking(anatomy, 3)
    importance = fisher(collect_statistics(model, windows))
    costs = costs_of(model, windows, ranking, anatomy, compensated=False)
    for block in anatomy.blocks:
        last = ranking.of(block.kind)[:, -1:]
        biased = block.units == 1  # a dropped block loses its bias as well
        expected = importance.of(block.kind).gather(1, last).squeeze(1)
        if block.places.post_norm:  # scores hold the norm's scale, costs do not: near for a small part of a block
            ratios = costs["mlp"][:, -2] / importance.neurons.gather(1, ranking.neurons[:, -1:]).squeeze(1)
            assert (ratios > 0.3).all() and (ratios < 3).all()
        elif not biased:
            torch.testing.assert_close(costs[block.kind][:, -2], expected, **CLOSE)


@pytest.mark.parametrize("compensated", [False, True])
def test_the_full_width_costs_nothing_and_a_dropped_block_its_whole_output(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw, compensated: bool
) -> None:
    costs = costs_of(model, windows, random_ranking(anatomy, 4), anatomy, compensated)
    dropped = dropped_blocks(model, anatomy, windows)
    for block in anatomy.blocks:
        torch.testing.assert_close(costs[block.kind][:, -1], torch.zeros(anatomy.num_hidden_layers), rtol=0, atol=1e-6)
        torch.testing.assert_close(costs[block.kind][:, 0], dropped[block.kind], **CLOSE)
        assert (costs[block.kind][:, :-1] > 0).all()  # no narrower block writes the same


def dropped_blocks(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> dict[BlockKind, Tensor]:
    """E[(g . y)^2] / 2, one window and one gate per token at a time: y is scaled by a gate whose gradient is g . y."""
    total = {block.kind: torch.zeros(anatomy.num_hidden_layers, dtype=torch.float64) for block in anatomy.blocks}
    for window in windows:
        gates = {
            block.kind: torch.ones(anatomy.num_hidden_layers, len(window), 1, dtype=torch.float64, requires_grad=True)
            for block in anatomy.blocks
        }
        handles = [
            block.update_of(layer).register_forward_hook(
                lambda module, args, output, gate=gates[block.kind], index=index: output * gate[index]
            )
            for index, layer in enumerate(anatomy.layers_of(model))
            for block in anatomy.blocks
        ]
        logits = model(window[None], use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()
        for handle in handles:
            handle.remove()
        for kind, gate in gates.items():
            assert gate.grad is not None
            total[kind] += gate.grad.square().sum((1, 2))
    model.zero_grad(set_to_none=True)
    return {kind: (cost / (2 * windows.numel())).float() for kind, cost in total.items()}


@pytest.mark.parametrize("model", ["llama", "qwen2", "gpt2", "gpt-neox"], indirect=True)
def test_the_refit_pays(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw) -> None:
    """Least squares is another metric than the loss, so a single block may lose by it; all together gain."""
    ranking = random_ranking(anatomy, 5)
    raw = costs_of(model, windows, ranking, anatomy, compensated=False)
    repaired = costs_of(model, windows, ranking, anatomy, compensated=True)
    assert sum(float(cost[:, 1:].sum()) for cost in repaired.values()) < sum(
        float(c[:, 1:].sum()) for c in raw.values()
    )


def test_costs_do_not_depend_on_the_batch(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw
) -> None:
    ranking = random_ranking(anatomy, 6)
    whole = costs_of(model, windows, ranking, anatomy, compensated=True, batch_size=len(windows))
    for batch_size in (1, 2):
        split = costs_of(model, windows, ranking, anatomy, compensated=True, batch_size=batch_size)
        for kind, costs in whole.items():
            torch.testing.assert_close(split[kind], costs, **CLOSE)


def test_only_the_wanted_widths_are_measured_and_no_trace_is_left(
    model: PreTrainedModel,
    anatomy: Anatomy,
    windows: Tensor,
    random_ranking: Draw,
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:
    ranking = random_ranking(anatomy, 7)
    every = costs_of(model, windows, ranking, anatomy, compensated=False)
    seen: list[int] = []
    with unchanged(model), Supernet(model, ranking) as supernet:
        some = block_sensitivity(supernet, windows, {"attention": [1], "mlp": [0, 7]}, on_layer=seen.append)
    torch.testing.assert_close(some["attention"], every["attention"][:, [1]], **CLOSE)
    torch.testing.assert_close(some["mlp"], every["mlp"][:, [0, 7]], **CLOSE)
    assert seen == list(range(1, 11))


@pytest.mark.parametrize("model", ["llama", "qwen2"], indirect=True)
def test_drawn_tokens_estimate_the_true_fisher_metric(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Draw
) -> None:
    """A dropped block's cost, averaged over many draws, is the sum over the vocabulary of p(y) (g^y . y)^2 / 2."""
    ranking, draws = random_ranking(anatomy, 8), 400
    widths: dict[BlockKind, list[int]] = {"attention": [0], "mlp": [0]}
    with Supernet(model, ranking) as supernet:
        generator = torch.Generator().manual_seed(0)
        drawn = block_sensitivity(supernet, windows[:1].repeat(draws, 1), widths, generator, batch_size=draws)
    for block in anatomy.blocks:
        expected = exact_drop(model, anatomy, block.kind, windows[0])
        torch.testing.assert_close(drawn[block.kind][:, 0].double(), expected, rtol=0.2, atol=0)


def exact_drop(model: PreTrainedModel, anatomy: Anatomy, kind: BlockKind, window: Tensor) -> Tensor:
    """Gauss-Newton: how all logits move with a gate per token on each block's output, weighed by their covariance."""
    block = anatomy.attention if kind == "attention" else anatomy.mlp
    outputs = [block.update_of(layer) for layer in anatomy.layers_of(model)]

    def logits(gate: Tensor) -> Tensor:  # gate: L x T
        handles = [
            output.register_forward_hook(
                lambda module, args, result, index=index: result * gate[index].view(*[1] * (result.ndim - 2), -1, 1)
            )
            for index, output in enumerate(outputs)
        ]
        try:
            return model(window[None], use_cache=False).logits[0, :-1]
        finally:
            for handle in handles:
                handle.remove()

    ones = torch.ones(len(outputs), len(window), dtype=torch.float64)
    moved = torch.autograd.functional.jacobian(logits, ones, vectorize=True)  # (T-1) x V x L x T
    p = logits(ones).softmax(-1).detach()  # (T-1) x V
    # Tokens are drawn independently at every position, so what they add to a gate's gradient adds in square.
    mean = torch.einsum("tv,tvlg->tlg", p, moved)
    variance = torch.einsum("tv,tvlg->tlg", p, moved.square()) - mean.square()
    return variance.sum((0, 2)) / (2 * len(window))
