"""A source is read as it is, a bad one is named; what a mix says is understood or refused; a chat holds the whole text."""

import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pruning.errors import UnreadableText
from pruning.text import CONTINUE, MIX, MODULES, SOURCES, Mix, Text, as_chat, read_mix, read_text


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


def test_python_is_the_source_of_modules_that_are_no_tests_and_not_the_builtin_prose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pruning.text.MODULES", MODULES)  # all of them: tests of runs make do with a few
    text = read_text("python")
    assert text.source.startswith("python (") and ".".join(map(str, sys.version_info[:2])) in text.source
    assert list(MODULES) == sorted({*MODULES} & sys.stdlib_module_names) and "test" not in MODULES
    assert ast.parse(text.content) and len(text.content) > 1_000_000
    prose = {line for line in read_text("builtin").content.splitlines() if len(line) > 60}
    assert len(prose) > 2000 and not prose & {*text.content.splitlines()}
    assert read_text("python") == text


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt", "x=1,y=2.txt", "back\\,slash.txt"):
        Path(name).write_text(f"This is {name}", encoding="utf-8")
    Path("again.txt").write_text("This is a.txt", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("written", "sources", "shares"),
    [
        ("text:a.txt=1,text:b.txt=3", ["text:a.txt", "text:b.txt"], [0.25, 0.75]),
        ("text:b.txt=.2,text:a.txt=1e-1,python=0.7", ["text:b.txt", "text:a.txt", "python"], [0.2, 0.1, 0.7]),
        (r"text:x=1\,y=2.txt=2,text:a.txt=2", ["text:x=1,y=2.txt", "text:a.txt"], [0.5, 0.5]),
        (r"text:a.txt=1,text:back\\,slash.txt=1", ["text:a.txt", r"text:back\,slash.txt"], [0.5, 0.5]),
    ],
)
def test_a_mix_is_sources_with_shares_of_the_tokens(
    texts: Path, written: str, sources: list[str], shares: list[float]
) -> None:
    mix = read_mix(f"mix:{written}")
    assert isinstance(mix, Mix)
    assert [text.source.split(" (")[0] for text, _ in mix.parts] == sources
    assert [share for _, share in mix.parts] == pytest.approx(shares)
    assert all(text == read_text(source) for (text, _), source in zip(mix.parts, sources, strict=True))
    assert all(text.source in mix.source and f"{share:.1%}" in mix.source for text, share in mix.parts)


def test_the_digest_of_a_mix_covers_its_texts_and_shares(texts: Path) -> None:
    mix = "mix:text:a.txt=1,text:b.txt=2"
    before = read_mix(mix).sha256
    assert read_mix("mix:text:a.txt=10,text:b.txt=20").sha256 == before  # the same shares
    assert read_mix("mix:text:a.txt=2,text:b.txt=1").sha256 != before
    Path("b.txt").write_text("Another text", encoding="utf-8")
    assert read_mix(mix).sha256 != before


@pytest.mark.parametrize("source", ["text:a.txt", "builtin"])
def test_a_mix_of_one_text_and_no_mix_are_that_text(texts: Path, source: str) -> None:
    assert read_mix(source) == read_mix(f"mix:{source}=7") == read_text(source)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        *(
            (f"text:a.txt={weight},text:b.txt=1", f"no use for 'text:a.txt={weight}': expected")
            for weight in ("0", "-1", "nan", "inf", "-inf", "many", "", "1e999", " ")
        ),
        ("text:b.txt=1,text:a.txt", "no use for 'text:a.txt': expected"),
        ("", "no use for '': expected"),
        ("text:a.txt=1,", "no use for '': expected"),
        ("text:a.txt=1,,text:b.txt=1", "no use for '': expected"),
        ("=1", "no use for '=1': expected"),
        ("text:x=1,y=2.txt=2", "Cannot read the text file 'x'"),  # its comma is not escaped
        ("words=1,text:a.txt=1", "Unknown text source 'words'"),
        ("text:a.txt=1,hf:only=1", "Unknown text source 'hf:only'"),
        ("text:a.txt=1,text:nowhere.txt=1", "Cannot read the text file 'nowhere.txt'"),
        ("text:a.txt=1,text:a.txt=2", "one text twice, as 'text:a.txt' and as 'text:a.txt'"),
        ("text:a.txt=1,text:again.txt=2", "one text twice, as 'text:a.txt' and as 'text:again.txt'"),
        ("self=1,text:a.txt=1", "'self' cannot be part of a mix: it is sampled"),
        ("text:b.txt=1,mix:text:a.txt=1", "'mix:text:a.txt' cannot be part of a mix"),
    ],
)
def test_a_bad_mix_is_refused_in_one_line(texts: Path, written: str, says: str) -> None:
    with pytest.raises(UnreadableText) as caught:
        read_mix(f"mix:{written}")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert MIX in str(caught.value) or "expected" not in says


def test_where_one_text_is_expected_a_mix_is_refused(texts: Path) -> None:
    with pytest.raises(UnreadableText, match=r"'mix:text:a\.txt=1' is a mix of texts: one is expected"):
        read_text("mix:text:a.txt=1")


def test_slices_of_data_sets_can_be_mixed(datasets: Path) -> None:
    sources = [f"hf:{datasets}/plain:default:train[:2]+train[-10%:]", f"hf:{datasets}/code:default:train[:50%]:content"]
    mix = read_mix(f"mix:{sources[0]}=1,{sources[1]}=3")
    assert mix.parts == ((read_text(sources[0]), 0.25), (read_text(sources[1]), 0.75))


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def chatting(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), chat_template=template
    )


@pytest.mark.parametrize("ends", [[], [40, 60, 75], [1, 2, 3, 500], [700]], ids=str)
@pytest.mark.parametrize("count", [1, 31, 32, 128, 129, 700])
def test_a_chat_holds_every_word_once_and_in_order(count: int, ends: list[int]) -> None:
    """`ends`: words after which a paragraph ends."""
    content = "".join(f"w{n}" + ("\n\n" if n + 1 in ends else " ") for n in range(count))
    chat = as_chat(content, chatting())
    assert re.findall(r"w\d+", chat) == content.split()
    turns = re.findall(r"<(user|assistant)>(.*?)</\1>", chat, re.DOTALL)
    assert "".join(f"<{role}>{said}</{role}>" for role, said in turns) == chat
    assert [role for role, _ in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert all(said.startswith(CONTINUE.strip()) for role, said in turns if role == "user")
    sizes = [len(words) for _, said in turns if (words := re.findall(r"w\d+", said))]
    assert max(sizes) <= 128 and min(sizes[:-1], default=32) >= 32


def test_a_turn_ends_with_a_paragraph_where_it_can() -> None:
    paragraphs = [" ".join(f"p{n}w{word}" for word in range(40)) for n in range(4)]
    chat = as_chat("\n\n".join(paragraphs), chatting())
    assert chat == "".join(
        f"<user>{CONTINUE}{asked}</user><assistant>{answer}</assistant>"
        for asked, answer in zip(paragraphs[::2], paragraphs[1::2], strict=True)
    )


def test_no_text_is_no_chat() -> None:
    assert as_chat(" \n\n ", chatting()) == ""


def test_a_chat_does_not_depend_on_the_day() -> None:
    """Templates such as that of Llama 3.2 tell the date: the same text would be other tokens tomorrow."""
    assert "<26 Jul 2024>" in as_chat("a b", chatting("<{{ strftime_now('%d %b %Y') }}>" + CHAT))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "--chat: the tokenizer of this model has no chat template"),
        (
            "{{ raise_exception('No assistants here.') }}",
            "refuses a user's and an assistant's turn: No assistants here.",
        ),
        ("{% broken", "refuses a user's and an assistant's turn: "),
    ],
)
def test_a_tokenizer_that_cannot_chat_is_refused_in_one_line(template: str | None, says: str) -> None:
    with pytest.raises(UnreadableText, match=says) as caught:
        as_chat("a b", chatting(template))
    assert "\n" not in str(caught.value)
