"""Texts -> seeded token windows. Calibration, proxy and held-out windows never overlap.

Perplexities fail to reproduce mostly because the recipe is missing, so the recipe travels with the windows.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pruning.errors import NotEnoughText
from pruning.text import Mix, Text, as_chat

SPLITS = ("calibration", "proxy", "heldout")
Hand = tuple[Tensor, ...]  # places of windows in a text, for each of `SPLITS`


@dataclass(frozen=True)
class Source:
    """One text of several.

    Args:
        share: Of the tokens, as asked for.
        windows: Dealt out of it, of all splits together.
    """

    source: str
    sha256: str
    share: float
    windows: int


@dataclass(frozen=True)
class TokenWindows:
    """Disjoint sets of windows from one text or a mix.

    Args:
        calibration, proxy, heldout: `num_windows x length` token ids. Of a mix, every part of a set that begins with its first window
            holds the sources in proportion.
        source: What the user asked for, with versions that matter.
        sha256: Of the text (of the token ids when they were sampled).
        available_tokens: Tokens in the source.
        bos: Whether every window starts with the beginning-of-sequence token.
        chat: Whether the text was put through the tokenizer's chat template.
        sources: The texts of a mix.
    """

    calibration: Tensor
    proxy: Tensor
    heldout: Tensor
    source: str
    sha256: str
    available_tokens: int
    bos: bool
    chat: bool = False
    sources: tuple[Source, ...] = ()

    @property
    def length(self) -> int:
        return self.calibration.shape[1]

    @property
    def parts(self) -> dict[str, Tensor]:
        """The sets by the name of their split, in the order in which they are dealt."""
        return {split: getattr(self, split) for split in SPLITS}


@dataclass(frozen=True)
class Dealt:
    """The windows that `cut_windows` has dealt out of a text.

    Args:
        sha256: Of the text.
        windows: How many, of all splits together.
        length: Tokens in each, BOS included.
        seed: Of their order.
        first: So many of them, dealt before the others, do not count.
        behind: What had been dealt before: windows that share a token with it were passed over.
    """

    sha256: str
    windows: int
    length: int
    seed: int
    first: int = 0
    behind: tuple["Dealt", ...] = ()


@dataclass(frozen=True)
class _Cut:
    """All of a text in windows.

    Args:
        windows: `num_windows x length` token ids, BOS included.
        tokens: In the text.
    """

    text: Text
    share: float
    windows: Tensor
    tokens: int
    bos: bool
    chat: bool

    @property
    def payload(self) -> int:
        return self.windows.shape[1] - self.bos

    def too_short(self, needed: str, remedy: str) -> NotEnoughText:
        return NotEnoughText(f"The text '{self.text.source}' holds {self.tokens} tokens, {needed}: {remedy}.")

    def unseen(self, seed: int, seen: Sequence[Dealt]) -> tuple[Tensor, int]:
        """Its windows that share no token with what was dealt before, in the order in which they are dealt, and how many tokens were."""
        used = self._used(seen)
        return _apart(dealing_order(len(self.windows), seed), self.payload, used), int(used.sum())

    def _used(self, seen: Sequence[Dealt]) -> Tensor:
        """Which of its tokens were dealt before."""
        used = torch.zeros(self.tokens, dtype=torch.bool)
        for past in (past for past in seen if past.sha256 == self.text.sha256):
            length = past.length - self.bos
            order = _apart(dealing_order(self.tokens // length, past.seed), length, self._used(past.behind))
            for place in order[past.first : past.windows].tolist():
                used[place * length : (place + 1) * length] = True
        return used


def cut_windows(
    text: Text | Mix,
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    length: int,
    seed: int,
    chat: bool = False,
) -> TokenWindows:
    """Cut `text` into consecutive windows of `length` tokens and deal them out at random, each to one split only.

    A tokenizer that starts texts with a BOS token by itself gets one in every window (it counts towards `length`). Of a mix, every
    split gets windows of each text in proportion to its share.

    Args:
        counts: Windows wanted in each of `SPLITS`.
        chat: Put the text through the tokenizer's chat template first, see `as_chat`.

    Raises:
        NotEnoughText: Says how many tokens are there and how many are needed; or a split is too small for all texts of the mix.
        UnreadableText: There is no chat template.
    """

    def deal(cut: _Cut, wanted: Sequence[int]) -> Hand:
        if len(cut.windows) < sum(wanted):
            needed = f"{sum(wanted) * cut.payload} are needed ({sum(wanted)} windows of {cut.payload})"
            raise cut.too_short(needed, "give a longer text or ask for fewer tokens")
        return dealing_order(len(cut.windows), seed)[: sum(wanted)].split(list(wanted))

    return _dealt(_cuts(text, tokenizer, length, chat), text, [counts[split] for split in SPLITS], deal)


def unseen_windows(
    text: Text | Mix,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
    heldout: int,
    training: int = 1,
    seen: Sequence[Dealt] = (),
    chat: bool = False,
    judged: Sequence[Dealt] = (),
) -> TokenWindows:
    """All windows of a text: to train on (`calibration`), to choose by (`proxy`) and to compare on (`heldout`).

    Neither of the latter shares a token with what was dealt before. They are the last such ones of the seeded order. Of a mix, as many
    windows to train on as there are of its texts in proportion.

    Args:
        heldout: Windows wanted in each of the latter.
        training: Windows wanted at least in the first, which may have been dealt before.
        seen: Counts where it came from the same text, cut with the same tokenizer and `chat`.
        judged: As `seen`; what others judge by, of which nothing is trained on either.

    Raises:
        NotEnoughText: Says how many tokens are there and how many are needed.
    """

    def deal(cut: _Cut, wanted: Sequence[int]) -> Hand:
        first, judging = wanted[0], sum(wanted[1:])
        unseen, used = cut.unseen(seed, [*seen, *judged])
        free, away = cut.unseen(seed, judged)
        if len(unseen) < judging or len(free) < first + judging:
            needed = max(used, first * cut.payload + away) + judging * cut.payload
            raise cut.too_short(
                f"at least {needed} are needed: {judging} windows of {cut.payload} to "
                f"judge by, beside the {used} tokens that the search used and {first} windows to train on "
                f"({len(unseen)} windows are unseen)",
                "give a longer or another text, or a smaller --heldout",
            )
        kept = unseen[len(unseen) - judging :]
        return free[~torch.isin(free, kept)], *kept.split(list(wanted[1:]))

    return _dealt(_cuts(text, tokenizer, length, chat), text, [training, heldout, heldout], deal)


def fresh_windows(
    text: Text,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    seen: Sequence[Dealt] = (),
    chat: bool = False,
) -> TokenWindows:
    """So many windows to judge by (`heldout`), none of which shares a token with what was dealt before.

    Args:
        seen: As in `unseen_windows`.

    Raises:
        NotEnoughText: Says how many tokens are there and how many are needed.
    """

    def deal(cut: _Cut, wanted: Sequence[int]) -> Hand:
        unseen, used = cut.unseen(seed, seen)
        if len(unseen) < count:
            raise cut.too_short(
                f"{count} windows of {cut.payload} are needed beside the {used} tokens that the search used "
                f"({len(unseen)} windows are unseen)",
                "name a longer text, or none, for --heldout-text, or ask for fewer --heldout-tokens",
            )
        return unseen[:0], unseen[:0], unseen[:count]

    return _dealt(_cuts(text, tokenizer, length, chat), text, [0, 0, count], deal)


def apportioned(count: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to `count`, by the largest remainder; the earlier one where remainders are equal.

    Args:
        shares: Add up to 1.
    """
    exact = [count * share for share in shares]
    whole = [math.floor(part) for part in exact]
    for place in sorted(range(len(exact)), key=lambda place: whole[place] - exact[place])[: count - sum(whole)]:
        whole[place] += 1
    return whole


def _dealt(
    cuts: Sequence[_Cut], text: Text | Mix, wanted: Sequence[int], deal: Callable[[_Cut, Sequence[int]], Hand]
) -> TokenWindows:
    """The windows that `deal` takes of each text, in one row for each of `SPLITS`.

    Args:
        wanted: Windows in each split, of all texts together. `deal` gets each text's part of them; what it takes beyond the first's
            number is cut back until the texts are in proportion.
    """
    shares = [cut.share for cut in cuts]
    each = [apportioned(number, shares) for number in wanted]
    hands = [deal(cut, parts) for cut, *parts in zip(cuts, *each, strict=True)]
    if len(cuts) > 1:
        most = min(math.floor((len(hand[0]) + 1) / share) for hand, share in zip(hands, shares, strict=True))
        while any(n > len(hand[0]) for n, hand in zip(apportioned(most, shares), hands, strict=True)):
            most -= 1
        hands = [(hand[0][:n], *hand[1:]) for n, hand in zip(apportioned(most, shares), hands, strict=True)]
    for split, *found in zip(SPLITS, *hands, strict=True):
        if any(map(len, found)) and not all(map(len, found)):
            left_out = cuts[next(place for place, hand in enumerate(found) if not len(hand))]
            raise NotEnoughText(
                f"{sum(map(len, found))} {split} windows are too few for one of '{left_out.text.source}', which is {left_out.share:.1%} of "
                "the mix: ask for more tokens, or give it more weight."
            )
    taken = [[cut.windows[places] for places in hand] for cut, hand in zip(cuts, hands, strict=True)]
    calibration, proxy, heldout = (_interleaved(same) for same in zip(*taken, strict=True))
    sources = [
        Source(cut.text.source, cut.text.sha256, cut.share, sum(map(len, hand)))
        for cut, hand in zip(cuts, hands, strict=True)
    ]
    return TokenWindows(
        calibration,
        proxy,
        heldout,
        source=text.source,
        sha256=text.sha256,
        available_tokens=sum(cut.tokens for cut in cuts),
        bos=cuts[0].bos,
        chat=cuts[0].chat,
        sources=tuple(sources) if len(cuts) > 1 else (),
    )


def _interleaved(parts: Sequence[Tensor]) -> Tensor:
    """The windows of all parts, each evenly over the whole: whoever reads the first few sees the texts in proportion."""
    when = torch.cat([(torch.arange(len(part), dtype=torch.float64) + 0.5) / max(1, len(part)) for part in parts])
    return torch.cat(list(parts))[when.argsort(stable=True)]


def _apart(order: Tensor, length: int, used: Tensor) -> Tensor:
    """Those of a text's windows of so many tokens, in their order, that hold no token which is used."""
    return order[~used[: len(order) * length].view(-1, length).any(1)[order]]


def dealing_order(windows: int, seed: int) -> Tensor:
    """In which so many windows are dealt."""
    return torch.randperm(windows, generator=torch.Generator().manual_seed(seed))


def _cuts(text: Text | Mix, tokenizer: PreTrainedTokenizerBase, length: int, chat: bool) -> list[_Cut]:
    """Each text in windows, without what is left over at its end."""
    bos, cuts = adds_bos(tokenizer), []
    for part, share in text.parts:
        content = as_chat(part.content, tokenizer) if chat else part.content
        ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
        payload = length - bos
        windows = ids[: len(ids) // payload * payload].view(-1, payload)
        if bos:
            windows = torch.cat([windows.new_full((len(windows), 1), tokenizer.bos_token_id), windows], dim=1)
        cuts.append(_Cut(part, share, windows, len(ids), bos, chat))
    return cuts


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer starts texts with a BOS token by itself."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def digest_of(windows: Tensor) -> str:
    """A name for token ids, wherever they are."""
    return hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()
