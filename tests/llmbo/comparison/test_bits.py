"""The core of `experiments.bits` on a tiny model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from experiments.bits.files import Row, better, measured
from experiments.bits.prices import built, cheapest_of, choices_of, costs_around, head_costs, of_widths
from experiments.bits.refits import QuantisedRefits, fit_after
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import BlockKind
from pruning.compensation import CompensationTable
from pruning.export import Pruned
from pruning.export.gguf_size import GgufSize, file_size
from pruning.export.quantise import Mixture
from pruning.likelihood import dense_distribution, quality
from pruning.masks import PruningMask, Ranking
from pruning.shrinking import shrink, shrink_to
from pruning.statistics import collect_statistics
from pruning.tensor_files import TensorFiles


def tiny() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("widths", [((2, 2), (64, 64)), ((1, 2), (32, 64))])
def test_fewer_bits_are_smaller_and_worse_and_f32_is_the_model(
    widths: tuple[tuple[int, int], tuple[int, int]], tmp_path: Path
) -> None:
    model = tiny()
    windows, architecture = (
        torch.randint(96, (2, 32), generator=torch.Generator().manual_seed(0)),
        Architecture(*widths),
    )
    pruned = Pruned(shrink_to(model, architecture), anatomy_of(model), architecture)
    own = dense_distribution(pruned.model, windows)
    rows = [
        measured(pruned, tmp_path / "x.gguf", Mixture.of(kind), windows, own, windows)
        for kind in ("f32", "q8_0", "q5_0", "q4_0")
    ]
    assert rows[0].kl < 1e-6 and better(rows) == rows[::-1]
    for row in rows:
        size = GgufSize(model, None, Mixture.of(row.kind), "bits")(*map(torch.tensor, widths))
        assert (row.size, row.share < 1) == (int(size), widths[0][0] == 1)


def test_what_is_beaten() -> None:
    small, large, worse = Row(0.5, "q4_0", 10, (0.5,)), Row(1.0, "q8_0", 20, (0.1,)), Row(0.8, "q8_0", 20, (0.3,))
    assert better([worse, large, small]) == [small, large]


def test_what_nothing_is_lost_by_costs_nothing_and_choices_become_a_file(
    tmp_path: Path, random_ranking: Callable[[Anatomy, int], Ranking]
) -> None:
    """Around a pruned member, whose refits are the table's: in a type without loss they are the same, and so is all that is built."""
    model, windows = tiny(), torch.randint(96, (8, 32), generator=torch.Generator().manual_seed(0))
    anatomy, statistics = anatomy_of(model), collect_statistics(model, windows)
    table = CompensationTable(model, statistics, random_ranking(anatomy, 0))
    files, architecture = TensorFiles(None), Architecture((1, 2), (64, 32))
    fit_after(model, windows, table.ranking, ("f32",), files)
    refits = QuantisedRefits(model, table, files)
    for block, units in ((anatomy.attention, 1), (anatomy.mlp, 32)):
        exact = table.weight(1, block, units)
        torch.testing.assert_close(refits.weight(1, block, units, "f32"), exact, rtol=1e-3, atol=1e-4)
    widths: dict[BlockKind, Tensor] = {"attention": torch.tensor([[1, 2]] * 2), "mlp": torch.tensor([[32, 64]] * 2)}
    dense, kinds = dense_distribution(model, windows), ("q8_0", "f32")
    costs = costs_around(model, architecture, widths, kinds, refits, windows, dense)
    own = torch.stack([costs["attention"][[0, 1], [0, 1]], costs["mlp"][[0, 1], [1, 0]]])  # block, layer, type
    assert own[..., 1].abs().max() < 1e-5 < own[..., 0].abs().min()
    choices = of_widths(
        choices_of(anatomy, widths, kinds, costs, head_costs(model, kinds, windows, dense)), architecture
    )
    finest = [own[-1] for own in choices]
    least = cheapest_of(choices, sum(choice.size for choice in finest) - 1)
    assert least and any(choice.kind == "q8_0" for choice in least) and cheapest_of(choices, 100) is None
    kl = quality(shrink(model, PruningMask.from_architecture(architecture, table.ranking), table), windows, dense).kl
    row = measured(
        *(made := built(model, None, finest, refits, "x"))[:1], tmp_path / "x", made[1], windows, dense, windows
    )
    assert row.kl == pytest.approx(kl, rel=1e-2) and row.size == file_size(*made, "bits")
