"""Anatomy reads a supported decoder's sizes, and refuses anything else in the user's words."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    PersimmonConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pruning.anatomy import Anatomy, anatomy_of, family_of
from pruning.architecture import Architecture
from pruning.block import Rows
from pruning.errors import UnsupportedModel
from pruning.masks import PruningMask, Ranking
from pruning.projection import matrix_of
from pruning.refusals import REASONS
from pruning.shrinking import shrink


def test_sizes_are_the_configs(model: PreTrainedModel, anatomy: Anatomy) -> None:
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        assert getattr(anatomy, name) == getattr(model.config, name)
    heads = model.config.num_attention_heads
    assert (anatomy.num_attention_heads, anatomy.heads_as_one) == (heads, 1)
    assert anatomy.num_key_value_heads == getattr(model.config, "num_key_value_heads", heads)
    assert anatomy.mlp.units == anatomy.intermediate_size == 24
    assert anatomy.attention.units * anatomy.queries_per_group == anatomy.num_attention_heads
    assert len(anatomy.layers_of(model)) == 5


def test_units_tile_every_projection(model: PreTrainedModel, anatomy: Anatomy) -> None:
    for layer in anatomy.layers_of(model):
        for block in anatomy.blocks:
            assert matrix_of(block.output_of(layer)).shape[1] == block.columns == block.units * block.columns_per_unit
            for projection, rows in block.inputs_of(layer):
                assert len(matrix_of(projection)) == rows.total == block.units * rows.per_unit
                owned = torch.cat([rows.of(torch.tensor([unit])) for unit in range(block.units)])
                assert owned.sort().values.tolist() == list(range(rows.total))


@pytest.mark.parametrize("parts", [(3,), (2, 1, 1), (1, 1)])
def test_rows_of_leading_units_are_a_run_in_every_part(parts: tuple[int, ...]) -> None:
    rows = Rows(parts, units=4)
    for units in range(5):
        runs = [torch.arange(part.start, part.stop) for part in rows.prefix(units)]
        assert rows.of(torch.arange(units)).tolist() == torch.cat(runs).tolist()
    backwards = torch.arange(3, -1, -1)
    assert rows.of(backwards)[: parts[0]].tolist() == list(range(3 * parts[0], 4 * parts[0]))
    assert rows.of(backwards)[rows.of(backwards).argsort()].tolist() == list(range(rows.total))


def test_fixed_parameters_are_norms_and_output_biases(model: PreTrainedModel, anatomy: Anatomy) -> None:
    layer = anatomy.layers_of(model)[0]
    for block in anatomy.blocks:
        inputs = {id(p) for projection, _ in block.inputs_of(layer) for p in projection.parameters()}
        cut = inputs | {id(block.output_of(layer).weight)}
        stay = [block.update_of(layer), block.output_of(layer)]
        stay += [getattr(layer, block.places.norm)] if block.places.norm else []
        stay += [
            module for module in block.module_of(layer).children() if block.places.module
        ]  # norms of queries and keys
        kept = {id(p): p.numel() for module in stay for p in module.parameters() if id(p) not in cut}
        assert block.fixed_parameters == sum(kept.values())


def test_parameters_add_up(model: PreTrainedModel, anatomy: Anatomy) -> None:
    total = anatomy.other_parameters + anatomy.num_hidden_layers * anatomy.layer_parameters
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("model", ["olmo2"], indirect=True)
def test_heads_that_are_normalised_together_are_one(anatomy: Anatomy) -> None:
    """As many queries to a key as ever, and as wide: costs of attention and cache count what is there."""
    assert (anatomy.heads_as_one, anatomy.num_key_value_heads) == (2, 1)
    assert (anatomy.num_attention_heads, anatomy.queries_per_group, anatomy.head_dim) == (2, 2, 16)
    assert anatomy.attention.columns == 4 * 8


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_layers_can_be_replaced(model: PreTrainedModel, anatomy: Anatomy) -> None:
    layers = nn.ModuleList(list(anatomy.layers_of(model))[:2])
    anatomy.set_layers(model, layers)
    assert anatomy.layers_of(model) is layers
    assert len(list(model.model.layers)) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2)),
        lambda: BertLMHeadModel(
            BertConfig(vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        ),
    ],
    ids=["bloom", "bert"],
)
def test_other_families_are_refused_by_name(other: Callable[[], PreTrainedModel]) -> None:
    model = other()
    with pytest.raises(UnsupportedModel) as error:
        anatomy_of(model)
    assert f"'{model.config.model_type}' is not supported: {REASONS[model.config.model_type]}." in str(error.value)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixtral", "mixture of experts"), ("deepseek_v3", "mixture of experts"), ("mamba", "state-space"),
        ("t5", "encoder-decoder"), ("bart", "encoder-decoder"), ("bert", "an encoder"), ("vit", "no causal language model"),
    ],
)  # fmt: skip
def test_what_no_row_can_hold_is_refused_with_the_reason(kind: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{kind}' is not supported: .*{reason}.*\\.$"):
        family_of(AutoConfig.for_model(kind))


def test_a_type_that_nothing_is_known_of_is_refused_with_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(REASONS, "persimmon")
    with pytest.raises(UnsupportedModel, match=r"'persimmon' .*there is no row for it.* gpt2, .* llama, "):
        family_of(PersimmonConfig())
    config = PersimmonConfig()
    config.num_local_experts = 8
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        family_of(config)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OPTConfig(do_layer_norm_before=False), "do_layer_norm_before=True"),
        (GPT2Config(add_cross_attention=True), "add_cross_attention=False"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=False"),
    ],
)
def test_variants_that_do_not_fit_are_refused_by_name(config: PreTrainedConfig, said: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{config.model_type}' .* with {said}"):
        family_of(config)


@pytest.mark.parametrize("headless", [LlamaModel, LlamaForSequenceClassification])
@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_decoder_without_language_model_head_is_refused(
    model: PreTrainedModel, headless: type[PreTrainedModel]
) -> None:
    with pytest.raises(UnsupportedModel, match="head"):
        anatomy_of(headless(model.config))


@pytest.mark.parametrize("neurons", [20, 24])
@pytest.mark.parametrize("model", ["llama", "llama-biased"], indirect=True)
def test_unequal_layers_are_refused_with_the_layer(model: PreTrainedModel, neurons: int) -> None:
    mlp, bias = model.model.layers[3].mlp, model.model.layers[3].mlp.up_proj.bias is None  # as wide, but other biases
    mlp.gate_proj, mlp.up_proj = nn.Linear(32, neurons, bias), nn.Linear(32, neurons, bias)
    mlp.down_proj = nn.Linear(neurons, 32, bias)
    with pytest.raises(UnsupportedModel, match=r"Layer 3 .* unequal"):
        anatomy_of(model)


@pytest.mark.parametrize(
    "small",
    [
        Architecture((1,) * 5, (24,) * 5),
        Architecture((2,) * 5, (12,) * 5),
        Architecture((0, 2, 2, 2, 2), (24,) * 5),
        Architecture((2,) * 5, (0, 24, 24, 24, 24)),
        Architecture((2, 2, 2, 2, 1), (24,) * 5),
    ],
    ids=["fewer groups", "fewer neurons", "no first attention", "no first MLP", "thin last layer"],
)
@pytest.mark.parametrize("model", ["llama", "qwen3", "phi3"], indirect=True)
def test_a_shrunk_model_is_never_read_with_the_dense_sizes(model: PreTrainedModel, small: Architecture) -> None:
    """Its config still tells the dense widths: refusing is right, believing the config is not."""
    ranking = Ranking(torch.arange(2).repeat(5, 1), torch.arange(24).repeat(5, 1))
    with pytest.raises(UnsupportedModel):
        anatomy_of(shrink(model, PruningMask.from_architecture(small, ranking)))
