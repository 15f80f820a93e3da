"""The key turns up nowhere, however a server spells it, and nothing that a server says can harm a terminal, a file or a database."""

import base64
import html
import json
import re
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmbo.advisor.client import Limits
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.openai_client import OpenAIClient
from llmbo.advisor.roles import Answer, Exchange, Question
from llmbo.advisor.store import FILE, AdviceStore, Consultation, MemoryNotes
from llmbo.errors import ConfigError

KEY = "sk-Secr3t/with+odd=chars&\"q'uoted-456"
LIMITS = Limits(calls=8, tokens=50_000, seconds=600, cost=None, deadline=2.0, price=None, reply_tokens=700)


def each(pattern: str) -> Callable[[str], str]:
    """Every character in one spelling."""
    return lambda key: "".join(pattern.format(ord(character)) for character in key)


def base64_behind(prefix: bytes) -> Callable[[str], str]:
    return lambda key: base64.b64encode(prefix + key.encode() + b"tail").decode()


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper case": str.upper,
    "repr": repr,
    "repr of bytes": lambda key: repr(f"Bearer {key}\n".encode()),
    "JSON": json.dumps,
    "JSON twice": lambda key: json.dumps(json.dumps(key)),
    "JSON five times": lambda key: json.dumps(json.dumps(json.dumps(json.dumps(json.dumps(key))))),
    "JSON with slashes escaped": lambda key: json.dumps(key).replace("/", "\\/"),
    "JSON escapes": each("\\u{:04x}"),
    "JSON escapes in capitals": each("\\u{:04X}"),
    "escapes of escapes": lambda key: json.dumps(each("\\u{:04x}")(key)),
    "escaped backslashes": each("\\u005cu{:04x}"),
    "half escaped": lambda key: key[:6] + each("\\u{:04x}")(key[6:11]) + key[11:],
    "bytes": each("\\x{:02x}"),
    "octal": each("\\{:03o}"),
    "braces": each("\\u{{{:x}}}"),
    "long escapes": each("\\U{:08x}"),
    "URL": lambda key: urllib.parse.quote(key, safe=""),
    "URL twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "percent": each("%{:02X}"),
    "HTML": html.escape,
    "HTML twice": lambda key: html.escape(html.escape(key)),
    "entities": each("&#{};"),
    "entities in hex": each("&#x{:X};"),
    "URL in JSON": lambda key: json.dumps(each("\\u{:04x}")(urllib.parse.quote(key, safe=""))),
    "hex": lambda key: key.encode().hex(),
    **{f"base64 behind {n}": base64_behind(b"Bearer "[7 - n :]) for n in range(4)},
    "split by a bell": lambda key: f"{key[:7]}\x07{key[7:]}",
    "split by invisible characters": lambda key: f"{key[:7]}\u200b{key[7:9]}\xad{key[9:]}",
    "over several lines": lambda key: f"{key[:7]}\n{key[7:9]}\u2028 {key[9:]}",
    "split by an escaped invisible character": lambda key: f"{key[:7]}\\u200b{key[7:]}",
    "base64 for URLs": lambda key: base64.urlsafe_b64encode(f"{key}>>>???".encode()).decode(),
}


def readings(text: str) -> Iterator[str]:
    """The text with ever more escapes resolved, until there are none."""
    before = None
    while text != before:
        yield text
        before = text
        text = re.sub(r"\\U([0-9a-fA-F]{8})", lambda m: chr(int(m[1], 16) % 0x110000), text)
        text = re.sub(r"\\(?:u|u\{|x)([0-9a-fA-F]{2,4})\}?", lambda m: chr(int(m[1], 16)), text)
        text = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)
        text = html.unescape(urllib.parse.unquote(re.sub(r"\\([^\w\s])", r"\1", text)))


def assert_hidden(text: str, key: str = KEY) -> None:
    cores = [base64.b64encode(bytes(n) + key.encode()).decode()[4:-4] for n in range(3)]
    hidden = [key.lower(), key.encode().hex(), *(core.replace("+", "-").replace("/", "_").lower() for core in cores)]
    for reading in readings(text):
        lowered = "".join(c for c in reading.lower() if c.isprintable() and not c.isspace())
        assert not any(one in lowered or one in lowered.replace("+", "-").replace("/", "_") for one in hidden)


@pytest.fixture
def server(chat_server: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Wants a key with every kind of character that is spelled in more than one way, and which ends with the line."""
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    chat_server.secret = KEY
    return chat_server


def spoken(reply: str, **more: Any) -> str:
    """A reply with text around the JSON, in a reason, in the name of a key, and in what is refused."""
    good = {"base": "threshold:0.6", "edits": [{"layers": [0], "neurons_delta": -1}], "why": reply}
    return f"{reply} {json.dumps({'proposals': [good, {'base': reply}, {reply: 1}]})} {reply}"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_of_the_key_is_kept(
    server: Any, question: Callable[..., Question], tmp_path: Path, spelling: str
) -> None:
    echo = SPELLINGS[spelling](KEY)
    notes = MemoryNotes()
    advice = AdviceStore(notes, tmp_path / FILE)
    client = OpenAIClient.from_environment("m", server.url)
    server.answer = lambda body, handler: spoken(echo)
    consultation = advice.open(0, "propose")
    answer = consultation.close(LLMAdvisor(client, LIMITS, advice).ask(question(), consultation))
    assert answer.candidates and answer.rejections  # the reply was heard all the same
    complaints = iter([f"{'x' * 150} {echo} is wrong", echo, f"{'y' * 270}{echo}"])
    server.answer = lambda body, handler: server.send(
        handler, 401, json.dumps({"error": {"message": next(complaints)}})
    )
    for round in (1, 2, 3):
        failing = advice.open(round, "propose")
        asked = LLMAdvisor(client, LIMITS, AdviceStore(MemoryNotes())).ask(question(), failing)
        assert "HTTP 401" in (failing.close(asked).stopped or "")
        assert_hidden(repr(asked))
    for kept in (repr(answer), json.dumps(notes.values), (tmp_path / FILE).read_text(encoding="utf-8")):
        assert_hidden(kept)


def test_a_run_leaves_no_trace_of_the_key_and_goes_on_whatever_it_was_told(llmbo: Any, server: Any) -> None:
    """Key with a line end, echoes in errors and replies, half of a surrogate pair, terminal escapes, directions overridden."""
    echoes = " ".join(spelling(KEY) for spelling in SPELLINGS.values())
    nasty = "\\ud800 \\u001b[31m \\u202e "

    def answer(body: dict[str, Any], handler: Any) -> None:
        if len(server.requests) == 1:
            return server.send(handler, 429, json.dumps({"error": {"message": echoes}}), Retry_After="0")
        whys = [nasty + SPELLINGS[name](KEY) for name in ("plain", "escapes of escapes", "URL", "escaped backslashes")]
        shares = [
            {
                "base": "threshold:0.6",
                "edits": [{"layers": [0], "neurons_delta": -1}],
                "target_share": 0.5 + n / 10,
                "why": why,
            }
            for n, why in enumerate(whys)
        ]
        reply = json.dumps({"proposals": [*shares[:3], {"base": echoes}]}).replace("\\\\ud800", "\\ud800")
        whole = server.completion(f"\ud800\x1b]0;title\x07\u202e {echoes} {reply}")
        return server.send(handler, 200, whole.encode())

    server.answer = answer
    flags = {"advisor": server.advisor, "advisor_hooks": "warm_start", "advisor_share": 1, "advisor_warm_start": 6}
    for budget in (8, 9):  # what was stored must not keep the run from starting again
        done = llmbo(budget=budget, **flags)
        assert done.exit_code == 0, done.output
        assert_hidden(done.output)
    part = llmbo.report()["advisor"]
    assert part["hooks"]["warm_start"]["outcomes"]["evaluated"] == 3 and part["stopped"] is None
    assert len(server.requests) > 1
    files = llmbo.files()
    assert {"report.html", "report.json", "study.db", "advisor.jsonl"} <= {Path(name).name for name in files}
    for name, content in files.items():
        assert_hidden(content.decode("latin-1"))
        if not name.endswith((".db", ".png", ".safetensors")):
            text = content.decode("utf-8")
            assert "\x1b" not in text and "\u202e" not in text, name


@pytest.mark.parametrize(
    "key",
    ["sk-\u201csecret\u201d", "sk-sec\nret", "sk-sec\rret", "sk-sec\x7fret", "sk-s\xe9cret", "sk-\udc80cret"],
    ids=ascii,
)
def test_a_key_that_no_header_can_carry_is_refused_by_its_name(
    chat_server: Any, question: Callable[..., Question], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    client = OpenAIClient.from_environment("m", chat_server.url)
    advice = AdviceStore(MemoryNotes())
    reason = LLMAdvisor(client, LIMITS, advice).ask(question(), advice.open(0, "propose")).stopped or ""
    assert "OPENAI_API_KEY" in reason and reason.isprintable() and "cret" not in reason and "secret" not in reason
    assert not chat_server.requests and advice.exchanges()[0].attempts == 0


@pytest.mark.parametrize("key", ["sk-1\n", " sk-1 ", "sk-1\r\n", "\tsk-1"], ids=repr)
def test_a_key_loses_the_line_end_of_its_file(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert OpenAIClient.from_environment("m", None).api_key == "sk-1"


def test_a_key_typed_after_advisor_is_refused_unseen(llmbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-typed-in-the-wrong-place")
    for typed in ("openai:sk-typed-in-the-wrong-place", "openai:m@http://h/sk-typed-in-the-wrong-place/v1"):
        result = llmbo(advisor=typed)
        assert result.exit_code == 2 and "OPENAI_API_KEY" in result.output and "typed" not in result.output
    assert llmbo.files() == {}


@pytest.mark.parametrize("url", ["localhost:11434/v1", "ftp://h", "http://u:pw-1@h/v1", "http://h:99999"])
def test_a_server_from_the_environment_is_checked_as_one_that_is_typed(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ConfigError, match="OPENAI_BASE_URL") as caught:
        OpenAIClient.from_environment("m", None)
    assert "pw-1" not in str(caught.value)


NASTY = {
    "half a pair": "\ud800", "colour": "\x1b[31m", "title": "\x1b]0;x\x07", "C1": "\x9b2J", "override": "\u202etxt.exe",
    "isolate": "\u2066", "line separator": "\u2028", "nul": "\x00", "delete": "\x7f", "bell": "\x07", "return": "\rover",
    "private": "\ue000",
}  # fmt: skip


@pytest.mark.parametrize("name", NASTY)
def test_what_a_server_says_is_plain_text_before_it_is_kept(name: str, tmp_path: Path) -> None:
    """In every text of a consultation, from whatever advisor; also in what an older version has stored."""
    nasty = f"a{NASTY[name]}b"
    notes = MemoryNotes()
    advice = AdviceStore(notes, tmp_path / FILE)
    consultation = advice.open(0, "propose")
    exchange = consultation.record(Exchange("s", f"u{nasty}", f"{nasty}\n\t{nasty}", nasty, nasty, nasty))
    answer = consultation.close(Answer(stopped=nasty), note=[nasty, {nasty: nasty}])
    older = MemoryNotes(
        {"00001:propose": Consultation(1, "propose", [Exchange(reply=nasty)], Answer(stopped=nasty)).to_dict()}
    )
    (restored,) = AdviceStore(older, tmp_path / "older.jsonl").all()
    texts = [exchange.user, exchange.error, exchange.model, answer.stopped, restored.exchanges[0].reply]
    assert all(text is not None and text.isprintable() for text in texts)
    assert exchange.reply is not None and all(c.isprintable() or c in "\n\t" for c in exchange.reply)
    for file in (FILE, "older.jsonl"):
        assert len((tmp_path / file).read_text(encoding="utf-8").splitlines()) == 1
    assert AdviceStore(notes).all() == advice.all()


def test_placeholders_for_a_key_are_no_secret(
    chat_server: Any, question: Callable[..., Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("none", "x", "0", "base", "EMPTY"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        chat_server.secret = key
        advice = AdviceStore(MemoryNotes())
        client = OpenAIClient.from_environment("m", chat_server.url)
        answer = LLMAdvisor(client, LIMITS, advice).ask(question(), advice.open(0, "propose"))
        assert answer and "***" not in (advice.exchanges()[0].reply or "")
