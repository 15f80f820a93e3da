"""Candidate -> measurements on proxy windows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.problem.space import SearchSpace
from llmbo.types import Measurement
from pruning.choices import Choices, accuracy
from pruning.likelihood import DenseDistribution, WindowQualities, window_qualities
from pruning.supernet import Supernet

TOGETHER = 16  # candidates; their hidden states of 3072 tokens of an 8B model are 0.4 GB on the host


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

    @property
    def at_once(self) -> int:
        """One where the model stays on its device; where layers are brought, each serves so many candidates."""
        return 1 if self.supernet.resident else TOGETHER

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        """`kl`, `loss` (nats/token), `perplexity`, `accuracy` if there are items, and every known cost of each candidate."""
        architectures = [self.space.decode(x) for x in batch]
        found = self.supernet.qualities(architectures, self.windows, self.dense)
        return [self._complete(x, own) for x, own in zip(batch, found, strict=True)]

    def evaluate_dense(self) -> Measurement:
        """What `evaluate` returns for the dense model, which has seen these windows already."""
        return self._complete(self.space.max_levels, self.dense.qualities)

    def measure(self, model: PreTrainedModel, first: int, last: int) -> dict[str, Tensor]:
        """`kl` and `loss` of a candidate on each of some windows, `last - first` each."""
        return by_window(window_qualities(model, self.windows[first:last], self.dense.rows(first, last)))

    def measured(
        self, x: tuple[int, ...], windows: Mapping[str, Tensor], means: Mapping[str, float] | None = None
    ) -> Measurement:
        """What `evaluate` returns for this `kl` and `loss` by window.

        Args:
            means: Over all windows, where only some were seen.
        """
        quality = means or {name: float(values.mean()) for name, values in windows.items()}
        values = with_perplexity(quality) | known_values(self.space, x)
        return Measurement(values, {name: values.tolist() for name, values in windows.items()})

    def _complete(self, x: tuple[int, ...], found: WindowQualities) -> Measurement:
        values = self.measured(x, by_window(found))
        if self.choices is not None:
            with self.supernet.active(self.space.decode(x)) as model:
                values["accuracy"] = accuracy(model, self.choices)
        return values


def by_window(found: WindowQualities) -> dict[str, Tensor]:
    """`kl` and `loss` by name, `num_windows` each."""
    assert found.kl is not None
    return {"kl": found.kl, "loss": found.loss}


def with_perplexity(quality: Mapping[str, float]) -> dict[str, float]:
    """`kl` and `loss` (nats/token), and what follows from them."""
    return {**quality, "perplexity": math.exp(min(quality["loss"], 700.0))}


def known_values(space: SearchSpace, x: tuple[int, ...]) -> dict[str, float]:
    """What follows from the architecture alone."""
    point = torch.tensor([x], dtype=torch.float64)
    return {name: float(space.cost(name, point)) for name in space.costs}
