"""Scores and greedy texts are those of a plain loop without padding, batches or cache, of sub-networks too."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning import continuations
from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.continuations import Rows, continued, score
from pruning.errors import UnreadableItems
from pruning.masks import PruningMask, Ranking
from pruning.shrinking import shrink
from pruning.supernet import Supernet


class Letters:
    """One token per character, but for "ab", which is one."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, *(2 + ord(letter) % 90 for letter in text.replace("ab", "c"))]}


def test_what_nothing_precedes_is_not_scored() -> None:
    """Without BOS, and with a context that has no tokens, the first token is what the others are told from."""

    def bare(text: str) -> dict[str, list[int]]:
        return {"input_ids": Letters()(text.strip("\0"))["input_ids"][1:]}

    rows = Rows.of([("\0", "xyz"), ("xy", "z")], bare, 9)
    assert rows.scored == [2, 1] and all(rows.place(row).start > 0 for row in range(2))
    with pytest.raises(UnreadableItems, match="is a single token"):
        Rows.of([("\0", "x")], bare, 9)


@torch.no_grad()
def greedy(model: PreTrainedModel, prompt: Sequence[int], count: int) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(model(torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.fixture
def prompts() -> list[Tensor]:
    rng = torch.Generator().manual_seed(5)
    return [torch.randint(3, 90, (length,), generator=rng) for length in (6, 2, 9)]


@pytest.mark.parametrize("pattern", ["BBBBB", "-MBBA", "MABB-"])
def test_a_sub_network_writes_what_its_shrunk_model_would(
    model: PreTrainedModel, anatomy: Anatomy, prompts: list[Tensor], random_architecture: Callable[..., Architecture],
    random_ranking: Callable[[Anatomy, int], Ranking], pattern: str,
) -> None:  # fmt: skip
    """Layers that are gone, or do not attend, leave no gap in the cache."""
    ranking, architecture = random_ranking(anatomy, 0), random_architecture(anatomy, 3, pattern)
    small = shrink(model, PruningMask.from_architecture(architecture, ranking))
    expected = [greedy(small, prompt.tolist(), 7) for prompt in prompts]
    with Supernet(model, ranking) as supernet, supernet.active(architecture) as candidate:
        assert [text.tolist() for text in continued(candidate, prompts, 7)] == expected
    assert [text.tolist() for text in continued(model, prompts, 7)] == [greedy(model, p.tolist(), 7) for p in prompts]


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_a_text_ends_before_the_stop(model: PreTrainedModel, prompts: list[Tensor]) -> None:
    whole = continued(model, prompts, 7)
    stop = int(whole[0][3])
    for text, cut in zip(whole, continued(model, prompts, 7, stop), strict=True):
        found = text.tolist()
        assert cut.tolist() == (found[: found.index(stop)] if stop in found else found)
    assert [text.tolist() for text in continued(model, prompts, 0)] == [[], [], []]


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt2"], indirect=True)
@pytest.mark.parametrize("own_logits", [False, True])
def test_scores_are_the_plain_ones(
    model: PreTrainedModel, own_logits: bool, monkeypatch: pytest.MonkeyPatch, logits: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(continuations, "TOKENS", 40)
    pairs = [("hello ", "you"), ("a", "b"), ("where", " is it"), ("x" * 9, " yes"), ("so", " it")]
    rows = Rows.of(pairs, Letters(), 32)
    # Space at a context's end is its continuation's, and what is one token with the context's end is scored as a whole.
    assert list(rows.scored) == [4, 1, 6, 4, 3]
    context = rows.tokens[4][:-3].tolist()
    own = Rows([*rows.tokens, torch.tensor(context + greedy(model, context, 3))], [*rows.scored, 3])
    loglikelihoods, written = score(model, own, own_logits)
    for tokens, count, found, exact in zip(own.tokens, own.scored, loglikelihoods, written, strict=True):
        logprobs = logits(model, tokens[None])[0].log_softmax(-1)[-count - 1 : -1]
        wanted = tokens[-count:]
        assert float(found) == pytest.approx(float(logprobs.gather(-1, wanted[:, None]).sum()), abs=1e-9)
        assert bool(exact) == bool((logprobs.argmax(-1) == wanted).all())
    assert written[-1]
