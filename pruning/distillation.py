"""Learning what the dense model predicts: the forward KL divergence of its next-token distributions, with its gradient in closed form.

With P what the pruned model predicts and D what the dense one does, the divergence has gradient P - D with respect to the logits; where
D is cut to its likeliest tokens and one bin for all others, tokens in the bin get P scaled by 1 - D(bin) / P(bin). The loss of the text's
own next tokens is the case where D is sure of them. No logits are kept for a backward pass, nor more than a few hundred rows made at once.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruning.likelihood import CHUNK, Distribution, Head, log_normaliser

DEVICE_CHUNK = 2048  # rows of logits at once on a device that wants to be kept busy
NEVER = -1e4  # the logarithm of nothing, kept finite: its exponential is 0 in every dtype


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor, head: Head, target: "Tensor | Distribution", dense_head: Any) -> Tensor:
        """Mean divergence over the predicted positions of `B x T x hidden_size`; keeps its gradient by them."""
        states = hidden[:, :-1].flatten(0, 1).detach()
        gradient = torch.empty_like(states)
        rows_at_once = CHUNK if hidden.device.type == "cpu" else DEVICE_CHUNK
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(states), rows_at_once):
            rows = slice(start, start + rows_at_once)
            logits = head(states[rows])
            normaliser = log_normaliser(logits)
            if isinstance(target, Tensor):
                lost, excess = _whole(logits, normaliser, dense_head(target[:, :-1].flatten(0, 1)[rows]))
            else:
                lost, excess = _cut(logits, normaliser, target, rows)
            total += lost
            gradient[rows] = head.pull_back(logits, excess).to(gradient.dtype)
        whole = torch.zeros_like(hidden)
        whole[:, :-1] = gradient.div_(len(states)).view_as(whole[:, :-1])
        context.save_for_backward(whole)
        return total / len(states)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (whole,) = context.saved_tensors
        return whole * gradients[0], None, None, None


def _log_probabilities(logits: Tensor, normaliser: Tensor) -> Tensor:
    """`rows x V`, the caller's to change."""
    return logits.to(normaliser.dtype, copy=True).sub_(normaliser[:, None])


def _whole(logits: Tensor, normaliser: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Summed divergence from the distribution with logits `dense`, and its gradient by `logits`, `rows x V`."""
    own, wanted = _log_probabilities(logits, normaliser), _log_probabilities(dense, log_normaliser(dense))
    apart = wanted - own
    wanted.exp_()
    lost = (wanted * apart).sum()
    return lost, own.exp_().sub_(wanted)


def _cut(logits: Tensor, normaliser: Tensor, target: Distribution, rows: slice) -> tuple[Tensor, Tensor]:
    """The same from a distribution that is cut to its likeliest tokens."""
    ids = target.top_ids.flatten(0, 1)[rows].long()
    top = target.top_logprobs.flatten(0, 1)[rows].to(normaliser.dtype)
    rest = target.rest_logprobs.flatten()[rows].to(normaliser.dtype)
    excess = _log_probabilities(logits, normaliser)
    own = excess.gather(-1, ids)
    excess.exp_()
    left = (1 - own.exp().sum(-1)).clamp_min(torch.finfo(excess.dtype).eps)
    lost = (top.exp() * (top - own)).sum() + (rest.exp() * (rest - left.log())).sum()
    excess.mul_(1 - (rest.exp() / left)[:, None])
    excess.scatter_(-1, ids, own.exp() - top.exp())
    return lost, excess


def divergence(hidden: Tensor, head: Head, target: Distribution) -> Tensor:
    """Mean KL divergence of what `head` makes of some windows from what the dense model predicts there, nats per token.

    Gradients reach `hidden` alone: the head does not learn.

    Args:
        hidden: `B x T x hidden_size`, what the head reads.
        target: Of the same `B` windows; `next_tokens` makes it the text's own loss.
    """
    return _Divergence.apply(hidden, head, target, None)


def divergence_from(hidden: Tensor, head: Head, dense: Tensor, dense_head: Head) -> Tensor:
    """The same from all that the dense model predicts.

    Args:
        dense: `B x T x dense_hidden_size`, what `dense_head` reads.
    """
    return _Divergence.apply(hidden, head, dense, dense_head)


@contextmanager
def heard(layers: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """What some decoder layers hand on while the context lasts, `B x T x hidden_size` each, in the order in which they run."""
    found: list[Tensor] = []

    def listen(layer: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(listen).remove)
        yield found


def distance(own: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Mean squared distance of some residual streams from the dense model's, each token's relative to its square there.

    Minitron (arXiv:2407.14679) adds hidden states to the loss. Relative, because a few tokens' streams are hundreds of times as long as
    others'.

    Args:
        own, dense: `B x T x hidden_size` each, as many of either.
    """
    apart = [
        ((one.float() - other.float()).square().sum(-1) / other.float().square().sum(-1)).mean()
        for one, other in zip(own, dense, strict=True)
    ]
    return torch.stack(apart).mean()


def next_tokens(windows: Tensor) -> Distribution:
    """The distribution that is sure of the text: `B x T` token ids, of which each is predicted from those before it."""
    ids = windows[:, 1:, None]
    sure = torch.zeros(ids.shape, device=windows.device)
    return Distribution(ids, sure, torch.full_like(sure[..., 0], NEVER))
