"""The core of `experiments.bits` on a tiny model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.bits.files import Row, better, measured
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export import Pruned
from pruning.export.gguf_size import GgufSize
from pruning.export.quantise import Mixture
from pruning.likelihood import dense_distribution
from pruning.shrinking import shrink_to


@pytest.mark.parametrize("widths", [((2, 2), (64, 64)), ((1, 2), (32, 64))])
def test_fewer_bits_are_smaller_and_worse_and_f32_is_the_model(
    widths: tuple[tuple[int, int], tuple[int, int]], tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
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
