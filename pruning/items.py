"""Files of items that a model gets right or wrong: multiple choice, and passages whose end it should continue word for word.

JSONL, one item a line, all of one kind, which its fields tell: `question`, `choices` and `answer` (an index from 0), or `context` and
`continuation`, as LAMBADA has them (Paperno et al., 2016).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pruning.errors import UnreadableItems

Kind = Literal["multiple_choice", "last_word"]
FIELDS: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("question", "choices", "answer"),
    "last_word": ("context", "continuation"),
}


@dataclass(frozen=True)
class Item:
    """`answer` is the index of the right one among `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Passage:
    """`continuation` stands right behind `context`, so it begins with the space between them."""

    context: str
    continuation: str


@dataclass(frozen=True)
class ItemFile:
    """The items of one file.

    Args:
        name: Its name without the ending.
        source: Its path as given.
        items: `Item`s, or `Passage`s where `kind` is "last_word".
    """

    name: str
    source: str
    sha256: str
    kind: Kind
    items: Sequence[Any]

    def __str__(self) -> str:
        what = "multiple-choice items" if self.kind == "multiple_choice" else "last words"
        return f"{self.name}, {len(self.items)} {what} of {self.source} (sha256 {self.sha256[:12]})"


def read_items(path: Path) -> ItemFile:
    """Read a file of items.

    Raises:
        UnreadableItems: No such file, not UTF-8, a line that is no item, or one of another kind than the lines before it.
    """
    try:
        content = path.expanduser().read_bytes()
        lines = content.decode("utf-8-sig").split(
            "\n"
        )  # not `splitlines`: JSON may hold what that takes for a line's end
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise UnreadableItems(f"Cannot read the items in '{path}': {reason}.") from error
    items: list[Item | Passage] = []
    kinds: list[Kind] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{path}, line {number}"
            kind, item = _item(line, where)
            if kinds and kind != kinds[0]:
                raise UnreadableItems(
                    f"{where}: has {_named(kind)} where the lines before have {_named(kinds[0])}: give each kind a file of its own."
                )
            kinds.append(kind)
            items.append(item)
    if not items:
        raise UnreadableItems(f"There is no item in '{path}': expected one JSON object per line.")
    return ItemFile(path.stem, str(path), hashlib.sha256(content).hexdigest(), kinds[0], tuple(items))


def _item(line: str, where: str) -> tuple[Kind, Item | Passage]:
    try:
        found: Any = json.loads(line)
        json.dumps(found, ensure_ascii=False).encode()  # half a character can be read, but no tokenizer takes it
    except (ValueError, RecursionError) as error:
        raise UnreadableItems(
            f"{where}: not JSON ({getattr(error, 'msg', None) or getattr(error, 'reason', error)})."
        ) from error
    fields = found if isinstance(found, dict) else {}
    kinds = [kind for kind, names in FIELDS.items() if fields.keys() & set(names)]
    if len(kinds) != 1:
        raise UnreadableItems(
            f"{where}: expected an object with {' or with '.join(map(_named, FIELDS))}, got {'both' if kinds else 'neither'}."
        )
    if kinds[0] == "last_word":
        context, continuation = (_text(fields, name, where) for name in FIELDS["last_word"])
        return "last_word", Passage(context, continuation)
    question, choices, answer = _text(fields, "question", where), fields.get("choices"), fields.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UnreadableItems(f"{where}: `choices` must be two or more texts, got {choices!r}.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise UnreadableItems(f"{where}: `answer` must be an index from 0 to {len(choices) - 1}, got {answer!r}.")
    return "multiple_choice", Item(question, tuple(choices), answer)


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UnreadableItems(f"{where}: `{name}` must be a text, got {text!r}.")
    return text


def _named(kind: Kind) -> str:
    *most, last = (f"`{name}`" for name in FIELDS[kind])
    return f"{', '.join(most)} and {last}"
