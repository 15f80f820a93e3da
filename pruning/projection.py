"""Linear and GPT-2's Conv1D behind one face: `outputs x inputs`, and products with prefixes of them.

`Conv1D` keeps its weight transposed. `matrix_of` gives a view the other way round, so that nothing else has to ask.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

Projection = nn.Linear | Conv1D


def matrix_of(projection: Projection) -> Tensor:
    """The weight as `outputs x inputs`; writing to it writes to the weight."""
    return projection.weight.T if isinstance(projection, Conv1D) else projection.weight


def resize(projection: Projection, matrix: Tensor, bias: Tensor | None) -> None:
    """Make an `outputs x inputs` weight and a bias, both the caller's to give away, those of `projection`."""
    outputs, inputs = matrix.shape
    if isinstance(projection, Conv1D):
        projection.nf, projection.nx, matrix = outputs, inputs, matrix.T
    else:
        projection.out_features, projection.in_features = outputs, inputs
    projection.weight = nn.Parameter(matrix.contiguous(), requires_grad=projection.weight.requires_grad)
    if bias is not None:
        projection.bias = nn.Parameter(bias, requires_grad=projection.bias.requires_grad)


class Narrow(nn.Module):
    """Some rows of a projection, as slices of its weight: `cat_i(x W_i^T + b_i)`. Holds no weight of its own.

    Joining the products rather than the slices costs an activation, `tokens x rows`, instead of a copy of the weights.
    """

    def __init__(self, matrices: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        self.matrices, self.biases = tuple(matrices), tuple(biases)  # tuples, so that torch does not register them

    def forward(self, x: Tensor) -> Tensor:
        products = [F.linear(x, matrix, bias) for matrix, bias in zip(self.matrices, self.biases, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)


class Adapted(nn.Module):
    """A projection with a low-rank change that learns: `W x + b + scale * U D x` (LoRA, arXiv:2106.09685).

    Args:
        projection: `outputs x inputs`, left alone.
        down: D, `rank x inputs`.
        up: U, `outputs x rank`, or some of its rows in parts, as `Narrow` has them.
    """

    def __init__(self, projection: nn.Module, down: Tensor, up: Tensor | Sequence[Tensor], scale: float) -> None:
        super().__init__()
        self.projection, self.down, self.up, self.scale = projection, down, up, scale

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.up] if isinstance(self.up, Tensor) else self.up
        inner = F.linear(x, self.down)
        return self.projection(x) + self.scale * torch.cat([F.linear(inner, part) for part in parts], dim=-1)


def rows_of(projection: nn.Module, parts: Sequence[slice]) -> nn.Module:
    """Some rows of a projection, adapted or not, as views."""
    if isinstance(projection, Adapted):
        up = projection.up
        assert isinstance(up, Tensor)  # nothing takes rows of rows
        return Adapted(
            rows_of(projection.projection, parts), projection.down, [up[part] for part in parts], projection.scale
        )
    assert isinstance(projection, Projection)
    bias = projection.bias
    return Narrow(
        [matrix_of(projection)[part] for part in parts], [None if bias is None else bias[part] for part in parts]
    )
