"""Text source -> seeded token windows. Calibration, proxy and held-out windows never overlap.

Perplexities fail to reproduce mostly because the recipe is missing, so the recipe travels with the windows.
"""

import hashlib
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.errors import NotEnoughText, UnreadableText

SOURCES = "builtin, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN] or self"
# A slice of a split, as `datasets` writes it, has colons in its brackets: `train[:2000]`, `train[10%:20%]+test`.
HUB = re.compile(
    r"(?P<dataset>[^:]+):(?P<config>[^:]*):(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+)(?::(?P<column>[^:\[\]]+))?"
)
SPLITS = ("calibration", "proxy", "heldout")


@dataclass(frozen=True)
class Text:
    """Raw text and where it came from."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class TokenWindows:
    """Disjoint sets of windows from one source.

    Args:
        calibration, proxy, heldout: `num_windows x length` token ids.
        source: What the user asked for, with versions that matter.
        sha256: Of the text (of the token ids when they were sampled).
        available_tokens: Tokens in the source.
        bos: Whether every window starts with the beginning-of-sequence token.
    """

    calibration: Tensor
    proxy: Tensor
    heldout: Tensor
    source: str
    sha256: str
    available_tokens: int
    bos: bool

    @property
    def length(self) -> int:
        return self.calibration.shape[1]


def read_text(source: str) -> Text:
    """Read `builtin`, `text:PATH` or `hf:DATASET:CONFIG:SPLIT[:COLUMN]`: of a data set the column `text`, unless another is named.

    `builtin` is the English prose of the language reference that ships with every CPython (`pydoc_data.topics`).
    Some of its topics repeat whole paragraphs of others; repeats are left out, or held-out windows would not be unseen.

    Raises:
        UnreadableText: Unknown source, no such file, no UTF-8 text, or the dataset cannot be loaded.
    """
    kind, _, rest = source.partition(":")
    if source == "builtin":
        from pydoc_data.topics import topics

        paragraphs = (p for _, topic in sorted(topics.items()) for p in topic.split("\n\n"))
        once = {" ".join(p.split()): p for p in paragraphs}  # repeats differ in line ends and indentation
        return Text(f"builtin (pydoc_data.topics of Python {platform.python_version()})", "\n\n".join(once.values()))
    if kind == "text" and rest:
        try:
            return Text(source, Path(rest).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
            raise UnreadableText(f"Cannot read the text file '{rest}': {reason}.") from error
    if kind == "hf" and (place := HUB.fullmatch(rest)):
        return Text(
            source, _hub_text(rest, place["dataset"], place["config"], place["split"], place["column"] or "text")
        )
    raise UnreadableText(f"Unknown text source '{source}': expected {SOURCES}.")


def cut_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, counts: Mapping[str, int], length: int, seed: int
) -> TokenWindows:
    """Cut `text` into consecutive windows of `length` tokens and deal them out at random, each to one split only.

    A tokenizer that starts texts with a BOS token by itself gets one in every window (it counts towards `length`).

    Args:
        counts: Windows wanted in each of `SPLITS`.

    Raises:
        NotEnoughText: Says how many tokens are there and how many are needed.
    """
    windows, tokens, bos = _windows(text, tokenizer, length)
    payload, wanted = length - bos, sum(counts[split] for split in SPLITS)
    if len(windows) < wanted:
        raise NotEnoughText(
            f"The text '{text.source}' holds {tokens} tokens, {wanted * payload} are needed "
            f"({wanted} windows of {payload}): give a longer text or ask for fewer tokens."
        )
    return _deal(windows, counts, seed, text.source, text.sha256, tokens, bos)


@dataclass(frozen=True)
class Dealt:
    """The windows that `cut_windows` has dealt out of a text.

    Args:
        sha256: Of the text.
        windows: How many, of all splits together.
        length: Tokens in each, BOS included.
        seed: Of their order.
    """

    sha256: str
    windows: int
    length: int
    seed: int


def unseen_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    heldout: int,
    training: int = 1,
    seen: Dealt | None = None,
) -> TokenWindows:
    """All windows of a text: to train on (`calibration`), to choose by (`proxy`) and to compare on (`heldout`).

    Neither of the latter shares a token with what was dealt before. They are the last such ones of the seeded order.

    Args:
        heldout: Windows wanted in each of the latter.
        training: Windows wanted at least in the first, which may have been dealt before.
        seen: Counts if it came from the same text, cut with the same tokenizer.

    Raises:
        NotEnoughText: Says how many tokens are there and how many are needed.
    """
    windows, tokens, bos = _windows(text, tokenizer, length)
    payload, used = length - bos, torch.zeros(tokens, dtype=torch.bool)
    if seen is not None and seen.sha256 == text.sha256:
        dealt = seen.length - bos
        for place in _order(tokens // dealt, seen.seed)[: seen.windows].tolist():
            used[place * dealt : (place + 1) * dealt] = True
    order = _order(len(windows), seed)
    unseen = order[~used[: len(windows) * payload].view(-1, payload).any(1)[order]]
    if len(unseen) < 2 * heldout or len(windows) < training + 2 * heldout:
        needed = max(int(used.sum()), training * payload) + 2 * heldout * payload
        raise NotEnoughText(
            f"The text '{text.source}' holds {tokens} tokens, at least {needed} are needed: {2 * heldout} windows of {payload} to "
            f"judge by, beside the {int(used.sum())} tokens that the search used and {training} windows to train on "
            f"({len(unseen)} windows are unseen): give a longer or another text, or a smaller --heldout."
        )
    kept = unseen[len(unseen) - 2 * heldout :]
    hands = order[~torch.isin(order, kept)], *kept.split(heldout)
    return _gathered(windows, hands, text.source, text.sha256, tokens, bos)


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    length: int,
    seed: int,
    batch_size: int = 32,
) -> TokenWindows:
    """Windows sampled from the dense model itself at temperature 1 (text source `self`), each from its own start."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    wanted = sum(counts[split] for split in SPLITS)
    chunks = []
    rng = torch.Generator(model.device).manual_seed(seed)
    # Not `generate`: it would mix in the sampling settings that chat models ship (repetition penalty and the like).
    with torch.inference_mode():
        for first in range(0, wanted, batch_size):
            window, cache = torch.full((min(batch_size, wanted - first), 1), start, device=model.device), None
            while window.shape[1] < length:
                out = model(window[:, -1:], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                window = torch.cat([window, out.logits[:, -1].float().softmax(-1).multinomial(1, generator=rng)], dim=1)
            chunks.append(window.cpu())
    windows = torch.cat(chunks)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return _deal(
        windows.clone(), counts, seed, "self (sampled from the dense model)", digest, windows.numel(), bos=True
    )


def _deal(
    windows: Tensor, counts: Mapping[str, int], seed: int, source: str, sha256: str, available: int, bos: bool
) -> TokenWindows:
    order = _order(len(windows), seed)
    hands = order[: sum(counts[split] for split in SPLITS)].split([counts[split] for split in SPLITS])
    return _gathered(windows, hands, source, sha256, available, bos)


def _order(windows: int, seed: int) -> Tensor:
    """In which so many windows are dealt."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


def _gathered(
    windows: Tensor, hands: Sequence[Tensor], source: str, sha256: str, available: int, bos: bool
) -> TokenWindows:
    """The windows at the places in each hand, one for each of `SPLITS`."""
    calibration, proxy, heldout = (windows[hand] for hand in hands)
    return TokenWindows(calibration, proxy, heldout, source=source, sha256=sha256, available_tokens=available, bos=bos)


def _windows(text: Text, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[Tensor, int, bool]:
    """All of a text in windows, how many tokens it holds, and whether every window starts with BOS."""
    bos = adds_bos(tokenizer)
    ids = torch.tensor(tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    payload = length - bos
    windows = ids[: len(ids) // payload * payload].view(-1, payload)
    if bos:
        windows = torch.cat([windows.new_full((len(windows), 1), tokenizer.bos_token_id), windows], dim=1)
    return windows, len(ids), bos


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts texts with a BOS token by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def _hub_text(source: str, dataset: str, config: str, split: str, column: str) -> str:
    """The rows that are there, one paragraph each."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UnreadableText("Text from the hub needs the package 'datasets': pip install datasets.") from error
    try:
        table = load_dataset(dataset, config or None, split=split)
        rows = list(table[column]) if column in table.column_names else None
    except Exception as error:  # the library raises its own, the hub client's and OS errors alike
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableText(f"Cannot load the dataset '{source}': {reason}") from error
    if rows is None or not all(row is None or isinstance(row, str) for row in rows):
        texts = [name for name in table.column_names if isinstance(next(iter(table[name]), None), str)]
        raise UnreadableText(
            f"The dataset '{source}' has {'no column' if rows is None else 'no text in its column'} '{column}': name one of "
            f"{', '.join(texts) or 'none'} as in hf:{dataset}:{config}:{split}:COLUMN."
        )
    return "\n\n".join(row for row in rows if row is not None)
