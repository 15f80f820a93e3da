"""KV groups that lack some of their query heads: which ones go, what is refitted without them, and what is refused.

That masked, shrunk and sliced models agree, and what they cost, the laws of all other files say: their random architectures lack query
heads wherever a group has several.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import expand_units
from pruning.cost import cost_of
from pruning.errors import InvalidArchitecture, InvalidMask
from pruning.exchanges import exchange_costs
from pruning.importance import activation, within_groups
from pruning.likelihood import dense_distribution
from pruning.masks import PruningMask, Ranking
from pruning.projection import matrix_of
from pruning.refits import Order, fit
from pruning.sequential import SequentialRefits, sequential_refit
from pruning.shrinking import shrink
from pruning.statistics import collect_statistics
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.widths import attention_width

FEWER = attention_width(2, 1)  # both groups, one query head each
MODELS = pytest.mark.parametrize("model", ["llama-biased", "phi3"], indirect=True)
ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)


@MODELS
@pytest.mark.parametrize("order", ["surgeon", "activation"])
def test_the_refit_without_query_heads_is_the_closed_form(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, order: Order, tmp_path: Path
) -> None:
    """Of the columns that the ranking keeps, which are no prefix of the order that whole groups are cut from."""
    block, widths = anatomy.attention, {"attention": [0, attention_width(1, 1), 1, FEWER, 2], "mlp": [0, 24]}
    found = fit(model, windows, widths, TensorFiles(tmp_path), order=order, queries=True)
    again = fit(model, windows, widths, TensorFiles(tmp_path), order=order, queries=True)
    assert found.refits is not None and found.ranking.heads is not None and again.ranking.same(found.ranking)
    plain = fit(model, windows, {"attention": [0, 1, 2], "mlp": [0, 24]}, TensorFiles(None), order=order)
    assert plain.ranking.heads is None and torch.equal(plain.ranking.groups, found.ranking.groups)
    statistics = collect_statistics(model, windows)
    for index, layer in enumerate(anatomy.layers_of(model)):
        sums, output = statistics.blocks["attention"], block.output_of(layer)
        gram, mean = sums.gram[index].double() / windows.numel(), sums.total[index].double() / windows.numel()
        matrix, weight = gram + (len(gram) / windows.numel() * gram.diagonal()).diag(), matrix_of(output).detach()
        if output.bias is not None:
            row = torch.cat([mean.new_ones(1), mean])
            matrix = torch.cat([row[None], torch.cat([mean[:, None], matrix], 1)])
            weight = torch.cat([output.bias.detach()[:, None], weight], 1)
        first = output.bias is not None
        for width in widths["attention"][1:-1]:
            _, heads = found.ranking.kept(index, block, width)
            columns = expand_units(heads, anatomy.head_dim) + first
            columns = torch.cat([torch.zeros(int(first), dtype=torch.long), columns])
            expected = torch.linalg.solve(matrix[columns][:, columns], (matrix @ weight.T)[columns]).T
            torch.testing.assert_close(
                found.refits.weight(index, block, width), expected[:, int(first) :], rtol=0, atol=1e-4
            )


@ONE_FAMILY
def test_the_best_query_heads_of_the_best_groups_stay(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor
) -> None:
    """By energy each head alone is worth what a model says whose every head is a group."""
    found = fit(model, windows, None, TensorFiles(None), queries=True)
    assert found.ranking.heads is not None
    energy = collect_statistics(model, windows).blocks["attention"]
    each = (energy.square * energy.column_norms).unflatten(1, (-1, anatomy.head_dim)).sum(-1)
    assert torch.equal(found.ranking.groups, activation(found.statistics).ranking().groups)
    for scores, groups, heads in zip(each, found.ranking.groups, found.ranking.heads, strict=True):
        inside = heads.view(2, 2)
        assert torch.equal(inside[:, 0] // 2, groups) and torch.equal(inside[:, 1] // 2, groups)
        assert (scores[inside[:, 0]] >= scores[inside[:, 1]]).all()


@ONE_FAMILY
def test_what_a_width_changes_does_not_depend_on_the_others_that_are_tried(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Callable[[Anatomy, int], Ranking]
) -> None:
    """All of them are cut from the widest one's inputs, of which one may be no prefix."""
    ranking, dense = random_ranking(anatomy, 0), dense_distribution(model, windows)
    architecture = Architecture((2, 2, 1, 0, 2), (24, 11, 24, 24, 9), (1, 0, 1, 0, 1))
    widths = [attention_width(1, 1), 1, FEWER, 2]

    def costs(tried: list[int]) -> Tensor:
        both = {"attention": torch.tensor([tried] * 5), "mlp": torch.full((5, 1), 24)}
        with Supernet(model, ranking) as supernet:
            drawn = torch.Generator().manual_seed(0)
            return exchange_costs(supernet, architecture, both, windows, dense, drawn)[0]["attention"]

    together = costs(widths)
    assert together.abs().amax((0, 2)).min() > 0
    for column, width in enumerate(widths):
        torch.testing.assert_close(costs([width])[:, 0], together[:, column], rtol=1e-6, atol=1e-12)


@ONE_FAMILY
def test_refits_in_sequence_are_kept_with_the_order_of_heads(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_ranking: Callable[[Anatomy, int], Ranking]
) -> None:
    ranking, architecture = random_ranking(anatomy, 0), Architecture((2, 2, 1, 0, 2), (24,) * 5, (1, 0, 1, 0, 1))
    with Supernet(model, ranking) as supernet:
        refits = sequential_refit(supernet, architecture, windows)
        kept = SequentialRefits.from_tensors(refits.to_tensors(), "cpu")
        plain = supernet.loss(architecture, windows)
        refitted = supernet.using(kept).loss(architecture, windows)
    small = shrink(model, PruningMask.from_architecture(architecture, ranking), kept)
    assert small.num_parameters() == cost_of(anatomy, architecture).parameters
    assert kept.ranking.same(ranking) and refitted != plain
    assert not kept.ranking.same(replace(ranking, heads=None))


def test_an_architecture_that_lacks_nothing_is_what_it_always_was() -> None:
    whole, fewer = Architecture((2, 1), (3, 3), (0, 0)), Architecture((2, 1), (3, 3), (0, 1))
    assert whole == Architecture((2, 1), (3, 3)) and whole.digest == Architecture((2, 1), (3, 3)).digest
    assert whole.to_dict() == {"kv_groups": [2, 1], "neurons": [3, 3]}
    assert Architecture.from_dict(fewer.to_dict()) == Architecture.of(fewer.units("attention"), fewer.neurons) == fewer
    assert fewer.digest != whole.digest


@pytest.mark.parametrize(
    ("fewer", "message"),
    [((1,), "2 layers, got 1"), ((0, -1), ">= 0"), ((1, 0), "no query heads"), ((0, 2), "2 query heads in a KV group")],
)
def test_query_heads_that_cannot_be_missing_are_refused(
    build: Callable[[str], PreTrainedModel], fewer: tuple[int, ...], message: str
) -> None:
    anatomy = replace(anatomy_of(build("llama")), num_hidden_layers=2)
    with pytest.raises(InvalidArchitecture, match=message):
        Architecture((0, 2), (3, 3), fewer).check(anatomy)


def test_heads_must_be_ranked_and_masked_group_by_group() -> None:
    groups, neurons = torch.tensor([[1, 0]]), torch.arange(3)[None]
    ranking = Ranking(groups, neurons, within_groups(torch.tensor([0, 3, 2, 1]), groups[0], 2)[None])
    assert ranking.heads is not None and ranking.heads.tolist() == [[3, 2, 0, 1]]
    with pytest.raises(InvalidMask, match="follow the order"):
        Ranking(groups, neurons, torch.tensor([[0, 1, 2, 3]]))
    with pytest.raises(InvalidArchitecture, match="query heads"):
        PruningMask.from_architecture(Architecture((1,), (3,), (1,)), replace(ranking, heads=None))
    mask = PruningMask.from_architecture(Architecture((2,), (3,), (1,)), ranking)
    assert mask.heads is not None and mask.heads.tolist() == [[True, False, False, True]]
    for heads in ([[True, True, False, True]], [[True, False, False, False]], [[True, True, True]]):
        with pytest.raises(InvalidMask, match="as many query heads"):
            PruningMask(mask.groups, mask.neurons, torch.tensor(heads))
