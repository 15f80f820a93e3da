"""How many items of a file a model gets right, and how sure that is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.errors import ConfigError
from llmbo.models.checks import check_tokens
from llmbo.models.loading import max_positions
from llmbo.report import ItemsPart
from pruning.choices import Choices
from pruning.continuations import Rows, score
from pruning.items import ItemFile, read_items


def read_item_files(paths: Sequence[str], limit: int | None = None) -> tuple[ItemFile, ...]:
    """The items of each file, the first `limit` of them.

    Raises:
        ConfigError: Two files would have one name.
        UnreadableItems: A file cannot be read, or a line of it is no item.
    """
    files = [read_items(Path(path)) for path in paths]
    for place, file in enumerate(files):
        if twin := next((other for other in files[:place] if other.name == file.name), None):
            raise ConfigError(
                f"--items {file.source}: its column would be called '{file.name}', as that of {twin.source}: rename one."
            )
    return tuple(replace(file, items=file.items[:limit]) for file in files)


def items_part(file: ItemFile) -> ItemsPart:
    """As reports and result files tell of it."""
    return ItemsPart(name=file.name, source=file.source, sha256=file.sha256, kind=file.kind, count=len(file.items))


@dataclass(frozen=True)
class Exam:
    """The items of a file as tokens.

    Args:
        choices: What `rows` are, where the items are multiple choice.
    """

    name: str
    rows: Rows
    choices: Choices | None

    @classmethod
    def of(cls, file: ItemFile, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Exam":
        """Raises ModelError for a token that the model does not know."""
        choices, positions = None, max_positions(model)
        if file.kind == "multiple_choice":
            choices = Choices.of(file.items, tokenizer, positions)
            rows = choices.rows
        else:
            rows = Rows.of([(item.context, item.continuation) for item in file.items], tokenizer, positions)
        check_tokens(model, tokenizer, *rows.tokens)
        return cls(file.name, rows, choices)

    def taken_by(self, model: PreTrainedModel, own_logits: bool = False) -> dict[str, float]:
        """Scores by the names that lm-eval gives them: `acc` and, of multiple choice, `acc_norm`, each with its standard error; of
        last words the `perplexity` of a whole continuation.

        Args:
            own_logits: See `pruning.continuations.score`.
        """
        loglikelihoods, greedy = score(model, self.rows, own_logits)
        if self.choices is None:
            return {**_share("acc", greedy), "perplexity": math.exp(min(-loglikelihoods.mean().item(), 700.0))}
        acc, acc_norm = self.choices.right(loglikelihoods)
        return {**_share("acc", acc), **_share("acc_norm", acc_norm)}


def _share(name: str, right: Tensor) -> dict[str, float]:
    hits, count = int(right.sum()), len(right)
    return {name: hits / count, f"{name}_stderr": standard_error(hits, count)}


def standard_error(hits: int, count: int) -> float:
    """Half the width of Wilson's interval at one standard error (1927): as the binomial one, but not 0 for none or all."""
    share = hits / count
    return math.sqrt(share * (1 - share) / count + 1 / (4 * count**2)) / (1 + 1 / count)
