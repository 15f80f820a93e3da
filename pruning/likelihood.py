"""Next-token loss, and KL divergence from the dense model, without ever holding the full logits in float32.

B: windows.   T: tokens per window.   V: vocabulary.   k: tokens kept of the dense model's distribution.
Everything is in nats and averaged over the T - 1 predicted positions of each window.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.families import find_family

# Rows of logits worked on at once: 256 x 49,152 values fit a CPU's last-level cache in part.
CHUNK = 256
JUDGED = (
    1024  # on a GPU, where with fewer rows the product waits for the head's weights; 1.5 ms a candidate of an 8B model
)
# Values brought to float32 at once on a CPU, where 2 MB stay in the cache of a core: half the time of a whole chunk.
CACHED = 1 << 19
TOP_K = 64


def rows_at_once(device: torch.device) -> int:
    """Rows of logits where nothing but a loss is wanted of them."""
    return JUDGED if device.type == "cuda" else CHUNK


@dataclass(frozen=True)
class Distribution:
    """Next-token distributions, cut to the k likeliest tokens and one bin for all others.

    Merging outcomes can only lower a KL divergence (data-processing inequality), so the result is a lower bound;
    memory is 8k bytes a token instead of 4V.

    Args:
        top_ids: `num_windows x (T-1) x k` token ids.
        top_logprobs: `num_windows x (T-1) x k` log-probabilities, float32 (float64 for float64 logits).
        rest_logprobs: `num_windows x (T-1)` log of the remaining mass, like them.
    """

    top_ids: Tensor
    top_logprobs: Tensor
    rest_logprobs: Tensor

    def rows(self, first: int, last: int) -> Self:
        return type(self)(*(part[first:last] for part in vars(self).values()))


@dataclass(frozen=True)
class DenseDistribution(Distribution):
    """The dense model's.

    Args:
        losses: `num_windows x (T-1)`, of the text's own next tokens, like the log-probabilities.
    """

    losses: Tensor

    @property
    def qualities(self) -> "WindowQualities":
        """The dense model's own: it does not diverge from itself."""
        loss = by_window(self.losses)
        return WindowQualities(loss, torch.zeros_like(loss))


@dataclass(frozen=True)
class Head:
    """From the decoder's last hidden states to logits, for as many rows at once as the caller likes.

    Args:
        projection: `hidden_size -> V`.
        softcap: Gemma 2 squeezes logits into (-softcap, softcap) by a tanh; None in most families.
        scale: Granite and Cohere multiply logits by a number; 1 in most families.
    """

    projection: nn.Linear
    softcap: float | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        config, family = model.config, find_family(model.config.model_type)
        scale = getattr(config, family.logits_times, 1.0) / getattr(config, family.logits_over, 1.0) if family else 1.0
        return cls(model.get_output_embeddings(), getattr(config, "final_logit_softcapping", None), scale)

    def to(self, dtype: torch.dtype) -> Self:
        """A copy with weights of this dtype: autocast would make one for every chunk of rows."""
        return replace(self, projection=copy.deepcopy(self.projection).to(dtype))

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.projection(hidden)
        if self.scale != 1:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    def pull_back(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by the hidden states from the one by the logits; d(c tanh(u/c))/du = 1 - tanh(u/c)^2."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).to(gradient.dtype) ** 2)
        gradient = gradient if self.scale == 1 else gradient * self.scale
        return gradient.to(self.projection.weight.dtype) @ self.projection.weight


@dataclass(frozen=True)
class Quality:
    """How well a model predicts some windows. Nats per token; lower is better. `kl` is None without a dense reference."""

    loss: float
    kl: float | None


def dense_distribution(
    model: PreTrainedModel, windows: Tensor, batch_size: int = 4, k: int = TOP_K
) -> DenseDistribution:
    """Remember what `model` predicts on `windows` (`num_windows x T` token ids)."""
    batches = windows.split(batch_size)
    states = (last_hidden(model, batch.to(model.device)) for batch in batches)
    return distribution_of(Head.of(model), batches, states, k)


@torch.inference_mode()
def distribution_of(
    head: Head, batches: Sequence[Tensor], states: Iterable[Tensor], k: int = TOP_K
) -> DenseDistribution:
    """The distributions behind what a model's head reads; `batches` and `states` as in `judged`."""
    parts: list[tuple[Tensor, ...]] = []
    for targets, logits, normaliser in _predictions(head, batches, states):
        top, index = logits.topk(min(k, logits.shape[-1] - 1), dim=-1)
        logprob = top.to(normaliser.dtype) - normaliser[:, None]
        parts.append((index, logprob, _log_rest(logprob), _losses(targets, logits, normaliser)))
    shape = (-1, batches[0].shape[1] - 1)
    return DenseDistribution(*(torch.cat(part).unflatten(0, shape) for part in zip(*parts, strict=True)))


@dataclass(frozen=True)
class WindowQualities:
    """Quality window by window, in nats per token.

    Args:
        loss: `num_windows`, float64, on the CPU.
        kl: `num_windows`, float64, on the CPU; None without a dense reference.
    """

    loss: Tensor
    kl: Tensor | None

    def mean(self) -> Quality:
        return Quality(self.loss.mean().item(), None if self.kl is None else self.kl.mean().item())


def quality(
    model: PreTrainedModel, windows: Tensor, dense: DenseDistribution | None = None, batch_size: int = 4
) -> Quality:
    """Loss of `model` on `windows`, and its KL divergence from the dense model when `dense` was taken on the same windows.

    One pass gives both. Waits for the device once, at the end.
    """
    return window_qualities(model, windows, dense, batch_size).mean()


def window_qualities(
    model: PreTrainedModel, windows: Tensor, dense: DenseDistribution | None = None, batch_size: int = 4
) -> WindowQualities:
    """As `quality`, for every window of its own."""
    batches = windows.split(batch_size)
    states = (last_hidden(model, batch.to(model.device)) for batch in batches)
    return judged(Head.of(model), batches, states, dense)


@torch.inference_mode()
def judged(
    head: Head, batches: Sequence[Tensor], states: Iterable[Tensor], dense: DenseDistribution | None = None
) -> WindowQualities:
    """The quality of what a model's head reads on some windows.

    Args:
        batches: Token ids, `B x T` each.
        states: For each batch `B x T x hidden_size`, made when its turn comes.
        dense: The dense model's distribution on all of them.
    """
    losses, kls = [], []  # of tokens
    first, shape = 0, (sum(map(len, batches)), -1)
    flat = dense and DenseDistribution(*(part.flatten(0, 1) for part in vars(dense).values()))
    for targets, logits, normaliser in _predictions(head, batches, states):
        losses.append(_losses(targets, logits, normaliser))
        if flat:
            rows = slice(first, first + len(logits))
            top = logits.gather(-1, flat.top_ids[rows]).to(normaliser.dtype) - normaliser[:, None]
            kls.append(divergence_of(flat, rows, top))
        first += len(logits)
    return WindowQualities(
        by_window(torch.cat(losses).view(shape)), by_window(torch.cat(kls).view(shape)) if dense else None
    )


def _predictions(
    head: Head, batches: Sequence[Tensor], states: Iterable[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The token that came next, logits (`rows x V`) and their `log_normaliser`, for all predicted positions in their order."""
    for batch, hidden in zip(batches, states, strict=True):
        targets = batch[:, 1:].flatten().to(hidden.device)
        some = rows_at_once(hidden.device)
        for wanted, rows in zip(targets.split(some), hidden[:, :-1].flatten(0, 1).split(some), strict=True):
            logits = head(rows)
            yield wanted, logits, log_normaliser(logits)


def _losses(targets: Tensor, logits: Tensor, normaliser: Tensor) -> Tensor:
    return normaliser - logits.gather(-1, targets[:, None]).squeeze(-1).to(normaliser.dtype)


def by_window(tokens: Tensor) -> Tensor:
    """`num_windows x (T-1)` -> `num_windows` means, float64, on the CPU: not every device has float64."""
    return tokens.cpu().double().mean(-1)


def last_hidden(model: PreTrainedModel, batch: Tensor, leaf: bool = False) -> Tensor:
    """What the head reads, `B x T x hidden_size`.

    Args:
        leaf: Let gradients reach every activation, from the embeddings on: in a frozen model nothing else asks for them.
    """
    inputs = model.get_input_embeddings()(batch).detach().requires_grad_(leaf)
    return model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no weight gradients inside, and restore every flag afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


def log_normaliser(logits: Tensor) -> Tensor:
    """log sum exp over the vocabulary in float32 (float64 for float64 logits), `rows x V` -> `rows`."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.device.type == "cuda":  # one kernel instead of five passes over the values
        return logits[:, 0].to(dtype) - logits.log_softmax(-1, dtype=dtype)[:, 0]
    rows = max(1, CACHED // logits.shape[-1]) if logits.device.type == "cpu" else CHUNK
    sums = []
    for part in logits.split(rows):
        highest = part.amax(-1, keepdim=True)
        shifted = part.to(dtype, copy=True).sub_(highest)  # one buffer, worked on in place
        sums.append(shifted.exp_().sum(-1).log_() + highest.squeeze(-1).to(dtype))
    return torch.cat(sums)


def _log_rest(logprobs: Tensor) -> Tensor:
    """log(1 - sum exp) of `rows x k` log-probabilities, kept finite when the k tokens hold (nearly) all the mass."""
    eps = torch.finfo(logprobs.dtype).eps
    return torch.log((1 - logprobs.exp().sum(-1)).clamp_min(eps))


def divergence_of(dense: DenseDistribution, rows: Any, top: Tensor) -> Tensor:
    """KL divergence from the dense model's distribution, token by token.

    Args:
        rows: Where in it these tokens are.
        top: Log-probabilities of its kept tokens, `num_tokens x k`.
    """
    kept, rest = dense.top_logprobs[rows], dense.rest_logprobs[rows]
    return (kept.exp() * (kept - top)).sum(-1) + rest.exp() * (rest - _log_rest(top))
