"""Where text comes from: a source as the user writes it -> the text, or a mix of texts."""

import hashlib
import json
import math
import platform
import re
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from pruning.errors import UnreadableText

SOURCES = "builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN] or self"
MIX = r"mix:SOURCE=WEIGHT,SOURCE=WEIGHT,… with weights above 0 and a comma inside a source written '\,'"
# A slice of a split, as `datasets` writes it, has colons in its brackets: `train[:2000]`, `train[10%:20%]+test`.
HUB = re.compile(
    r"(?P<dataset>[^:]+):(?P<config>[^:]*):(?P<split>(?:[^:\[\]]|\[[^\[\]]*\])+)(?::(?P<column>[^:\[\]]+))?"
)
# Every CPython from 3.11 on has these, each in one file. `pydoc_data.topics`, which is `builtin`, is none of them.
MODULES = (
    "argparse", "calendar", "configparser", "contextlib", "csv", "difflib", "enum", "fractions", "ftplib", "functools",
    "heapq", "imaplib", "ipaddress", "mailbox", "optparse", "pickle", "plistlib", "pprint", "queue", "random", "selectors",
    "shlex", "shutil", "smtplib", "socket", "statistics", "subprocess", "tempfile", "textwrap", "threading", "uuid", "weakref",
)  # fmt: skip
CONTINUE = "Continue this text:\n\n"
# A turn of a conversation: the next 32 to 128 words, to the end of a paragraph where one ends there.
TURN = re.compile(r"(?:\S+\s+){31,127}?\S+(?=\n\s*\n|\s*\Z)|(?:\S+\s+){0,127}\S+")
# Some templates tell the model what day it is. The same text has to be the same tokens tomorrow.
SOME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class Text:
    """Raw text and where it came from."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    @property
    def parts(self) -> "tuple[tuple[Text, float], ...]":
        """Itself, as the only part of a mix."""
        return ((self, 1.0),)

    def edited(self, change: Callable[[str], str]) -> "Text":
        return replace(self, content=change(self.content))


@dataclass(frozen=True)
class Mix:
    """Different texts, and which share of the tokens each has; shares add up to 1."""

    parts: tuple[tuple[Text, float], ...]

    @property
    def source(self) -> str:
        return "mix of " + ", ".join(f"{share:.1%} {text.source}" for text, share in self.parts)

    @property
    def sha256(self) -> str:
        """Of the parts' digests and shares."""
        return hashlib.sha256(json.dumps([(text.sha256, share) for text, share in self.parts]).encode()).hexdigest()

    def edited(self, change: Callable[[str], str]) -> "Mix":
        return Mix(tuple((text.edited(change), share) for text, share in self.parts))


def read_mix(source: str) -> Text | Mix:
    """Read any source that `read_text` reads, or `mix:SOURCE=WEIGHT,SOURCE=WEIGHT,…`. A mix of one text is that text.

    Sources of a mix are separated by commas; a comma inside a source (of a path, say) is written `\\,`. The weight stands behind the
    last `=` of its part, so that paths may hold others. Weights count tokens, and need not add up to anything.

    Raises:
        UnreadableText: As `read_text`; a bad weight, a mix in a mix, `self` in a mix, or the same text twice.
    """
    kind, _, rest = source.partition(":")
    if kind != "mix":
        return read_text(source)
    texts: dict[str, Text] = {}
    weights = []
    for part in re.split(r"(?<!\\),", rest):
        inner, equals, written = part.replace("\\,", ",").rpartition("=")
        try:
            weight = float(written)
        except ValueError:
            weight = math.nan
        if not equals or not inner or not 0 < weight < math.inf:
            raise UnreadableText(f"The mix has no use for '{part}': expected {MIX}.")
        if inner == "self" or inner.startswith("mix:"):
            why = "it is sampled from the model, not read" if inner == "self" else "list its parts instead"
            raise UnreadableText(f"'{inner}' cannot be part of a mix: {why}.")
        text = read_text(inner)
        if (twin := texts.get(text.sha256)) is not None:
            raise UnreadableText(f"The mix holds one text twice, as '{twin.source}' and as '{text.source}': keep one.")
        texts[text.sha256] = text
        weights.append(weight)
    if len(texts) == 1:
        return next(iter(texts.values()))
    total = math.fsum(weights)
    return Mix(tuple(zip(texts.values(), [weight / total for weight in weights], strict=True)))


def read_text(source: str) -> Text:
    """Read `builtin`, `python`, `text:PATH` or `hf:DATASET:CONFIG:SPLIT[:COLUMN]`, of a data set the column `text` by default.

    `builtin` is the English prose of the language reference that ships with every CPython (`pydoc_data.topics`).
    Some of its topics repeat whole paragraphs of others; repeats are left out, or held-out windows would not be unseen.
    `python` is the source code of `MODULES`, which ships with it as well.

    Raises:
        UnreadableText: Unknown source, a mix, no such file, no UTF-8 text, or the dataset cannot be loaded.
    """
    kind, _, rest = source.partition(":")
    if source == "builtin":
        from pydoc_data.topics import topics

        paragraphs = (p for _, topic in sorted(topics.items()) for p in topic.split("\n\n"))
        once = {" ".join(p.split()): p for p in paragraphs}  # repeats differ in line ends and indentation
        return Text(f"builtin (pydoc_data.topics of Python {platform.python_version()})", "\n\n".join(once.values()))
    if source == "python":
        files = [Path(sysconfig.get_path("stdlib"), f"{name}.py") for name in MODULES]
        content = "\n\n".join(_file(file, "source code of Python's library") for file in files)
        return Text(f"python (source of {len(files)} modules of Python {platform.python_version()})", content)
    if kind == "text" and rest:
        return Text(source, _file(Path(rest), "text file"))
    if kind == "hf" and (place := HUB.fullmatch(rest)):
        return Text(
            source, _hub_text(rest, place["dataset"], place["config"], place["split"], place["column"] or "text")
        )
    if kind == "mix":
        raise UnreadableText(
            f"'{source}' is a mix of texts: one is expected here, so that no number is of two domains."
        )
    raise UnreadableText(f"Unknown text source '{source}': expected {SOURCES}; or {MIX}.")


def as_chat(content: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Text -> conversations in the format of the tokenizer's chat template, special tokens included, one after the other.

    The text is cut into turns (`TURN`). Each two make a conversation: the user gives the first and asks to continue it, and the assistant
    answers with the second. Where one is left over at the end, it answers to the bare request.

    Raises:
        UnreadableText: There is no chat template, or it refuses such a conversation.
    """
    check_chat(tokenizer)
    turns = TURN.findall(content)
    pairs = [(CONTINUE + asked, answer) for asked, answer in zip(turns[::2], turns[1::2], strict=False)]
    pairs += [(CONTINUE.strip(), turn) for turn in turns[2 * len(pairs) :]]
    chats = [[{"role": "user", "content": asked}, {"role": "assistant", "content": said}] for asked, said in pairs]
    try:
        template = tokenizer.get_chat_template()
        if "strftime_now" in template:
            template = SOME_DAY + template
        rendered = tokenizer.apply_chat_template(chats, chat_template=template, tokenize=False) if chats else []
        return "".join(map(str, rendered))
    except Exception as error:  # templates raise what they like
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableText(
            f"--chat: the tokenizer's chat template refuses a user's and an assistant's turn: {reason}"
        ) from error


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UnreadableText unless the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        raise UnreadableText("--chat: the tokenizer of this model has no chat template. Leave the option out.")


def _file(path: Path, what: str) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
        raise UnreadableText(f"Cannot read the {what} '{path}': {reason}.") from error


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
