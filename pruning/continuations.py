"""How likely a model finds given continuations, whether it would write them itself, and what it writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pruning.errors import UnreadableItems
from pruning.likelihood import CHUNK, Head, last_hidden, log_normaliser

TOKENS = 4096  # in a batch, padding included
LOGIT_VALUES = 1 << 26  # at a time, where a model's own logits are asked for: 256 MB in float32


@dataclass(frozen=True)
class Rows:
    """Texts as tokens, of which the end is scored.

    Args:
        tokens: Token ids of the whole text, by row.
        scored: How many of them, at the end, belong to the continuation.
    """

    tokens: Sequence[Tensor]
    scored: Sequence[int]

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> "Rows":
        """Tokenise pairs of a context and what follows it, together, as the tokenizer does by itself, BOS included.

        Space at the context's end counts as the continuation's. What is longer than `max_length` loses its start.

        Raises:
            UnreadableItems: A text has less than two tokens.
        """
        tokens, scored = [], []
        for context, continuation in pairs:
            ids = tokenizer(context + continuation)["input_ids"]
            before = len(tokenizer(context.rstrip())["input_ids"])
            own = max(1, len(ids) - before)  # a tokenizer may join the continuation's start with the context's end
            if len(ids) < 2:
                raise UnreadableItems(
                    f"The item '{context}{continuation}' is a single token: nothing is there to tell it from."
                )
            scored.append(min(own, max_length - 1, len(ids) - 1))
            tokens.append(torch.tensor(ids[-max_length:]))
        return cls(tokens, scored)

    def place(self, row: int) -> slice:
        """Where in a row its continuation stands."""
        end = len(self.tokens[row])
        return slice(end - self.scored[row], end)


def score(model: PreTrainedModel, rows: Rows, own_logits: bool = False) -> tuple[Tensor, Tensor]:
    """Log-likelihood of every continuation, and whether greedy decoding gives exactly its tokens.

    Rows are padded on the right, where causal attention never looks, and only the continuations' positions reach the head.

    Args:
        own_logits: Ask the model itself for logits, at every position: for families whose head does more than `Head` knows.

    Returns:
        Nats, float64, -inf for what is no number, and booleans; both `num_rows`, on the CPU.
    """
    loglikelihoods = torch.empty(len(rows.tokens), dtype=torch.float64)
    greedy = torch.empty(len(rows.tokens), dtype=torch.bool)
    most = min(TOKENS, LOGIT_VALUES // model.config.get_text_config().vocab_size) if own_logits else TOKENS
    for batch in _batches(rows.tokens, most):
        tokens = pad_sequence([rows.tokens[row] for row in batch], batch_first=True).to(model.device)
        head: Callable[[Tensor], Tensor]
        with torch.inference_mode():
            if own_logits:
                states, head = model(tokens, use_cache=False).logits, torch.nn.Identity()
            else:
                states, head = last_hidden(model, tokens), Head.of(model)
            logprobs, hits = _scored(head, states, tokens, [rows.place(row) for row in batch])
        counts = [rows.scored[row] for row in batch]
        loglikelihoods[batch] = torch.stack([own.sum() for own in logprobs.split(counts)]).nan_to_num(
            -torch.inf, neginf=-torch.inf
        )
        greedy[batch] = torch.stack([own.all() for own in hits.split(counts)])
    return loglikelihoods, greedy


def _scored(
    head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, places: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Log-probability, float64, and whether it is the likeliest, of each token at a place of its row; on the CPU.

    Args:
        states: `B x T x hidden_size`, what `head` makes logits of.
        tokens: `B x T` token ids.
    """
    before = torch.cat([own[place.start - 1 : place.stop - 1] for own, place in zip(states, places, strict=True)])
    wanted = torch.cat([own[place] for own, place in zip(tokens, places, strict=True)])
    logprobs, hits = [], []
    for part, targets in zip(before.split(CHUNK), wanted.split(CHUNK), strict=True):
        logits = head(part)
        normaliser = log_normaliser(logits)
        logprobs.append(logits.gather(-1, targets[:, None]).squeeze(-1).to(normaliser.dtype) - normaliser)
        hits.append(logits.argmax(-1) == targets)
    return torch.cat(logprobs).cpu().double(), torch.cat(hits).cpu()


@torch.inference_mode()
def continued(model: PreTrainedModel, prompts: Sequence[Tensor], count: int, stop: int | None = None) -> list[Tensor]:
    """The likeliest next token, again and again: what `model` writes behind each prompt by greedy decoding.

    Not by `generate`, which would mix in the sampling settings that chat models ship. All prompts are read at once and nothing is
    padded: what is longer than the shortest prompt is still being read while the others are continued already.

    Args:
        prompts: Token ids, at least one each.
        count: New tokens of each.
        stop: Token id that ends a text, and is not part of it.

    Returns:
        The new token ids of each prompt, at most `count`, on the CPU.
    """
    texts, shortest = [prompt.tolist() for prompt in prompts], min(map(len, prompts))
    cache, tokens = DynamicCache(), [text[:shortest] for text in texts]
    for read in range(shortest, max(map(len, prompts)) + count):
        batch = torch.tensor(tokens, device=model.device)
        chosen = model(batch, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1).tolist()
        for text, token in zip(texts, chosen, strict=True):
            if len(text) == read:
                text.append(token)
        tokens = [[text[read]] for text in texts]
    new = [text[len(prompt) :][:count] for text, prompt in zip(texts, prompts, strict=True)]
    return [torch.tensor(text[: text.index(stop)] if stop in text else text, dtype=torch.long) for text in new]


def _batches(tokens: Sequence[Tensor], most: int) -> list[list[int]]:
    """Rows of similar length together, so that little is padded: longest first."""
    batches: list[list[int]] = []
    for row in sorted(range(len(tokens)), key=lambda row: -len(tokens[row])):
        if not batches or (len(batches[-1]) + 1) * len(tokens[batches[-1][0]]) > most:
            batches.append([])
        batches[-1].append(row)
    return batches
