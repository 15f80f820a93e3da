"""Candidate -> measurements on proxy windows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.problem.space import SearchSpace
from pruning.choices import Choices, accuracy
from pruning.likelihood import DenseDistribution, window_qualities
from pruning.supernet import Supernet


@dataclass(frozen=True)
class ProxyEvaluator:
    """Measures candidates on fixed windows: every candidate sees the same tokens, so that differences mean something.

    Args:
        supernet: Open for as long as this evaluator is used.
        windows: `num_windows x length` token ids.
        dense: What the dense model predicts on them.
        choices: Multiple-choice items, if accuracy is wanted.
    """

    space: SearchSpace
    supernet: Supernet
    windows: Tensor
    dense: DenseDistribution
    choices: Choices | None = None

    @classmethod
    def on(
        cls, windows: Tensor, space: SearchSpace, supernet: Supernet, choices: Choices | None = None
    ) -> "ProxyEvaluator":
        """An evaluator on `windows`; takes one dense forward pass."""
        return cls(space, supernet, windows, supernet.distribution(windows), choices)

    def evaluate(self, x: tuple[int, ...]) -> dict[str, float]:
        """`kl`, `loss` (nats/token), `perplexity`, `accuracy` if there are items, and every known cost."""
        with self.supernet.active(self.space.decode(x)) as model:
            found = self.measure(model, 0, len(self.windows))
            extra = {} if self.choices is None else {"accuracy": accuracy(model, self.choices)}
        return {**self.values(x, {name: float(part.mean()) for name, part in found.items()}), **extra}

    def measure(self, model: PreTrainedModel, first: int, last: int) -> dict[str, Tensor]:
        """`kl` and `loss` of a candidate on each of some windows, `last - first` each."""
        found = window_qualities(model, self.windows[first:last], self.dense.rows(first, last))
        assert found.kl is not None
        return {"kl": found.kl, "loss": found.loss}

    def values(self, x: tuple[int, ...], quality: Mapping[str, float]) -> dict[str, float]:
        """What `evaluate` returns for this `kl` and `loss`."""
        perplexity = math.exp(min(quality["loss"], 700.0))
        return {**quality, "perplexity": perplexity, **known_values(self.space, x)}


def known_values(space: SearchSpace, x: tuple[int, ...]) -> dict[str, float]:
    """What follows from the architecture alone."""
    point = torch.tensor([x], dtype=torch.float64)
    return {name: float(space.cost(name, point)) for name in space.costs}
