"""Costs by arithmetic equal costs counted on the shrunk model."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.cost import Serving, block_parameters, cost_of, dense_block_parameters
from pruning.masks import PruningMask
from pruning.projection import Projection
from pruning.shrinking import shrink


def test_predicted_equals_counted(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_mask: Callable[..., PruningMask]
) -> None:
    dense = sum(p.numel() for p in anatomy.layers_of(model).parameters())
    for seed in range(8):
        mask = random_mask(anatomy, seed)
        serving = Serving(context=0, sequences=len(windows), bytes_per_value=8)
        cost, small = cost_of(anatomy, mask.architecture, serving), shrink(model, mask)
        blocks = list(anatomy.layers_of(small).parameters())
        assert cost.parameters == sum(p.numel() for p in small.parameters())
        assert cost.block_parameters == sum(p.numel() for p in blocks)
        assert cost.share == cost.block_parameters / dense
        assert cost.weight_bytes == sum(p.nbytes for p in small.parameters())

        multiplied = sum(module.weight.numel() for module in small.modules() if isinstance(module, Projection))
        vectors = sum(p.numel() for p in blocks if p.ndim == 1)  # norms and biases are counted like weights
        assert cost.flops == 2 * (multiplied + vectors)

        with torch.no_grad():
            cache = small(windows[:, :4], use_cache=True).past_key_values  # shorter than any sliding window
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
        assert cost_of(anatomy, mask.architecture, replace(serving, context=4)).kv_bytes == held


def test_the_full_architecture_costs_the_dense_model(model: PreTrainedModel, anatomy: Anatomy) -> None:
    cost = cost_of(anatomy, Architecture.full(anatomy))
    assert cost.share == 1
    assert cost.parameters == model.num_parameters()
    assert cost.block_parameters == dense_block_parameters(anatomy)


def test_many_architectures_at_once(anatomy: Anatomy, random_architecture: Callable[..., Architecture]) -> None:
    architectures = [random_architecture(anatomy, seed) for seed in range(12)]
    expected = torch.tensor([cost_of(anatomy, a).block_parameters for a in architectures])
    groups = torch.tensor([a.units("attention") for a in architectures])  # 12 x L
    neurons = torch.tensor([a.neurons for a in architectures])
    assert torch.equal(block_parameters(anatomy, groups, neurons), expected)
    batched = block_parameters(anatomy, groups.double().view(3, 4, -1), neurons.double().view(3, 4, -1))
    assert batched.dtype == torch.int64
    assert torch.equal(batched, expected.view(3, 4))


def test_cost_never_falls_when_a_unit_is_added(
    anatomy: Anatomy, random_architecture: Callable[..., Architecture]
) -> None:
    small = random_architecture(anatomy, 0, "BBAM-")
    for layer in range(anatomy.num_hidden_layers):
        wider = list(small.kv_groups)
        wider[layer] += 1
        cost, more = cost_of(anatomy, small), cost_of(anatomy, replace(small, kv_groups=tuple(wider)))
        assert more.parameters > cost.parameters
        assert more.flops > cost.flops
        assert more.kv_bytes > cost.kv_bytes


def test_flops_are_what_torch_counts(
    model: PreTrainedModel, anatomy: Anatomy, windows: Tensor, random_mask: Callable[..., PruningMask]
) -> None:
    mask = random_mask(anatomy, 3)
    small, batch = shrink(model, mask), windows[:2, :4]  # shorter than any sliding window
    vectors = sum(p.numel() for p in anatomy.layers_of(small).parameters() if p.ndim == 1)  # added, not multiplied
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        small(batch, use_cache=False)
    whole = cost_of(anatomy, mask.architecture, Serving(context=batch.shape[1])).flops - 2 * vectors
    assert counter.get_total_flops() == whole * batch.numel()  # a prefill computes the masked half of attention too


def test_a_sliding_window_bounds_cache_and_attention(
    anatomy: Anatomy, random_architecture: Callable[..., Architecture]
) -> None:
    architecture = random_architecture(anatomy, 1)
    near, far = (cost_of(anatomy, architecture, Serving(context=context)) for context in (10_000, 20_000))
    fewer = architecture.fewer_queries or (0,) * anatomy.num_hidden_layers
    growing = sum(
        groups for groups, span in zip(architecture.kv_groups, anatomy.attention_spans, strict=True) if span is None
    )
    heads = sum(
        groups * (anatomy.queries_per_group - gone)
        for groups, gone, span in zip(architecture.kv_groups, fewer, anatomy.attention_spans, strict=True)
        if span is None
    )
    assert far.kv_bytes - near.kv_bytes == 2 * growing * anatomy.head_dim * 10_000 * 2
    assert far.flops - near.flops == 4 * heads * anatomy.head_dim * 10_000
