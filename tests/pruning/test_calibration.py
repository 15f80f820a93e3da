"""Windows are disjoint, reproducible and complete with their recipe; a bad source is named."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruning.calibration import SPLITS, Dealt, TokenWindows, cut_windows, unseen_windows
from pruning.errors import NotEnoughText, UnreadableText
from pruning.sampling import sample_windows
from pruning.text import SOURCES, Text, read_text

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
    return [getattr(windows, split) for split in SPLITS]


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


def test_builtin_is_prose_without_repeats() -> None:
    text = read_text("builtin")
    assert text.source.startswith("builtin (")
    assert len(text.content) > 200_000
    paragraphs = Counter(" ".join(paragraph.split()) for paragraph in text.content.split("\n\n"))
    assert [paragraph for paragraph, count in paragraphs.items() if paragraph and count > 1] == []
    assert read_text("builtin") == text


def test_a_text_file_is_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "colon:café.txt").write_text("Zwölf Boxkämpfer\n", encoding="utf-8")
    text = read_text(f"text:{tmp_path}/colon:café.txt")
    assert text.content == "Zwölf Boxkämpfer\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_text("text:~/colon:café.txt").sha256 == text.sha256


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.write_bytes(b"caf\xe9"), "not UTF-8"),
    ],
    ids=["missing", "directory", "latin-1"],
)
def test_an_unreadable_file_is_named(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    path = tmp_path / "input.txt"
    make(path)
    with pytest.raises(UnreadableText) as error:
        read_text(f"text:{path}")
    assert f"'{path}'" in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "source",
    ["", "wikitext", "text", "text:", "Builtin", "hf:only", "hf:a:b", "hf:a:b:c:d:e", "hf:a:b:c[:d", "self", "Python"],
)
def test_an_unknown_source_is_named_with_the_known(source: str) -> None:
    with pytest.raises(UnreadableText) as error:
        read_text(source)
    assert f"'{source}'" in str(error.value)
    assert SOURCES in str(error.value)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of local data sets, which stand for the hub's."""
    library = pytest.importorskip("datasets", reason="needs datasets: pip install 'llmbo[hub-text]'")
    folder = tmp_path_factory.mktemp("datasets")
    tables = {
        "plain": [{"text": f"Line {i}."} for i in range(50)],
        "code": [{"number": i, "content": f"x = {i}", "path": "a.py"} for i in range(50)],
        "holes": [{"text": None if i == 7 else f"Line {i}."} for i in range(50)],
        "numbers": [{"text": i} for i in range(50)],
    }
    for name, rows in tables.items():
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library.config, "HF_DATASETS_CACHE", folder / "cache")
        library.disable_progress_bars()
        yield folder
        library.enable_progress_bars()


LINES = [f"Line {i}." for i in range(50)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("plain:default:train", LINES),
        ("plain::train", LINES),
        ("plain:default:train:text", LINES),
        ("plain:default:train[:20]", LINES[:20]),
        ("plain:default:train[:50%]", LINES[:25]),
        ("plain:default:train[10:12]", LINES[10:12]),
        ("plain:default:train[:2]+train[-10%:]", LINES[:2] + LINES[-5:]),
        ("plain:default:train[:20]:text", LINES[:20]),
        ("code:default:train:content", [f"x = {i}" for i in range(50)]),
        ("code:default:train[-2:]:path", ["a.py", "a.py"]),
        ("holes:default:train", LINES[:7] + LINES[8:]),
        ("holes:default:train[7:8]", []),
    ],
)
def test_a_dataset_is_read_by_split_slice_and_column(source: str, expected: list[str], datasets: Path) -> None:
    text = read_text(f"hf:{datasets}/{source}")
    assert text == Text(f"hf:{datasets}/{source}", "\n\n".join(expected))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("code:default:train", "has no column 'text': name one of content, path as in hf:.*/code:default:train:COLUMN"),
        ("code:default:train[:3]:words", "has no column 'words': .* content, path as in hf:.*:train\\[:3\\]:COLUMN"),
        ("code:default:train:number", "has no text in its column 'number': name one of content, path"),
        ("numbers:default:train", "has no text in its column 'text': name one of none"),
        ("plain:default:test", "plain:default:test': .*test"),
        ("plain:default:train[:x]", r"plain:default:train\[:x\]': "),
        ("nowhere:default:train", "nowhere:default:train': "),
    ],
)
def test_what_a_dataset_has_not_is_named(source: str, says: str, datasets: Path) -> None:
    with pytest.raises(UnreadableText, match=says) as error:
        read_text(f"hf:{datasets}/{source}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [ConnectionError("host unreachable\nmany lines"), KeyError()])
def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UnreadableText, match=r"'wiki:raw:test': (host unreachable|KeyError)$"):
        read_text("hf:wiki:raw:test")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UnreadableText, match="pip install"):
        read_text("hf:wiki:raw:test")


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
