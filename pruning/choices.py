"""Multiple-choice items: which choice a model finds likeliest, as lm-eval's acc_norm counts it.

A choice's score is the log-likelihood of its tokens after the question, divided by its length in characters (Gao,
"Multiple choice normalization in LM evaluation", 2021). Question and choice are joined by a space and tokenised together.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.errors import UnreadableItems
from pruning.likelihood import CHUNK, Head, last_hidden, log_normaliser

TOKENS = 4096  # in a batch, padding included


@dataclass(frozen=True)
class Item:
    """`answer` is the index of the right one among `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Choices:
    """Items as tokens, one row for each choice of each item.

    Args:
        tokens: Token ids of question and choice, by row.
        scored: How many of them, at the end, belong to the choice.
        lengths: Characters of the choice, `num_rows`.
        sizes: Choices of each item; its rows stand together.
        answers: Index of the right one among an item's choices.
    """

    tokens: Sequence[Tensor]
    scored: Sequence[int]
    lengths: Tensor
    sizes: Sequence[int]
    answers: Sequence[int]

    @classmethod
    def of(cls, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, max_length: int) -> "Choices":
        """Tokenise as the tokenizer does by itself, BOS included; what is longer than `max_length` loses its start."""
        tokens, scored = [], []
        for item in items:
            question = item.question.rstrip()
            context = len(tokenizer(question)["input_ids"])
            for choice in item.choices:
                ids = tokenizer(f"{question} {choice}")["input_ids"]
                own = max(1, len(ids) - context)  # a tokenizer may join the choice's start with the question's end
                scored.append(min(own, max_length - 1))
                tokens.append(torch.tensor(ids[-max_length:]))
        return cls(
            tokens,
            scored,
            torch.tensor([len(choice) for item in items for choice in item.choices], dtype=torch.float64),
            [len(item.choices) for item in items],
            [item.answer for item in items],
        )


def read_items(path: Path) -> list[Item]:
    """Read a JSONL file with `question`, `choices` and `answer` (an index from 0) in each line.

    Raises:
        UnreadableItems: No such file, not UTF-8, or a line that is no such item.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise UnreadableItems(f"Cannot read the items in '{path}': {reason}.") from error
    items = [_item(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise UnreadableItems(f"There is no item in '{path}': expected one JSON object per line.")
    return items


@torch.inference_mode()
def accuracy(model: PreTrainedModel, choices: Choices) -> float:
    """Share of items whose right choice has the highest normalised log-likelihood; the first of equals counts.

    Rows are padded on the right, where causal attention never looks, and only the choices' positions reach the head.
    """
    head = Head.of(model)
    scores = torch.empty(len(choices.tokens), dtype=torch.float64)
    for rows in _batches(choices.tokens):
        batch = pad_sequence([choices.tokens[row] for row in rows], batch_first=True).to(model.device)
        hidden = last_hidden(model, batch)
        counts = [choices.scored[row] for row in rows]
        places = [
            slice(len(choices.tokens[row]) - count, len(choices.tokens[row]))
            for row, count in zip(rows, counts, strict=True)
        ]
        states = torch.cat([hidden[i, place.start - 1 : place.stop - 1] for i, place in enumerate(places)])
        targets = torch.cat([batch[i, place] for i, place in enumerate(places)])
        logprobs = []
        for part, wanted in zip(states.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = head(part)
            normaliser = log_normaliser(logits)
            logprobs.append(logits.gather(-1, wanted[:, None]).squeeze(-1).to(normaliser.dtype) - normaliser)
        scores[rows] = torch.stack([own.sum() for own in torch.cat(logprobs).cpu().double().split(counts)])
    normalised = (scores / choices.lengths).split(list(choices.sizes))
    right = [int(own.argmax()) == answer for own, answer in zip(normalised, choices.answers, strict=True)]
    return sum(right) / len(right)


def _batches(tokens: Sequence[Tensor]) -> list[list[int]]:
    """Rows of similar length together, so that little is padded: longest first."""
    batches: list[list[int]] = []
    for row in sorted(range(len(tokens)), key=lambda row: -len(tokens[row])):
        if not batches or (len(batches[-1]) + 1) * len(tokens[batches[-1][0]]) > TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _item(line: str, where: str) -> Item:
    try:
        found: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UnreadableItems(f"{where}: not JSON ({error.msg}).") from error
    question, choices, answer = (
        [found.get(key) for key in ("question", "choices", "answer")] if isinstance(found, dict) else (None,) * 3
    )
    if not isinstance(question, str) or not question.strip():
        raise UnreadableItems(f"{where}: `question` must be a text, got {question!r}.")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UnreadableItems(f"{where}: `choices` must be two or more texts, got {choices!r}.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UnreadableItems(f"{where}: `answer` must be an index from 0 to {len(choices) - 1}, got {answer!r}.")
    return Item(question, tuple(choices), answer)
