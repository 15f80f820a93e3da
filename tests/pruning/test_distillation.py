"""The divergence from the dense model is the textbook one, and so is its gradient."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pruning import distillation
from pruning.distillation import divergence, divergence_from, next_tokens
from pruning.likelihood import Head, distribution_of

VOCABULARY = 23
WINDOWS = torch.arange(12).view(2, 6)


@pytest.fixture(params=[None, 3.0], ids=["plain", "softcap"])
def heads(request: pytest.FixtureRequest) -> tuple[Head, Head]:
    """A student's and its teacher's, of other sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tuple(Head(nn.Linear(size, VOCABULARY, bias=False).double(), request.param, 2.0) for size in (5, 7))  # type: ignore[return-value]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def with_gradient(loss: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    leaf = hidden.clone().requires_grad_()
    found = 2 * loss(leaf)  # what comes behind the loss reaches the gradient
    found.backward()
    assert leaf.grad is not None
    return found.detach(), leaf.grad


def test_it_is_the_textbook_divergence_with_its_gradient(
    heads: tuple[Head, Head], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "CHUNK", 4)  # several, the last one shorter
    head, dense_head = heads
    hidden, dense = drawn(2, 6, 5, seed=1), drawn(2, 6, 7, seed=2)

    def textbook(states: Tensor) -> Tensor:
        p, q = dense_head(dense)[:, :-1].softmax(-1), head(states)[:, :-1].log_softmax(-1)
        return F.kl_div(q, p.detach(), reduction="none").sum(-1).mean()

    wanted = with_gradient(textbook, hidden)
    torch.testing.assert_close(with_gradient(lambda h: divergence_from(h, head, dense, dense_head), hidden), wanted)
    kept = distribution_of(dense_head, [WINDOWS], [dense], VOCABULARY - 1)  # all but one: the bin is that one
    torch.testing.assert_close(with_gradient(lambda h: divergence(h, head, kept), hidden), wanted)


def test_a_bin_counts_as_one_outcome(heads: tuple[Head, Head]) -> None:
    head, dense_head = heads
    hidden, kept = drawn(2, 6, 5, seed=1), distribution_of(dense_head, [WINDOWS], [drawn(2, 6, 7, seed=2)], 4)

    def merged(states: Tensor) -> Tensor:
        own = head(states)[:, :-1].softmax(-1)
        top = own.gather(-1, kept.top_ids.clone())
        p = torch.cat([kept.top_logprobs, kept.rest_logprobs[..., None]], -1).exp().clone()
        q = torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1)
        return (p * (p / q).log()).sum(-1).mean()

    torch.testing.assert_close(
        with_gradient(lambda h: divergence(h, head, kept), hidden), with_gradient(merged, hidden)
    )


def test_of_what_is_sure_it_is_the_loss_of_the_text(heads: tuple[Head, Head]) -> None:
    windows = WINDOWS
    hidden = drawn(2, 6, 5, seed=1)

    def textbook(states: Tensor) -> Tensor:
        return F.cross_entropy(heads[0](states)[:, :-1].flatten(0, 1), windows[:, 1:].flatten())

    found = with_gradient(lambda h: divergence(h, heads[0], next_tokens(windows)), hidden)
    torch.testing.assert_close(found, with_gradient(textbook, hidden))
