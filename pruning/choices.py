"""Multiple-choice items: which choice a model finds likeliest, as lm-eval's `acc` and `acc_norm` count it.

A choice's score is the log-likelihood of its tokens after the question, for `acc_norm` divided by its length in characters (Gao,
"Multiple choice normalization in LM evaluation", 2021). Question and choice are joined by a space and tokenised together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.continuations import Rows, score
from pruning.items import Item


@dataclass(frozen=True)
class Choices:
    """Items as tokens.

    Args:
        rows: One for each choice of each item; those of an item stand together.
        lengths: Characters of the choice, `num_rows`.
        sizes: Choices of each item.
        answers: Index of the right one among an item's choices, `num_items`.
    """

    rows: Rows
    lengths: Tensor
    sizes: Sequence[int]
    answers: Tensor

    @classmethod
    def of(cls, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, max_length: int) -> "Choices":
        """See `Rows.of`."""
        pairs = [(f"{item.question.rstrip()} ", choice) for item in items for choice in item.choices]
        return cls(
            Rows.of(pairs, tokenizer, max_length),
            torch.tensor([len(choice) for _, choice in pairs], dtype=torch.float64),
            [len(item.choices) for item in items],
            torch.tensor([item.answer for item in items]),
        )

    def right(self, loglikelihoods: Tensor) -> tuple[Tensor, Tensor]:
        """Which items have the highest score for their right choice; the first of equals counts, and what is no number does not.

        Args:
            loglikelihoods: `num_rows`, see `pruning.continuations.score`.

        Returns:
            Booleans as `acc` and as `acc_norm` count, `num_items` each.
        """

        def best(scores: Tensor) -> Tensor:
            highest, places = zip(*(own.max(0) for own in scores.split(list(self.sizes))), strict=True)
            return (torch.stack(places) == self.answers) & torch.stack(highest).isfinite()

        return best(loglikelihoods), best(loglikelihoods / self.lengths)


def accuracy(model: PreTrainedModel, choices: Choices) -> float:
    """`acc_norm`: the share of items that are answered right."""
    return choices.right(score(model, choices.rows)[0])[1].double().mean().item()
