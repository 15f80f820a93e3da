"""A file of items is read whole or refused by the line at fault."""

import json
from pathlib import Path

import pytest

from pruning.errors import UnreadableItems
from pruning.items import Item, Passage, read_items

CHOICE = {"question": "q", "choices": ["a", "b"], "answer": 1}
LAST = {"context": "He said\u2028to", "continuation": " Leon"}
NEITHER = "expected an object with `question`, `choices` and `answer` or with `context` and `continuation`, got neither"


def written(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def test_the_kind_is_told_by_the_fields(tmp_path: Path) -> None:
    choices = read_items(written(tmp_path / "arc.v1.jsonl", CHOICE, "", {**CHOICE, "id": 7}))
    assert (choices.name, choices.kind) == ("arc.v1", "multiple_choice")
    assert choices.items == (Item("q", ("a", "b"), 1),) * 2
    passages = read_items(
        written(tmp_path / "l.jsonl", "\ufeff" + json.dumps(LAST), LAST)
    )  # a line separator ends no line
    assert passages.kind == "last_word" and passages.items == (Passage("He said\u2028to", " Leon"),) * 2
    assert passages.sha256 != choices.sha256


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ('{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}', "not JSON"),
        ("[1]", NEITHER),
        ({"text": "a"}, NEITHER),
        ({**CHOICE, "context": "a"}, "got both"),
        ({**CHOICE, "question": " "}, "`question` must be a text, got ' '"),
        ({"question": "q", "answer": 0}, "`choices` must be two or more texts, got None"),
        ({**CHOICE, "choices": ["a"]}, "two or more texts"),
        ({**CHOICE, "choices": ["a", ""]}, "two or more texts"),
        ({**CHOICE, "answer": 2}, "from 0 to 1, got 2"),
        ({**CHOICE, "answer": True}, "from 0 to 1, got True"),
        (LAST, "has `context` and `continuation` where the lines before have `question`, `choices` and `answer`"),
        ({"context": "a"}, "`continuation` must be a text, got None"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_item_is_named(tmp_path: Path, line: object, expected: str) -> None:
    with pytest.raises(UnreadableItems) as caught:
        read_items(written(tmp_path / "items.jsonl", CHOICE, line))
    assert f"{tmp_path / 'items.jsonl'}, line 2: " in str(caught.value) and expected in str(caught.value)


def test_a_file_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableItems, match="No such file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(UnreadableItems, match="no item"):
        read_items(written(tmp_path / "empty.jsonl", "", ""))
    (tmp_path / "latin.jsonl").write_bytes(b"\xff")
    with pytest.raises(UnreadableItems, match="not UTF-8"):
        read_items(tmp_path / "latin.jsonl")
