"""Accuracy is what a plain loop over choices finds, whatever the padding and the batches."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning import choices
from pruning.choices import Choices, Item, accuracy, read_items
from pruning.errors import UnreadableItems

SOME_FAMILIES = pytest.mark.parametrize("model", ["llama", "gemma2", "mistral"], indirect=True)


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
def score(model: PreTrainedModel, question: Sequence[int], whole: Sequence[int], length: int) -> float:
    logprobs = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
    places = range(len(question), len(whole))
    return sum(logprobs[place - 1, whole[place]].item() for place in places) / length


@SOME_FAMILIES
@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_accuracy_is_the_plain_one(
    model: PreTrainedModel, items: list[Item], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choices, "TOKENS", tokens)
    tokenize = Letters()
    best = []
    for item in items:
        question = tokenize(item.question)["input_ids"]
        scores = [
            score(model, question, tokenize(f"{item.question} {choice}")["input_ids"], len(choice))
            for choice in item.choices
        ]
        best.append(scores.index(max(scores)))
    expected = sum(found == item.answer for found, item in zip(best, items, strict=True)) / len(items)
    assert accuracy(model, Choices.of(items, tokenize, 64)) == pytest.approx(expected)
    solved = [Item(item.question, item.choices, found) for item, found in zip(items, best, strict=True)]
    assert accuracy(model, Choices.of(solved, tokenize, 64)) == 1.0
    wrong = [
        Item(item.question, item.choices, (found + 1) % len(item.choices))
        for item, found in zip(items, best, strict=True)
    ]
    assert accuracy(model, Choices.of(wrong, tokenize, 64)) == 0.0


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_what_is_too_long_loses_its_start(model: PreTrainedModel) -> None:
    """The same end of the text is left of both questions."""
    short, long = Item("b" * 40, ("cd", "efg"), 0), Item("a" * 40 + "b" * 40, ("cd", "efg"), 0)
    cut = [Choices.of([item], Letters(), 30) for item in (short, long)]
    assert all(len(row) == 30 for own in cut for row in own.tokens)
    for one, other in zip(cut[0].tokens, cut[1].tokens, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: `question` must be a text, got None"),
        (json.dumps({"question": " ", "choices": ["a", "b"], "answer": 0}), "`question`"),
        (json.dumps({"question": "q", "choices": ["a"], "answer": 0}), "two or more texts"),
        (json.dumps({"question": "q", "choices": ["a", ""], "answer": 0}), "two or more texts"),
        (json.dumps({"question": "q", "choices": ["a", "b"], "answer": 2}), "from 0 to 1, got 2"),
        (json.dumps({"question": "q", "choices": ["a", "b"], "answer": True}), "from 0 to 1, got True"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: str, expected: str) -> None:
    good = json.dumps({"question": "q", "choices": ["a", "b"], "answer": 1})
    path = tmp_path / "items.jsonl"
    path.write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(UnreadableItems, match="line 2") as caught:
        read_items(path)
    assert expected in str(caught.value)
    path.write_text(f"{good}\n\n{good}\n", encoding="utf-8")
    assert read_items(path) == [Item("q", ("a", "b"), 1)] * 2


def test_a_file_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableItems, match="No such file"):
        read_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UnreadableItems, match="no item"):
        read_items(tmp_path / "empty.jsonl")


@SOME_FAMILIES
def test_measuring_leaves_no_trace(
    model: PreTrainedModel, items: list[Item], unchanged: Callable[[PreTrainedModel], object], windows: Tensor
) -> None:
    with unchanged(model):
        accuracy(model, Choices.of(items[:3], Letters(), 64))
