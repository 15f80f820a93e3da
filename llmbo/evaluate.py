"""Candidate -> measurements on proxy windows."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.space import SearchSpace
from pruning.architecture import Architecture
from pruning.likelihood import DenseDistribution, dense_distribution
from pruning.supernet import Supernet


@dataclass(frozen=True)
class ProxyEvaluator:
    """Measures candidates on fixed windows: every candidate sees the same tokens, so that differences mean something.

    Args:
        supernet: Open for as long as this evaluator is used.
        windows: `num_windows x length` token ids.
        dense: What the dense model predicts on them.
    """

    space: SearchSpace
    supernet: Supernet
    windows: Tensor
    dense: DenseDistribution

    @classmethod
    def on(cls, windows: Tensor, space: SearchSpace, supernet: Supernet) -> "ProxyEvaluator":
        """An evaluator on `windows`; takes one dense forward pass."""
        with supernet.active(Architecture.full(space.anatomy)) as model:
            return cls(space, supernet, windows, dense_distribution(model, windows))

    def evaluate(self, x: tuple[int, ...]) -> dict[str, float]:
        """`kl`, `loss` (nats/token), `perplexity`, and every known cost."""
        architecture = self.space.decode(x)
        quality = self.supernet.quality(architecture, self.windows, self.dense)
        assert quality.kl is not None
        return {
            "kl": quality.kl,
            "loss": quality.loss,
            "perplexity": math.exp(min(quality.loss, 700.0)),
            **known_values(self.space, x),
        }


def known_values(space: SearchSpace, x: tuple[int, ...]) -> dict[str, float]:
    """What follows from the architecture alone."""
    point = torch.tensor([x], dtype=torch.float64)
    return {name: float(space.cost(name, point)) for name in space.costs}


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out; torch's CPU allocator raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in str(error) or "out of memory" in str(error))
    )
