"""What an architecture costs, by arithmetic alone. Exact, so the search never models it.

Many architectures at once: `kv_groups` and `neurons` are `batch_shape x num_layers` widths (`pruning.widths`), results are
`batch_shape` tensors of int64 where nothing else is said. What can be searched for takes `serving` too, whether it depends on it
or not.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.widths import lacking_of, units_of


@dataclass(frozen=True)
class Serving:
    """How a model will be used.

    Args:
        context: Tokens that a new token attends to, itself included.
        sequences: Sequences served at a time.
        bytes_per_value: Of weights and KV cache, 2 for bfloat16.
    """

    context: int = 2048
    sequences: int = 1
    bytes_per_value: int = 2


@dataclass(frozen=True)
class Cost:
    """Costs of one architecture.

    Args:
        parameters: All parameters, embeddings and head included.
        block_parameters: Parameters of the decoder layers, the only ones that pruning can remove.
        share: `block_parameters` as a share of the dense model's.
        flops: For one token of one sequence, see `flops`.
        kv_bytes: KV cache of all sequences.
        weight_bytes: Weights.
    """

    parameters: int
    block_parameters: int
    share: float
    flops: int
    kv_bytes: int
    weight_bytes: int


def block_parameters(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor) -> Tensor:
    """Parameters of the decoder layers."""
    total = ((kv_groups > 0) | (neurons > 0)).sum(-1) * anatomy.shared_parameters
    for block, widths in ((anatomy.attention, kv_groups), (anatomy.mlp, neurons)):
        kept = block.parameters_at(widths.to(torch.int64))
        total = total + kept.sum(-1) + (widths > 0).sum(-1) * block.fixed_parameters
    return total


def dense_block_parameters(anatomy: Anatomy) -> int:
    """Parameters of the dense model's decoder layers."""
    return anatomy.num_hidden_layers * anatomy.layer_parameters


def parameters(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor, serving: Serving) -> Tensor:
    """All parameters, embeddings and head included."""
    return anatomy.other_parameters + block_parameters(anatomy, kv_groups, neurons)


def parameters_share(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor, serving: Serving) -> Tensor:
    """Parameters of the decoder layers as a share of the dense model's, float64."""
    return block_parameters(anatomy, kv_groups, neurons).double() / dense_block_parameters(anatomy)


def flops(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor, serving: Serving) -> Tensor:
    """Floating-point operations for one token: two per weight of blocks and head, four per query feature and attended token.

    Norms, softmax and activation functions are left out, as is usual.
    """
    weights = block_parameters(anatomy, kv_groups, neurons) + anatomy.vocab_size * anatomy.hidden_size
    widths = kv_groups.to(torch.int64)
    heads = units_of(widths) * (anatomy.queries_per_group - lacking_of(widths))
    attended = heads * _seen(anatomy, serving.context)
    return 2 * weights + 4 * anatomy.head_dim * attended.sum(-1)


def kv_bytes(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor, serving: Serving) -> Tensor:
    """Bytes of the KV cache; layers with a sliding window keep no more than that."""
    return kv_bytes_by_layer(anatomy, kv_groups, serving).sum(-1)


def kv_bytes_by_layer(anatomy: Anatomy, kv_groups: Tensor, serving: Serving) -> Tensor:
    """As `kv_bytes`, `batch_shape x num_layers`."""
    held = units_of(kv_groups.to(torch.int64)) * _seen(anatomy, serving.context)
    return 2 * anatomy.head_dim * serving.sequences * serving.bytes_per_value * held


def weight_bytes(anatomy: Anatomy, kv_groups: Tensor, neurons: Tensor, serving: Serving) -> Tensor:
    """Bytes of all weights."""
    return parameters(anatomy, kv_groups, neurons, serving) * serving.bytes_per_value


def cost_of(anatomy: Anatomy, architecture: Architecture, serving: Serving | None = None) -> Cost:
    """Count the costs of `architecture`."""
    units = torch.tensor(architecture.units("attention")), torch.tensor(architecture.neurons)
    serving = serving or Serving()
    return Cost(
        parameters=int(parameters(anatomy, *units, serving)),
        block_parameters=int(block_parameters(anatomy, *units)),
        share=float(parameters_share(anatomy, *units, serving)),
        flops=int(flops(anatomy, *units, serving)),
        kv_bytes=int(kv_bytes(anatomy, *units, serving)),
        weight_bytes=int(weight_bytes(anatomy, *units, serving)),
    )


def _seen(anatomy: Anatomy, context: int) -> Tensor:
    """Tokens that each layer attends to, `num_layers`."""
    spans = [context if span is None else min(context, span) for span in anatomy.attention_spans]
    return torch.tensor(spans, dtype=torch.int64)
