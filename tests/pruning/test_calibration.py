"""Windows are disjoint, reproducible and complete with their recipe; a mix is dealt in proportion."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruning.calibration import (
    SPLITS,
    Dealt,
    TokenWindows,
    apportioned,
    cut_windows,
    fresh_windows,
    unseen_windows,
)
from pruning.errors import NotEnoughText
from pruning.sampling import sample_windows
from pruning.text import Mix, Text

COUNTS = {"calibration": 5, "proxy": 4, "heldout": 3}
ONE_FAMILY = pytest.mark.parametrize("model", ["llama"], indirect=True)


def build_tokenizer(bos: bool, has_bos_token: bool = True) -> PreTrainedTokenizerFast:
    """One token per word `w0` ... `w999`, in order from id 3 on; `bos`: starts every text with `<s>` by itself."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": 3 + number for number in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if has_bos_token else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def words(count: int) -> Text:
    """`count` different words, so that a window tells where it was cut."""
    return Text("text:words", " ".join(f"w{number}" for number in range(count)))


def splits(windows: TokenWindows) -> list[Tensor]:
    return [*windows.parts.values()]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("count", [96, 200])
def test_windows_are_disjoint_runs_of_the_text(bos: bool, count: int) -> None:
    found = cut_windows(words(count), build_tokenizer(bos), COUNTS, length=8, seed=0)
    assert [len(split) for split in splits(found)] == [5, 4, 3]
    assert (found.length, found.bos, found.available_tokens) == (8, bos, count)
    everything = torch.cat(splits(found))
    payload = everything[:, int(bos) :]
    assert payload.unique().numel() == payload.numel()  # no word twice, so no overlap of any two windows
    assert torch.all(payload.diff(dim=1) == 1)
    assert torch.all(everything[:, 0] == 1) if bos else not torch.any(everything == 1)
    assert found.source == "text:words"
    assert found.sha256 == words(count).sha256


def test_a_bos_token_that_the_tokenizer_does_not_add_is_not_added() -> None:
    for tokenizer in (build_tokenizer(bos=False), build_tokenizer(bos=False, has_bos_token=False)):
        assert not cut_windows(words(96), tokenizer, COUNTS, length=8, seed=0).bos


def test_the_seed_decides() -> None:
    first, again, other = (
        cut_windows(words(300), build_tokenizer(True), COUNTS, length=8, seed=seed) for seed in (3, 3, 4)
    )
    for one, same, different in zip(splits(first), splits(again), splits(other), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)


def test_windows_come_from_all_over_the_text() -> None:
    found = cut_windows(words(960), build_tokenizer(False), COUNTS, length=8, seed=0)
    for split in splits(found):
        assert split.max() - split.min() > 120  # neighbours would span 40 at most


def test_cutting_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    cut_windows(words(96), build_tokenizer(True), COUNTS, length=8, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("bos", "needed"), [(False, 96), (True, 84)])
def test_too_short_a_text_is_refused_with_the_numbers(bos: bool, needed: int) -> None:
    cut_windows(words(needed), build_tokenizer(bos), COUNTS, length=8, seed=0)
    with pytest.raises(NotEnoughText) as error:
        cut_windows(words(needed - 1), build_tokenizer(bos), COUNTS, length=8, seed=0)
    for said in ("text:words", f"{needed - 1} tokens", f"{needed} are needed", f"12 windows of {needed // 12}"):
        assert said in str(error.value)


LENGTHS = {
    "alike": (8, 8, 0, 0),
    "of another seed": (8, 8, 0, 1),
    "longer": (8, 16, 0, 0),
    "shorter and shifted": (16, 7, 3, 3),
}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("dealt", "length", "first", "second"), LENGTHS.values(), ids=list(LENGTHS))
@pytest.mark.parametrize("count", [300, 999])
def test_unseen_windows_share_no_token_with_what_was_dealt(
    bos: bool, dealt: int, length: int, first: int, second: int, count: int
) -> None:
    text, tokenizer = words(count), build_tokenizer(bos)
    used = torch.cat(splits(cut_windows(text, tokenizer, COUNTS, dealt, first)))
    found = unseen_windows(text, tokenizer, length, second, 2, 1, [Dealt(text.sha256, 12, dealt, first)])
    judged = torch.cat([found.proxy, found.heldout])
    assert (len(found.proxy), len(found.heldout), found.length) == (2, 2, length)
    assert len(found.calibration) == count // (length - bos) - 4
    own = torch.cat(splits(found))[:, int(bos) :]
    assert own.unique().numel() == own.numel()
    assert not torch.isin(judged[:, int(bos) :], used[:, int(bos) :]).any()
    # What nobody has dealt is the end of the same order.
    fresh = unseen_windows(text, tokenizer, length, second, 2, 1, [Dealt("another text", 12, dealt, first)])
    everything = {"calibration": count // (length - bos) - 4, "proxy": 2, "heldout": 2}
    for one, other in zip(splits(fresh), splits(cut_windows(text, tokenizer, everything, length, second)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(("dealt", "length", "first", "second"), LENGTHS.values(), ids=list(LENGTHS))
def test_what_others_judge_by_is_not_trained_on(bos: bool, dealt: int, length: int, first: int, second: int) -> None:
    """Neither the last windows that were dealt nor those that were dealt behind them; of all others no window is lost."""
    text, tokenizer = words(999), build_tokenizer(bos)
    own = cut_windows(text, tokenizer, COUNTS, dealt, first)
    past = Dealt(text.sha256, 12, dealt, first)
    later = fresh_windows(text, tokenizer, 5, dealt, first, [past])
    judged = [replace(past, first=9), replace(past, windows=5, behind=(past,))]
    found = unseen_windows(text, tokenizer, length, second, 2, 1, [past], judged=judged)
    used = torch.cat([own.heldout, later.heldout])[:, int(bos) :]
    everything, whole = torch.cat(splits(found)), splits(unseen_windows(text, tokenizer, length, second, 2))
    assert not torch.isin(everything[:, int(bos) :], used).any()
    free = [row for row in torch.cat(whole) if not torch.isin(row[int(bos) :], used).any()]
    assert sorted(map(tuple, everything.tolist())) == sorted(tuple(row.tolist()) for row in free)
    assert not torch.isin(
        torch.cat([found.proxy, found.heldout])[:, int(bos) :], torch.cat(splits(own))[:, int(bos) :]
    ).any()
    with pytest.raises(NotEnoughText, match="windows to train on"):
        unseen_windows(text, tokenizer, length, second, 2, len(found.calibration) + 1, [past], judged=judged)


@pytest.mark.parametrize(("bos", "training", "needed"), [(False, 1, 144), (True, 1, 126), (False, 14, 160)])
def test_a_text_of_just_the_needed_length_is_enough(bos: bool, training: int, needed: int) -> None:
    """12 windows were dealt and 6 are to judge by; training may take what was dealt."""
    tokenizer = build_tokenizer(bos)

    def cut(count: int) -> TokenWindows:
        return unseen_windows(words(count), tokenizer, 8, 0, 3, training, [Dealt(words(count).sha256, 12, 8, 0)])

    assert len(cut(needed).calibration) == max(12, training)
    for short in (1, 8 - bos):
        with pytest.raises(NotEnoughText) as error:
            cut(needed - short)
        for said in ("text:words", f"{needed - short} tokens", f"at least {needed} are needed", "--heldout"):
            assert said in str(error.value)


MIXES = {"a third": (1, 2), "three": (1, 1, 1), "uneven": (0.45, 0.35, 0.2)}  # weights


def mixed(weights: Sequence[float], each: int = 300) -> Mix:
    """Texts of `each` words that no other has."""
    texts = [
        Text(f"text:{n}", " ".join(f"w{word}" for word in range(n * each, (n + 1) * each))) for n in range(len(weights))
    ]
    return Mix(tuple((text, weight / sum(weights)) for text, weight in zip(texts, weights, strict=True)))


def per_text(windows: Tensor, each: int = 300) -> list[int]:
    """Of which text each window is."""
    return ((windows[:, -1] - 3) // each).tolist()


@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (1 / 3, 1 / 3, 1 / 3), (0.1, 0.2, 0.7), (0.01, 0.99)])
def test_apportioned_numbers_are_the_shares_to_less_than_one(shares: tuple[float, ...]) -> None:
    for count in range(60):
        found = apportioned(count, shares)
        assert sum(found) == count and all(abs(n - count * share) < 1 for n, share in zip(found, shares, strict=True))
    assert apportioned(5, (0.5, 0.5)) == [3, 2]
    assert apportioned(10, (0.46, 0.34, 0.2)) == [5, 3, 2] and apportioned(10, (0.44, 0.36, 0.2)) == [4, 4, 2]


@pytest.mark.parametrize("weights", MIXES.values(), ids=list(MIXES))
@pytest.mark.parametrize("bos", [False, True])
def test_every_split_has_windows_of_each_text_in_proportion(bos: bool, weights: tuple[float, ...]) -> None:
    mix, counts = mixed(weights), {"calibration": 20, "proxy": 9, "heldout": 6}
    found = cut_windows(mix, build_tokenizer(bos), counts, length=8, seed=1)
    shares = [share for _, share in mix.parts]
    for split, windows in zip(SPLITS, splits(found), strict=True):
        texts = per_text(windows)
        assert [texts.count(n) for n in range(len(shares))] == apportioned(counts[split], shares)
        for first in range(1, len(texts)):  # units are scored, and the path is allocated, on the first windows
            assert all(abs(texts[:first].count(n) - first * share) < 1.5 for n, share in enumerate(shares))
    payload = torch.cat(splits(found))[:, int(bos) :]
    assert payload.unique().numel() == payload.numel()
    assert found.sha256 == mix.sha256 and found.source == mix.source and found.available_tokens == 300 * len(weights)
    assert [(source.source, source.sha256, source.share) for source in found.sources] == [
        (text.source, text.sha256, share) for text, share in mix.parts
    ]
    assert [source.windows for source in found.sources] == [
        per_text(torch.cat(splits(found))).count(n) for n in range(len(shares))
    ]


def test_each_text_of_a_mix_is_dealt_as_if_it_were_alone() -> None:
    tokenizer, mix = build_tokenizer(True), mixed((1, 2))
    found = cut_windows(mix, tokenizer, {"calibration": 9, "proxy": 6, "heldout": 3}, length=8, seed=1)
    for n, (text, _) in enumerate(mix.parts):
        counts = dict(zip(SPLITS, [(3, 2, 1), (6, 4, 2)][n], strict=True))
        alone = cut_windows(text, tokenizer, counts, length=8, seed=1)
        assert alone.sources == ()
        for one, other in zip(splits(found), splits(alone), strict=True):
            assert torch.equal(one[torch.tensor(per_text(one)) == n], other)


def test_a_split_without_a_text_of_the_mix_is_refused() -> None:
    counts = {"calibration": 40, "proxy": 9, "heldout": 2}
    with pytest.raises(NotEnoughText, match=r"2 heldout windows are too few for one of 'text:0', which is 10\.0%"):
        cut_windows(mixed((1, 9), 500), build_tokenizer(False), counts, length=8, seed=0)


def test_the_text_of_a_mix_that_is_too_short_is_named() -> None:
    counts = {"calibration": 40, "proxy": 9, "heldout": 6}
    with pytest.raises(NotEnoughText, match=r"'text:1' holds 300 tokens, 352 are needed \(44 windows of 8\)"):
        cut_windows(mixed((1, 4)), build_tokenizer(False), counts, length=8, seed=0)


@pytest.mark.parametrize("weights", MIXES.values(), ids=list(MIXES))
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [8, 11])
def test_what_a_mix_has_dealt_is_not_judged_by_again(length: int, bos: bool, weights: tuple[float, ...]) -> None:
    """Neither out of the same mix, nor out of one of its texts, nor out of another mix with them."""
    mix, tokenizer = mixed(weights), build_tokenizer(bos)
    dealt = cut_windows(mix, tokenizer, {"calibration": 12, "proxy": 9, "heldout": 6}, length=8, seed=1)
    seen = [Dealt(source.sha256, source.windows, 8, 1) for source in dealt.sources]
    used = torch.cat(splits(dealt))[:, int(bos) :]
    other = Mix((mix.parts[1], mix.parts[0]))
    for text in (mix, mix.parts[0][0], mix.parts[1][0], Mix(tuple((part, 0.5) for part, _ in other.parts))):
        found = unseen_windows(text, tokenizer, length, 2, 3, 2, seen)
        judged = torch.cat([found.proxy, found.heldout])[:, int(bos) :]
        assert len(judged) == 6 and not torch.isin(judged, used).any()
        everything = torch.cat(splits(found))[:, int(bos) :]
        assert everything.unique().numel() == everything.numel()
    trained = per_text(unseen_windows(mix, tokenizer, length, 2, 3, 2, seen).calibration)
    assert [trained.count(n) for n in range(len(weights))] == apportioned(
        len(trained), [share for _, share in mix.parts]
    )
    most = max(range(len(weights)), key=lambda n: weights[n])  # which runs out first
    assert trained.count(most) + len(trained) / len(weights) > 300 // (length - bos) - 6


def digests(windows: Tensor) -> set[str]:
    return {hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in windows}


@pytest.mark.parametrize("weights", [None, (1, 2)], ids=["one text", "a mix"])
@pytest.mark.parametrize("bos", [False, True])
def test_fresh_windows_were_dealt_to_nobody(bos: bool, weights: tuple[float, ...] | None) -> None:
    """Not even in part: no token occurs twice in these texts. Windows of the same length are compared by their digests too."""
    text, tokenizer = mixed(weights) if weights else words(600), build_tokenizer(bos)
    dealt = cut_windows(text, tokenizer, {"calibration": 9, "proxy": 6, "heldout": 6}, length=8, seed=1)
    seen = [Dealt(part.sha256, part.windows, 8, 1) for part in dealt.sources] or [Dealt(text.sha256, 21, 8, 1)]
    same, used = text.parts[-1][0], torch.cat(splits(dealt))
    for length in (8, 11):
        found = fresh_windows(same, tokenizer, 6, length, 1, seen)
        assert found.heldout.shape == (6, length) and not len(found.calibration) and not len(found.proxy)
        assert len(digests(found.heldout)) == 6 and not digests(found.heldout) & digests(used)
        assert not torch.isin(found.heldout[:, int(bos) :], used[:, int(bos) :]).any()
    first = fresh_windows(same, tokenizer, 6, 8, 1)
    assert digests(first.heldout) & digests(used)  # those that the search saw would be the first to be dealt
    with pytest.raises(NotEnoughText, match=r"--heldout-text.*--heldout-tokens"):
        fresh_windows(same, tokenizer, 90, 8, 1, seen)


def test_windows_of_a_chat_hold_what_the_template_adds() -> None:
    """Importance and refits see the special tokens, and no word of the source twice."""
    tokenizer = build_tokenizer(True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|> {{ m.content }} {% endfor %}"
    found = cut_windows(words(900), tokenizer, COUNTS, 64, 0, chat=True)
    everything = torch.cat(splits(found))
    for token in ("<|user|>", "<|assistant|>"):
        assert torch.isin(everything, tokenizer.convert_tokens_to_ids(token)).sum() >= 2
    inside = everything[(everything >= 3) & (everything < 1003)]
    assert inside.unique().numel() == inside.numel() > 500
    assert found.chat and found.sha256 == words(900).sha256 and found.available_tokens > 900
    unseen = unseen_windows(words(900), tokenizer, 64, 0, 1, 1, [Dealt(words(900).sha256, 10, 64, 0)], chat=True)
    dealt = cut_windows(words(900), tokenizer, {"calibration": 4, "proxy": 3, "heldout": 3}, 64, 0, chat=True)
    judged = torch.cat([unseen.proxy, unseen.heldout])
    assert not digests(judged) & digests(torch.cat(splits(dealt)))


@ONE_FAMILY
def test_sampled_windows_follow_the_seed_and_nothing_else(
    model: PreTrainedModel, unchanged: Callable[[PreTrainedModel], AbstractContextManager[None]]
) -> None:
    tokenizer, state = build_tokenizer(True), torch.get_rng_state()
    with unchanged(model):
        first = sample_windows(model, tokenizer, COUNTS, length=8, seed=3, batch_size=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again = sample_windows(model, tokenizer, COUNTS, length=8, seed=3, batch_size=5)
    other = sample_windows(model, tokenizer, COUNTS, length=8, seed=4, batch_size=5)
    for one, same, different in zip(splits(first), splits(again), splits(other), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)
    assert first.sha256 == again.sha256 != other.sha256
    assert [split.shape for split in splits(first)] == [(5, 8), (4, 8), (3, 8)]
    everything = torch.cat(splits(first))
    assert first.available_tokens == everything.numel()
    assert torch.all(everything[:, 0] == tokenizer.bos_token_id)
    assert len({tuple(window) for window in everything.tolist()}) == len(everything)


@ONE_FAMILY
@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.01}, {"top_k": 1}, {"top_p": 0.01}, {"do_sample": False}, {"repetition_penalty": 5.0}],
    ids=lambda setting: next(iter(setting)),
)
def test_samples_are_the_models_own_distribution(model: PreTrainedModel, setting: dict[str, float]) -> None:
    """Chat models ship sampling settings in their generation config; none of them may bend the calibration text."""
    expected = sample_windows(model, build_tokenizer(True), COUNTS, length=12, seed=0)
    model.generation_config.update(**setting)
    found = sample_windows(model, build_tokenizer(True), COUNTS, length=12, seed=0)
    assert found.sha256 == expected.sha256


@ONE_FAMILY
def test_sampled_windows_are_never_cut_short(model: PreTrainedModel) -> None:
    model.generation_config.update(eos_token_id=list(range(2, 60)))
    tokenizer = build_tokenizer(False, has_bos_token=False)
    everything = torch.cat(splits(sample_windows(model, tokenizer, COUNTS, length=8, seed=0)))
    assert everything.shape == (12, 8)
    assert torch.all(everything[:, 0] == tokenizer.eos_token_id)  # the usual start where there is no BOS
