"""Gradients by what a model's head reads, in closed form: autograd would keep copies of the logits in float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pruning.likelihood import CHUNK, DenseDistribution, Head, by_window, divergence_of


@torch.no_grad()
def loss_gradient(hidden: Tensor, head: Head, windows: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gradient of every window's mean next-token loss (nats) with respect to `hidden`, in closed form.

    The loss has gradient softmax - onehot with respect to the logits; computing it in chunks spares autograd's float32
    copies of them, which would cost as much as the rest of the backward pass of a small model.

    Args:
        hidden: `B x T x hidden_size`, after the final norm.
        windows: `B x T` token ids.
        generator: With it, on the device of `hidden`, targets are drawn from what the model predicts instead of taken from the
            text: squares of such gradients estimate the true Fisher information, not the empirical one.

    Returns:
        A `B x T x hidden_size` tensor; the last position predicts nothing and gets zero.
    """
    gradient = torch.zeros_like(hidden)
    targets = windows[:, 1:]
    for window, rows, logits, excess in _probabilities(hidden, head):
        wanted = targets[window, rows, None] if generator is None else _drawn(excess, generator)
        excess.scatter_add_(-1, wanted, excess.new_full((len(excess), 1), -1.0))
        gradient[window, rows] = head.pull_back(logits, excess) / targets.shape[1]
    return gradient


@torch.no_grad()
def divergence_gradients(
    hidden: Tensor, head: Head, dense: DenseDistribution, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by `hidden` of every window's mean KL divergence from the dense model, and of the loss of tokens drawn from this one;
    and that divergence.

    With P the model's probabilities and D the dense model's the first is P - D for the tokens kept, and P scaled by
    1 - D(rest) / P(rest) for all others, which only count together. The second is `loss_gradient`'s.

    Args:
        hidden: `B x T x hidden_size`, after the final norm.
        dense: Of the same `B` windows.
        generator: Draws tokens, on the device of `hidden`.

    Returns:
        Two `B x T x hidden_size` tensors; the last position predicts nothing and gets zero. `B` divergences, float64, on the CPU.
    """
    tokens = torch.empty_like(dense.losses)
    divergence, loss = torch.zeros_like(hidden), torch.zeros_like(hidden)
    predicted = hidden.shape[1] - 1
    for window, rows, logits, excess in _probabilities(hidden, head):
        drawn, ids = _drawn(excess, generator), dense.top_ids[window, rows]
        top = excess.gather(-1, ids)
        excess.scatter_add_(-1, drawn, excess.new_full((len(excess), 1), -1.0))
        loss[window, rows] = head.pull_back(logits, excess) / predicted
        excess.scatter_add_(-1, drawn, excess.new_full((len(excess), 1), 1.0))
        tokens[window, rows] = divergence_of(dense, (window, rows), top.clamp_min(torch.finfo(top.dtype).tiny).log())
        rest = (1 - top.sum(-1, keepdim=True)).clamp_min(torch.finfo(excess.dtype).eps)
        excess.mul_(1 - dense.rest_logprobs[window, rows, None].exp() / rest)
        excess.scatter_(-1, ids, top - dense.top_logprobs[window, rows].exp())
        divergence[window, rows] = head.pull_back(logits, excess) / predicted
    return divergence, loss, by_window(tokens)


def _probabilities(hidden: Tensor, head: Head) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Window, rows, logits (`rows x V`) and next-token probabilities, the caller's to change, of all predicted positions."""
    predicted = hidden.shape[1] - 1
    for window, states in enumerate(hidden):
        for start in range(0, predicted, CHUNK):
            rows = slice(start, min(start + CHUNK, predicted))
            logits = head(states[rows])
            softmax = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
            softmax.sub_(softmax.amax(-1, keepdim=True)).exp_()
            yield window, rows, logits, softmax.div_(softmax.sum(-1, keepdim=True))


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One outcome for each row of `rows x V`, `rows x 1`: one uniform number each, so the draws do not depend on V."""
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(len(probabilities), 1, generator=generator, device=probabilities.device)
    drawn = torch.searchsorted(cumulative, uniform.to(cumulative.dtype) * cumulative[:, -1:], right=True)
    return drawn.clamp_max(probabilities.shape[-1] - 1)  # rounding
