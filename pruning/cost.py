"""What an architecture costs, by arithmetic alone. Exact, so the search never models it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture


@dataclass(frozen=True)
class Cost:
    """Costs of one architecture.

    Args:
        parameters: All parameters, embeddings and head included.
        block_parameters: Parameters of the decoder layers, the only ones that pruning can remove.
        share: `block_parameters` as a share of the dense model's.
        flops_per_token: Multiply-adds counted twice, for one token without the part of attention that grows with context.
        kv_bytes_per_token: KV cache per token at `bytes_per_value`.
        weight_bytes: Weights at `bytes_per_value`.
    """

    parameters: int
    block_parameters: int
    share: float
    flops_per_token: int
    kv_bytes_per_token: int
    weight_bytes: int


def block_parameters(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor) -> Tensor:
    """Parameters of the decoder layers for many architectures at once.

    Args:
        kv_groups: `batch_shape x num_layers` KV groups kept.
        neurons: `batch_shape x num_layers` neurons kept.

    Returns:
        A `batch_shape` tensor of int64.
    """
    total = torch.zeros((), dtype=torch.int64)
    for block, units in ((anatomy.attention, kv_groups), (anatomy.mlp, neurons)):
        units = units.to(torch.int64)
        total = total + units.sum(-1) * block.parameters_per_unit + (units > 0).sum(-1) * block.fixed_parameters
    return total


def dense_block_parameters(anatomy: Anatomy) -> int:
    """Parameters of the dense model's decoder layers."""
    return anatomy.num_hidden_layers * sum(
        block.units * block.parameters_per_unit + block.fixed_parameters for block in anatomy.blocks
    )


def cost_of(anatomy: Anatomy, architecture: Architecture, bytes_per_value: int = 2) -> Cost:
    """Count the costs of `architecture`; `bytes_per_value` is 2 for bfloat16."""
    blocks = int(block_parameters(anatomy, torch.tensor(architecture.kv_groups), torch.tensor(architecture.neurons)))
    parameters = anatomy.other_parameters + blocks
    matmul = blocks + anatomy.vocab_size * anatomy.hidden_size  # the head multiplies even when its weights are tied
    return Cost(
        parameters=parameters,
        block_parameters=blocks,
        share=blocks / dense_block_parameters(anatomy),
        flops_per_token=2 * matmul,
        kv_bytes_per_token=2 * sum(architecture.kv_groups) * anatomy.head_dim * bytes_per_value,
        weight_bytes=parameters * bytes_per_value,
    )
