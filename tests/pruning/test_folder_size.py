"""The size of a folder's safetensors is known before it is written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export import Pruned
from pruning.export.folder_size import FolderSize
from pruning.export.rebuild import is_stock, rebuilt
from pruning.export.vllm import decilm
from pruning.shrinking import shrink_to

SMALL = 4_000  # bytes of the largest file: several for each model, and large tensors in one of their own


def hf(pruned: Pruned) -> PreTrainedModel:
    return rebuilt(pruned.model, pruned.anatomy, pruned.architecture)


# One with a head of its own, one with tied weights, one whose stock class is written under names of old, one with buffers.
@pytest.mark.parametrize(
    ("name", "writer"),
    [("llama", hf), ("llama", decilm), ("llama-tied", hf), ("llama-tied", decilm), ("gpt-neox", hf), ("apertus", hf)],
)
def test_what_is_written_has_the_size_that_was_foretold(
    name: str, writer: Any, build: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = build(name).bfloat16()
    anatomy = anatomy_of(model)
    most, all_neurons = anatomy.num_key_value_heads, anatomy.intermediate_size
    fewer = most if writer is decilm else 1
    architectures = [
        Architecture.full(anatomy),
        Architecture((0, fewer, 0, most, 0), (5, all_neurons, 0, 0, 11)),
        Architecture((most, 0, 0, fewer, most), (0, 0, all_neurons, 1, 10)),
        Architecture((most, most, 0, most, 0), (9, 9, 0, 9, 0)),  # equal layers
    ]
    if writer is hf and anatomy.attention.queries > 1:
        architectures[2] = Architecture((most, 0, 0, 1, most), (0, 0, all_neurons, 1, 10), (1, 0, 0, 1, 0))
    cuts = [Pruned(shrink_to(model, each), anatomy, each) for each in architectures]
    assert [is_stock(hf(cut)) for cut in cuts] == [True, False, False, True]
    units = [torch.tensor([each.units(kind) for each in architectures]) for kind in ("attention", "mlp")]
    options = {"held": decilm} if writer is decilm else {}
    for most_bytes in (SMALL, 5 * 10**9):
        written = []
        for index, cut in enumerate(cuts):
            folder = tmp_path / f"{most_bytes}-{index}"
            writer(cut).save_pretrained(folder, max_shard_size=most_bytes)
            written.append([file.stat().st_size for file in folder.glob("*.safetensors")])
        assert {len(files) > 1 for files in written} == {most_bytes == SMALL}
        size = FolderSize(model, torch.bfloat16, max_shard_size=most_bytes, **options)
        assert size(*units).tolist() == [sum(files) for files in written]
        assert size(*(each[None, 1:3] for each in units)).shape == (1, 2)
