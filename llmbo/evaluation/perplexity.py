"""Loss and perplexity of one model on one text, with the recipe that makes the number reproducible.

Every token is predicted exactly once (the first only if a BOS token stands before it), from at most `window - 1` tokens of
context. A smaller stride gives more context and takes longer; the defaults are disjoint targets.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmbo.errors import ConfigError
from llmbo.models.checks import check_tokens
from pruning.calibration import adds_bos
from pruning.errors import NotEnoughText
from pruning.text import Text

LOGIT_VALUES = 1 << 26  # at a time: 256 MB in float32


@dataclass(frozen=True)
class Recipe:
    """What a perplexity depends on beside the model.

    Args:
        source, sha256: The text.
        window: Longest input in tokens, BOS included.
        stride: Tokens predicted per window.
        bos: Whether a BOS token stands before every window.
        tokens: Tokens predicted.
    """

    source: str
    sha256: str
    window: int
    stride: int
    bos: bool
    tokens: int

    def __str__(self) -> str:
        return (
            f"text {self.source} (sha256 {self.sha256[:12]}), {self.tokens} tokens predicted once each, window {self.window}, "
            f"stride {self.stride}, BOS before every window: {'yes' if self.bos else 'no'}"
        )


@dataclass(frozen=True)
class Perplexity:
    """`loss` in nats per token; `perplexity` is its exponential. Lower is better."""

    loss: float
    recipe: Recipe

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True)
class Piece:
    """A window of token ids (`T`) whose last `scored` tokens are predicted."""

    tokens: Tensor
    scored: int


def pieces(ids: Tensor, window: int, stride: int, bos: int | None) -> Iterator[Piece]:
    """Cut `n` token ids into windows that predict every token once.

    Args:
        bos: Token id put before every window; it counts towards `window`.
    """
    prefix = ids.new_tensor([] if bos is None else [bos])
    for first in range(1 - len(prefix), len(ids), stride):
        last = min(first + stride, len(ids))
        start = max(0, last - window + len(prefix))
        yield Piece(torch.cat([prefix, ids[start:last]]), last - first)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    window: int,
    stride: int,
    max_tokens: int = 0,
    on_token: Callable[[int], None] = lambda done: None,
) -> Perplexity:
    """Measure `model` on the first `max_tokens` tokens of `text` (0: all of them).

    Raises:
        ConfigError: A window or stride that cannot be used with this model.
        NotEnoughText: Fewer than two tokens.
    """
    check_window(model.config, window, stride)
    found = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(found[: max_tokens or None], dtype=torch.long)
    bos = tokenizer.bos_token_id if adds_bos(tokenizer) else None
    if len(ids) < 2:
        raise NotEnoughText(f"The text '{text.source}' holds {len(ids)} tokens, at least 2 are needed.")
    check_tokens(model, tokenizer, ids, ids.new_tensor([] if bos is None else [bos]))
    total, done = torch.zeros((), dtype=torch.float64), 0
    for batch in _batches(list(pieces(ids, window, stride, bos)), model.config.get_text_config().vocab_size):
        total += _loss_sum(model, torch.stack([piece.tokens for piece in batch]).to(model.device), batch[0].scored)
        done += sum(piece.scored for piece in batch)
        on_token(done)
    recipe = Recipe(text.source, text.sha256, window, stride, bos is not None, done)
    return Perplexity(total.item() / done, recipe)


def check_window(config: PreTrainedConfig, window: int, stride: int) -> None:
    """Raise ConfigError unless a model with this config can be measured so."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or window
    if not 2 <= window <= positions:
        raise ConfigError(f"--window must lie between 2 and the model's {positions} positions, got {window}.")
    if not 1 <= stride < window:
        raise ConfigError(f"--stride must lie between 1 and {window - 1} (one less than the window), got {stride}.")


def _batches(cut: Sequence[Piece], vocab_size: int) -> Iterator[list[Piece]]:
    """Neighbours of equal shape, as many as the logits leave room for."""
    for (length, _), same in groupby(cut, key=lambda piece: (len(piece.tokens), piece.scored)):
        group, size = list(same), max(1, LOGIT_VALUES // (length * vocab_size))
        yield from (group[first : first + size] for first in range(0, len(group), size))


@torch.inference_mode()
def _loss_sum(model: PreTrainedModel, windows: Tensor, scored: int) -> Tensor:
    """Summed loss of the last `scored` tokens of `B x T` windows, in nats. The model's own logits, whatever it does to them."""
    logits = model(windows, use_cache=False).logits[:, -scored - 1 : -1].float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, -scored:].flatten(), reduction="sum").cpu().double()
