"""Types searched for a file of a given size, and the refits that go with them."""

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export import Pruned, save_gguf
from pruning.export.gguf_file import write_gguf
from pruning.export.gguf_size import file_size
from pruning.export.llama_cpp import with_weights_of
from pruning.export.quantise import Mixture, Stored, searched_kinds
from pruning.export.searched import Group, _chosen, _costs, _holding, _inputs, _stored, searched
from pruning.likelihood import dense_distribution, frozen, quality
from pruning.projection import matrix_of
from pruning.shrinking import shrink_to

SIZES = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=96, initializer_range=0.2)
GPT_2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
WHOLE, CUT = ((2, 2, 2), (96, 96, 96)), ((0, 1, 2), (64, 32, 0))


def made(config: LlamaConfig, widths: tuple[tuple[int, ...], tuple[int, ...]] | None = None) -> Pruned:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    anatomy = anatomy_of(model)
    architecture = Architecture(*widths) if widths else Architecture.full(anatomy)
    return Pruned(shrink_to(model, architecture), anatomy, architecture)


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(96, (72, 32), generator=torch.Generator().manual_seed(0))


def written(
    pruned: Pruned, mixture: Mixture, path: Path, windows: Tensor, reference: PreTrainedModel
) -> tuple[int, float]:
    """Bytes, and KL of the file's weights from a model."""
    write_gguf(pruned, path, mixture, "x")
    kl = quality(with_weights_of(pruned, path), windows, dense_distribution(reference, windows)).kl
    assert kl is not None
    return path.stat().st_size, kl


@pytest.mark.parametrize(("config", "widths"), [(LLAMA, WHOLE), (LLAMA, CUT), (GPT_2, None)])
def test_a_file_of_a_given_size_is_better_than_a_uniform_one(
    config: LlamaConfig, widths: tuple[tuple[int, ...], tuple[int, ...]] | None, text: Tensor, tmp_path: Path,
    unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]],
) -> None:  # fmt: skip
    """On text that it did not see; through the mixture as well as the refits; input projections stay as they are."""
    given, (own, other) = made(config, widths), text.split([64, 8])
    size, uniform = written(given, Mixture.of("q4_0"), tmp_path / "x.gguf", other, given.model)
    with unchanged(given.model):
        found, mixture, _ = searched(given, size, own, "x", (told := list[int]()).append)
    assert told == [*range(1, 1 + 2 * len(given.anatomy.layers_of(given.model)))]
    exact, kl = written(found, mixture, tmp_path / "x.gguf", other, given.model)
    assert exact == file_size(found, mixture, "x") <= size
    _, without = written(given, mixture, tmp_path / "x.gguf", other, given.model)
    assert kl < 0.95 * without and without < 0.9 * uniform
    changed = {
        name.split(".")[-2]
        for (name, before), after in zip(given.model.named_parameters(), found.model.parameters(), strict=True)
        if not torch.equal(before, after)
    }
    outputs = {block.places.output for block in given.anatomy.blocks}
    assert outputs <= changed | {"c_proj"} and changed <= outputs


def test_no_type_is_coarser_than_it_must_be() -> None:
    """Cheap steps of small groups come before the one of a large group, which alone may have been enough."""
    kinds = (Type.Q8_0, Type.Q5_0, Type.Q4_0)
    groups: dict[Group, list[tuple[int, ...]]] = {"a": [(32, 32)], "b": [(32, 64)], "large": [(32, 1600)]}
    costs = {"a": [0.0, 1e-4, 3e-4], "b": [0.0, 1e-3, 2e-3], "large": [0.0, 1.0, 2.0]}

    def saved(chosen: Mapping[Group, Type]) -> int:
        finest, own = (
            sum(Stored.of(types[name], shape).padded for name, [shape] in groups.items())
            for types in (dict.fromkeys(groups, kinds[0]), chosen)
        )
        return finest - own

    for excess in range(0, saved(dict.fromkeys(groups, kinds[-1])) + 1, 16):
        chosen = _chosen(groups, kinds, costs, excess)
        assert saved(chosen) >= excess
        for group, kind in chosen.items():
            finer = kinds[: kinds.index(kind)][-1:]
            assert not finer or saved(chosen | {group: finer[0]}) < excess


def test_costs_are_what_a_block_alone_costs(text: Tensor) -> None:
    """To second order, so in a fine type; in a coarser one they are larger."""
    given, (fine, coarse) = made(LLAMA, CUT), (Type.Q8_0, Type.Q4_0)
    with frozen(given.model):
        costs = _costs(given, (fine, coarse), text)
    assert sorted(costs) == [(0, "mlp"), (1, "attention"), (1, "mlp"), (2, "attention")]
    assert all(both[1] > 20 * both[0] > 0 for both in costs.values())
    dense = dense_distribution(given.model, text)
    layer, block = given.anatomy.layers_of(given.model)[1], given.anatomy.mlp
    output = block.output_of(layer)
    with _holding([*_inputs(block, layer, fine), (output, _stored(matrix_of(output), fine))]):
        found = quality(given.model, text, dense).kl
    assert costs[1, "mlp"][0] == pytest.approx(found, rel=0.25)


def test_what_no_file_can_be_is_refused_and_what_any_can_be_is_fine(
    text: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # read back, which is faster
    given = made(LLAMA, CUT)
    with pytest.raises(
        UnsupportedExport, match=r"No file .* as small as 9999 bytes: with q4_0 throughout it has \d{5}\. Ask"
    ):
        save_gguf(given, tmp_path / "out", dtype="searched:9999", windows=text)
    assert not list(tmp_path.iterdir())
    found, mixture, told = searched(given, 10**9, text[:2], "x")
    assert (
        told
        == "Types searched for at most 1000.0 MB; no refits to them, which need 320 calibration tokens, and there are 64."
    )
    assert all(torch.equal(*pair) for pair in zip(given.model.parameters(), found.model.parameters(), strict=True))
    assert {kind for _, kind in mixture.patterns} == {Type.Q8_0}
    check = save_gguf(given, tmp_path / "out", dtype="searched:1000000", windows=text)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-searched.gguf"]
    assert [note.split()[0] for note in check.notes[:2]] == ["Types", "Tensors:"]


def test_k_quants_where_they_fit() -> None:
    assert searched_kinds(512) == (Type.Q8_0, Type.Q6_K, Type.Q5_K, Type.Q4_K)
    assert all(kind.name.endswith(("_0", "_1")) for kind in searched_kinds(576))
