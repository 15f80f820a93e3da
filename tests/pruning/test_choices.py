"""Accuracy is what a plain loop over choices finds, whatever the padding and the batches."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning import continuations
from pruning.choices import Choices, accuracy
from pruning.continuations import Rows, score
from pruning.items import Item

SOME_FAMILIES = pytest.mark.parametrize("model", ["llama", "gemma2"], indirect=True)  # gemma2 slides too


class Letters:
    """A tokenizer of one token per character, with a BOS token."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(2 + ord(letter) % 90 for letter in text)]}


@pytest.fixture
def items() -> list[Item]:
    rng = torch.Generator().manual_seed(3)

    def word(longest: int) -> str:
        count = int(torch.randint(1, longest + 1, (), generator=rng))
        return "".join(chr(97 + int(c)) for c in torch.randint(26, (count,), generator=rng))

    return [Item(word(20), tuple(word(9) for _ in range(2 + n % 3)), n % 2) for n in range(24)]


@torch.no_grad()
def plain(model: PreTrainedModel, question: Sequence[int], whole: Sequence[int]) -> float:
    logprobs = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    places = range(len(question), len(whole))
    return sum(logprobs[place - 1, whole[place]].item() for place in places)


@SOME_FAMILIES
def test_accuracy_is_the_plain_one(model: PreTrainedModel, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = Letters()
    best: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for item in items:
        question = tokenize(item.question)["input_ids"]
        sums = [plain(model, question, tokenize(f"{item.question} {choice}")["input_ids"]) for choice in item.choices]
        normed = [own / len(choice) for own, choice in zip(sums, item.choices, strict=True)]
        best["acc"].append(sums.index(max(sums)))
        best["acc_norm"].append(normed.index(max(normed)))
    choices = Choices.of(items, tokenize, 64)
    for tokens, own_logits in itertools.product((1, 60, 4096), (False, True)):
        monkeypatch.setattr(continuations, "TOKENS", tokens)
        found = choices.right(score(model, choices.rows, own_logits)[0])
        for right, chosen in zip(found, best.values(), strict=True):
            assert right.tolist() == [place == item.answer for place, item in zip(chosen, items, strict=True)]
    assert best["acc"] != best["acc_norm"]
    solved = [Item(item.question, item.choices, place) for item, place in zip(items, best["acc_norm"], strict=True)]
    assert accuracy(model, Choices.of(solved, tokenize, 64)) == 1.0


def test_an_answer_that_is_no_number_is_not_right() -> None:
    choices = Choices(Rows([], []), torch.ones(5), [2, 3], torch.tensor([0, 1]))
    for scores in ([-torch.inf] * 5, [-torch.inf, -1.0, -1.0, -torch.inf, -2.0]):
        assert not torch.stack(choices.right(torch.tensor(scores))).any()
    assert torch.stack(choices.right(torch.tensor([-1.0, -1.0, -torch.inf, -2.0, -3.0]))).all()  # the first of equals


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_is_too_long_loses_its_start(model: PreTrainedModel) -> None:
    """The same end of the text is left of both questions."""
    short, long = Item("b" * 40, ("cd", "efg"), 0), Item("a" * 40 + "b" * 40, ("cd", "efg"), 0)
    cut = [Choices.of([item], Letters(), 30).rows for item in (short, long)]
    assert all(len(row) == 30 for own in cut for row in own.tokens)
    for one, other in zip(cut[0].tokens, cut[1].tokens, strict=True):
        assert torch.equal(one, other)


@SOME_FAMILIES
def test_measuring_leaves_no_trace(
    model: PreTrainedModel, items: list[Item], unchanged: Callable[[PreTrainedModel], object], windows: Tensor
) -> None:
    with unchanged(model):
        accuracy(model, Choices.of(items[:3], Letters(), 64))
