"""What every text of an advisor passes before it is used, stored or shown (see `store.AdviceStore`): the key is blotted out, in whatever
spelling a server sends it back, and nothing is left that a terminal, a database or a file could choke on."""

import base64
import os
import re
from array import array
from dataclasses import dataclass, field
from functools import cached_property
from html import unescape
from typing import Any

KEY_VARIABLE, URL_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
BLOT = "***"
SHORTEST_SECRET = 6  # placeholders like `none` and `EMPTY` are shorter, and blotting them out would garble replies
DEPTH = 8  # escapes of escapes that are followed
# One character in the spelling of JSON, Python, a URL or HTML, itself escaped or not.
_ESCAPE = re.compile(
    r"\\+(?:(?-i:U000)(?P<U>[0-9a-f]{5})|u\{0*(?P<braced>[0-9a-f]{1,6})\}|u(?P<u>[0-9a-f]{4})|x(?P<x>[0-9a-f]{2})|(?P<octal>[0-7]{3})"
    r"|(?P<itself>[^\w\s]))|%(?:25)*(?P<percent>[0-9a-f]{2})|&(?:amp;)*(?P<entity>#\d{1,7};|#x[0-9a-f]{1,6};|[a-z]{2,8};)",
    re.IGNORECASE,
)


def environment_key() -> str:
    """The key without the line end that a file leaves at it; empty if there is none."""
    return os.environ.get(KEY_VARIABLE, "").strip()


def environment_url() -> str:
    """The server that the environment names for the key; empty if it names none."""
    return os.environ.get(URL_VARIABLE, "").strip()


@dataclass(frozen=True)
class Censor:
    """Call it with any value that JSON can hold."""

    secret: str = field(repr=False)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, str):
            return "".join(c if c.isprintable() or c in "\n\t" else " " for c in self._blotted(value))
        if isinstance(value, dict):
            return {self(name): self(child) for name, child in value.items()}
        return [self(child) for child in value] if isinstance(value, (list, tuple)) else value

    def _blotted(self, text: str) -> str:
        if self._needles is None:
            return text
        found: list[tuple[int, int]] = []
        spelled, starts, ends = _visible(text, array("L", range(len(text))), array("L", range(1, len(text) + 1)))
        for _ in range(DEPTH):
            found += [(starts[m.start()], ends[m.end() - 1]) for m in self._needles.finditer(spelled)]
            decoded, starts, ends = _visible(*_decoded(spelled, starts, ends))
            if decoded == spelled:
                break
            spelled = decoded
        for start, end in reversed(_joined(found)):
            text = f"{text[:start]}{BLOT}{text[end:]}"
        return text

    @cached_property
    def _needles(self) -> re.Pattern[str] | None:
        """The key itself and in base64 and hex, whose spelling depends on what stands before it."""
        if len(self.secret) < SHORTEST_SECRET:
            return None
        key = self.secret.encode("utf-8", "surrogateescape")
        coded = [base64.b64encode(bytes(before) + key).decode()[-(-before * 8 // 6) :] for before in range(3)]
        whole = [re.escape(text.rstrip("=")[:-1] if text.endswith("=") else text) for text in coded]
        safe = [text.replace(r"\+", "[+-]").replace("/", "[/_]") for text in whole]  # as URLs take it
        return re.compile("|".join([f"(?i:{re.escape(self.secret)}|{key.hex()})", *safe]))


def _visible(text: str, starts: "array[int]", ends: "array[int]") -> tuple[str, "array[int]", "array[int]"]:
    """Without what a key may be split by and still be read: spaces, line ends, invisible characters."""
    seen = [index for index, c in enumerate(text) if c.isprintable() and not c.isspace()]
    return (
        "".join(text[index] for index in seen),
        array("L", (starts[index] for index in seen)),
        array("L", (ends[index] for index in seen)),
    )


def _decoded(text: str, starts: "array[int]", ends: "array[int]") -> tuple[str, "array[int]", "array[int]"]:
    """One level of escapes less; `starts` and `ends` say where each character of `text` stands in the original."""
    parts, firsts, lasts, position = [], array("L"), array("L"), 0
    for match in _ESCAPE.finditer(text):
        character = _character(match)
        if character is None:
            continue
        here = slice(position, match.start())
        parts += [text[here], character]
        firsts += starts[here]
        lasts += ends[here]
        firsts.append(starts[match.start()])
        lasts.append(ends[match.end() - 1])
        position = match.end()
    return "".join([*parts, text[position:]]), firsts + starts[position:], lasts + ends[position:]


def _character(match: re.Match[str]) -> str | None:
    kind, digits = match.lastgroup or "", match[match.lastgroup or 0]
    if kind == "itself":
        return digits
    if kind == "entity":
        named = unescape(f"&{digits}")
        return named if len(named) == 1 else None
    number = int(digits, 8 if kind == "octal" else 16)
    return chr(number) if number < 0x110000 else None


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same places without overlaps, in order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start < joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
