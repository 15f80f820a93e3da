"""Loss and KL divergence equal the textbook ones, whatever the chunk, the batch and the number of tokens kept."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning import likelihood
from pruning.anatomy import Anatomy
from pruning.gradients import divergence_gradients, loss_gradient
from pruning.likelihood import Head, dense_distribution, quality, window_qualities
from pruning.masks import PruningMask
from pruning.shrinking import shrink

V = 97
CHUNKS = pytest.mark.parametrize("chunk", [1, 4, 9, 256])  # 9 = positions of one window
ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)
SOME_FAMILIES = pytest.mark.parametrize("model", ["llama-tied", "gemma2", "granite"], indirect=True)  # capped, scaled


@pytest.fixture
def other(model: PreTrainedModel, anatomy: Anatomy, random_mask: Callable[..., PruningMask]) -> PreTrainedModel:
    """A model whose predictions differ from `model`'s."""
    return shrink(model, random_mask(anatomy, 0, "BBABM"))


def cross_entropy(logits: Tensor, windows: Tensor) -> float:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item()


def divergence(dense: Tensor, other: Tensor) -> float:
    """KL(dense || other) in nats per predicted token of `B x T x V` logits."""
    p, q = dense[:, :-1].log_softmax(-1), other[:, :-1].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@CHUNKS
@SOME_FAMILIES
def test_loss_is_the_cross_entropy(
    model: PreTrainedModel, windows: Tensor, logits: Callable[[PreTrainedModel, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch, chunk: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    expected = cross_entropy(logits(model, windows), windows)
    for batch_size in (1, 2, 5, 8):
        found = quality(model, windows, batch_size=batch_size)
        assert found.loss == pytest.approx(expected, abs=1e-10)
        assert found.kl is None


@ONE_FAMILY
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3)])
def test_low_precision_logits_are_summed_in_float32(
    model: PreTrainedModel, windows: Tensor, logits: Callable[[PreTrainedModel, Tensor], Tensor],
    dtype: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    model = model.to(dtype)
    expected = cross_entropy(logits(model, windows).double(), windows)
    assert quality(model, windows).loss == pytest.approx(expected, abs=tolerance)
    assert abs(quality(model, windows, dense_distribution(model, windows)).kl) < tolerance


@CHUNKS
@SOME_FAMILIES
def test_kl_with_all_tokens_kept_is_exact(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor, chunk: int, monkeypatch: pytest.MonkeyPatch,
    logits: Callable[[PreTrainedModel, Tensor], Tensor],
) -> None:  # fmt: skip
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    expected = divergence(logits(model, windows), logits(other, windows))
    for batch_size in (1, 2, 5):
        dense = dense_distribution(model, windows, batch_size=batch_size, k=V - 1)
        assert quality(other, windows, dense, batch_size).kl == pytest.approx(expected, abs=1e-5)
    assert expected > 0.1


@SOME_FAMILIES
def test_a_window_is_measured_the_same_alone_and_among_others(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor
) -> None:
    dense = dense_distribution(model, windows)
    together = window_qualities(other, windows, dense, batch_size=3)
    for index in range(len(windows)):
        alone = quality(other, windows[index : index + 1], dense.rows(index, index + 1))
        assert (together.loss[index].item(), together.kl[index].item()) == pytest.approx(
            (alone.loss, alone.kl), abs=1e-10
        )


@ONE_FAMILY
def test_how_much_is_worked_on_at_once_changes_nothing(
    model: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cached in (1, 5 * V, 1 << 19):
        monkeypatch.setattr(likelihood, "CACHED", cached)
        found.append(quality(model, windows).loss)
    assert found == [found[0]] * 3


@SOME_FAMILIES
def test_fewer_tokens_kept_give_a_lower_bound(model: PreTrainedModel, other: PreTrainedModel, windows: Tensor) -> None:
    found = [quality(other, windows, dense_distribution(model, windows, k=k)).kl for k in (1, 4, 16, 64, V - 1, V, 999)]
    assert all(0 < fewer <= more + 1e-6 for fewer, more in pairwise(found))
    assert found[0] < found[-1] - 0.01
    assert found[-3:] == [found[-1]] * 3  # k is cut to the vocabulary


@SOME_FAMILIES
@pytest.mark.parametrize("k", [1, 8, V - 1])
def test_kl_of_a_model_to_itself_is_zero(
    model: PreTrainedModel, other: PreTrainedModel, windows: Tensor, k: int
) -> None:
    for one in (model, other):
        assert abs(quality(one, windows, dense_distribution(one, windows, k=k)).kl) < 1e-6


@ONE_FAMILY
def test_a_confident_model_gives_finite_numbers(model: PreTrainedModel, windows: Tensor) -> None:
    """One token holds all the mass float32 can see: nothing is left for the rest."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1000)
    model = model.float()
    found = quality(model, windows, dense_distribution(model, windows, k=4))
    assert found.loss > 100
    assert abs(found.kl) < 1e-3


@ONE_FAMILY
def test_distributions_do_not_depend_on_the_batch(model: PreTrainedModel, windows: Tensor) -> None:
    whole = dense_distribution(model, windows, batch_size=5, k=8)
    assert whole.top_ids.shape == (5, 9, 8)
    assert torch.all(whole.top_logprobs.diff(dim=-1) <= 0)
    masses = whole.top_logprobs.exp().sum(-1) + whole.rest_logprobs.exp()
    torch.testing.assert_close(masses, torch.ones_like(masses))
    for batch_size in (1, 3):
        split = dense_distribution(model, windows, batch_size=batch_size, k=8)
        assert torch.equal(split.top_ids, whole.top_ids)
        torch.testing.assert_close(split.top_logprobs, whole.top_logprobs)
        torch.testing.assert_close(split.rest_logprobs, whole.rest_logprobs)


@CHUNKS
@SOME_FAMILIES
def test_loss_gradient_is_autograds(
    model: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    head = Head.of(model)
    with torch.no_grad():
        hidden = model.get_decoder()(windows, use_cache=False).last_hidden_state
    hidden.requires_grad_()
    loss = F.cross_entropy(head(hidden)[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none").mean(1).sum()
    (expected,) = torch.autograd.grad(loss, hidden)
    found = loss_gradient(hidden, head, windows)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not found.requires_grad
    assert not found[:, -1].any()


@CHUNKS
@SOME_FAMILIES
def test_divergence_gradients_are_autograds(
    model: PreTrainedModel, windows: Tensor, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Against the merged divergence, written out; it vanishes where the model is the dense one. Tokens are drawn as ever."""

    def gradients(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return divergence_gradients(hidden, head, dense, torch.Generator().manual_seed(3))

    monkeypatch.setattr(likelihood, "CHUNK", chunk)
    head, dense = Head.of(model), dense_distribution(model, windows, k=8)
    with torch.no_grad():
        hidden = model.get_decoder()(windows, use_cache=False).last_hidden_state
        assert gradients(hidden)[0].abs().max() < 1e-9
        hidden = hidden + 0.1 * torch.sin(torch.arange(hidden.numel(), dtype=hidden.dtype)).view_as(hidden)
    hidden.requires_grad_()
    ids, top, others = dense.top_ids.clone(), dense.top_logprobs.clone(), dense.rest_logprobs.clone()
    logprobs = head(hidden)[:, :-1].log_softmax(-1).gather(-1, ids)
    rest = torch.log(1 - logprobs.exp().sum(-1))
    kl = (top.exp() * (top - logprobs)).sum(-1) + others.exp() * (others - rest)
    (expected,) = torch.autograd.grad(kl.mean(1).sum(), hidden)
    found, drawn, value = gradients(hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(value, kl.mean(1).detach(), rtol=1e-9, atol=0)
    expected = loss_gradient(hidden, head, windows, torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-12)
    assert not found.requires_grad
    assert not found[:, -1].any()


def test_measuring_leaves_no_trace(
    model: PreTrainedModel, windows: Tensor, unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]]
) -> None:
    with unchanged(model):
        quality(model, windows, dense_distribution(model, windows))
    assert all(parameter.grad is None for parameter in model.parameters())
