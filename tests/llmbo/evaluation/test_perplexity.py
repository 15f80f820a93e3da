"""Every token is predicted once, with the context the recipe promises, and the number is the textbook one."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmbo.errors import ConfigError
from llmbo.evaluation.perplexity import measure, pieces
from llmbo.models.loading import Checkpoint, load_checkpoint
from pruning.errors import NotEnoughText
from pruning.text import Text, read_text


@pytest.fixture(scope="module")
def tiny(model_folder: Path) -> Checkpoint:
    return load_checkpoint(str(model_folder), "float32", "cpu")


@pytest.fixture(scope="module")
def text(text_file: Path) -> Text:
    return read_text(f"text:{text_file}")


@pytest.mark.parametrize("bos", [None, 99])
@pytest.mark.parametrize("n", [2, 7, 8, 9, 40])
@pytest.mark.parametrize(("window", "stride"), [(8, 7), (8, 1), (8, 3), (2, 1), (50, 49)])
def test_windows_predict_every_token_once(n: int, window: int, stride: int, bos: int | None) -> None:
    ids, next_one = torch.arange(n), 0 if bos is not None else 1
    for piece in pieces(ids, window, stride, bos):
        tokens = piece.tokens.tolist()
        predicted, context = tokens[-piece.scored :], tokens[: -piece.scored]
        assert predicted == list(range(next_one, next_one + piece.scored)) and 1 <= piece.scored <= stride
        assert len(tokens) <= window and context and (bos is None or context[0] == bos)
        inner = context if bos is None else context[1:]
        assert inner == list(range(next_one - len(inner), next_one))
        assert (
            len(tokens) == window or tokens[bos is not None] == 0
        )  # all the context there is, or all there is room for
        next_one += piece.scored
    assert next_one == n


def direct(tiny: Checkpoint, ids: list[int], window: int, stride: int) -> float:
    """Mean loss, one token at a time, each from its own window cut off before it."""
    losses = []
    for first in range(1, len(ids), stride):
        last = min(first + stride, len(ids))
        for target in range(first, last):
            context = torch.tensor([ids[max(0, last - window) : target]])
            with torch.no_grad():
                losses.append(F.cross_entropy(tiny.model(context).logits[0, -1:], torch.tensor([ids[target]])).item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("window", "stride"), [(16, 15), (16, 4), (60, 59)])
def test_the_loss_is_the_one_computed_token_by_token(tiny: Checkpoint, text: Text, window: int, stride: int) -> None:
    found = measure(tiny.model, tiny.tokenizer, text, window, stride, max_tokens=50)
    ids = tiny.tokenizer(text.content)["input_ids"][:50]
    assert found.loss == pytest.approx(direct(tiny, ids, window, stride), abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    recipe = found.recipe
    assert (recipe.tokens, recipe.window, recipe.stride, recipe.bos) == (49, window, stride, False)
    assert all(str(value) in str(recipe) for value in (49, window, stride, text.source, text.sha256[:12]))


def test_progress_ends_at_the_number_of_tokens(tiny: Checkpoint, text: Text) -> None:
    seen: list[int] = []
    found = measure(tiny.model, tiny.tokenizer, text, 16, 15, on_token=seen.append)
    assert seen == sorted(seen) and seen[-1] == found.recipe.tokens == 1199


@pytest.mark.parametrize(
    ("window", "stride", "said"), [(65, 3, "64 positions, got 65"), (16, 16, "15"), (16, 0, "got 0")]
)
def test_windows_that_cannot_be_are_refused(tiny: Checkpoint, text: Text, window: int, stride: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        measure(tiny.model, tiny.tokenizer, text, window, stride)


def test_a_text_of_one_token_is_refused(tiny: Checkpoint) -> None:
    with pytest.raises(NotEnoughText, match="1 tokens"):
        measure(tiny.model, tiny.tokenizer, Text("one", "w1"), 16, 15)


def test_a_bos_token_gives_the_first_token_a_context(
    tiny: Checkpoint, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmbo.evaluation.perplexity.adds_bos", lambda tokenizer: True)
    found = measure(tiny.model, tiny.tokenizer, text, 16, 15, max_tokens=15)
    ids: Tensor = torch.tensor([[tiny.tokenizer.bos_token_id, *tiny.tokenizer(text.content)["input_ids"][:15]]])
    with torch.no_grad():
        expected = tiny.model(ids, labels=ids).loss.item()
    assert found.loss == pytest.approx(expected, abs=1e-5) and found.recipe.tokens == 15 and found.recipe.bos
