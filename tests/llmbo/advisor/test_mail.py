"""Advice by mail: which letter comes next, and what is said of replies that cannot be read. The whole run is in test_advisor_cli.py."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import llmbo
from llmbo.advisor.client import Limits
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.mail import MAX_BYTES, MailClient, check_mail
from llmbo.advisor.roles import Answer, Question
from llmbo.advisor.store import AdviceStore
from llmbo.errors import ConfigError

LIMITS = Limits(calls=50, tokens=10**6, seconds=600, cost=None, deadline=2.0, price=None)
GOOD = {"proposals": [{"base": f"threshold:0.{5 + n}", "edits": [{"layers": [n], "kv_delta": -1}]} for n in range(3)]}
Ask = Callable[[], Answer]


@pytest.fixture
def ask(question: Callable[..., Question], advice: AdviceStore, tmp_path: Path) -> Ask:
    """Asks the same thing again, as a run does that is started again."""
    advisor = LLMAdvisor(MailClient(tmp_path / "letters", advice), LIMITS, advice)
    return lambda: advisor.ask(question(), advice.open(3, "propose"))


def awaited(ask: Ask) -> Path:
    """Where the reply goes that the run ends for."""
    with pytest.raises(llmbo.ReplyAwaited) as caught:
        ask()
    assert caught.value.letter.is_file() and caught.value.letter.name in str(caught.value)
    return caught.value.reply


def test_a_bad_reply_leads_to_the_next_letter(ask: Ask, advice: AdviceStore) -> None:
    """And waiting for one changes nothing."""
    first = awaited(ask)
    files = {path: path.read_bytes() for path in first.parent.iterdir()}
    assert first.name == "001-propose.reply.md" and awaited(ask) == first and not advice.exchanges()
    assert files == {path: path.read_bytes() for path in first.parent.iterdir()}
    first.write_text('{"proposals": [{"base": 99}]}')
    second = awaited(ask)
    assert second.name == "002-propose.reply.md" and awaited(ask) == second and len(advice.exchanges()) == 1
    letter = (second.parent / "002-propose.prompt.md").read_text()
    assert "YOUR REPLY WAS" in letter and "trial 99 does not exist" in letter
    second.with_suffix(".json").write_text(f"<think>{{</think>\n{json.dumps(GOOD)}", encoding="utf-8-sig")
    answer = ask()
    assert len(answer.candidates) == 3 and [r.reason for r in answer.rejections] == [
        "trial 99 does not exist (there are 8)"
    ]
    sent = [json.loads((first.parent / f"00{n}-propose.prompt.json").read_text())["digest"] for n in (1, 2)]
    assert [exchange.digest for exchange in advice.exchanges()] == sent


def directory(reply: Path) -> None:
    reply.mkdir()


def other_letter(reply: Path) -> None:
    reply.with_name("001-propose.prompt.json").write_text('{"digest": "other"}')


def no_letter(reply: Path) -> None:
    reply.with_name("001-propose.prompt.json").write_text("[]")


def lost_letter(reply: Path) -> None:
    reply.write_text(json.dumps(GOOD))
    reply.with_name("001-propose.prompt.json").unlink()


def two(reply: Path) -> None:
    reply.write_text(json.dumps(GOOD))
    reply.with_suffix(".json").write_text(json.dumps(GOOD))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda reply: reply.write_text(" \n"), "is empty"),
        (lambda reply: reply.write_text("<think>hm"), "is empty"),
        (lambda reply: reply.write_text(json.dumps(GOOD)[:-9]), "ends before its JSON object does"),
        (lambda reply: reply.write_bytes(b'{"proposals": ["\xff"]}'), r"no UTF-8 text \(byte 16\)"),
        (lambda reply: reply.write_text("x" * (MAX_BYTES + 1)), "more than 1000000 bytes"),
        (directory, "cannot be read .*directory"),
        (other_letter, "asks something else .*digest other, now "),
        (no_letter, "is no letter"),
        (lost_letter, "never written"),
        (two, "reply.json' lie there: leave one"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line_and_costs_nothing(
    ask: Ask, advice: AdviceStore, spoil: Callable[[Path], object], message: str
) -> None:
    reply = awaited(ask)
    spoil(reply)
    before = {path: path.read_bytes() for path in reply.parent.iterdir() if path.is_file()}
    for _ in range(2):
        with pytest.raises(ConfigError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value) and str(reply.parent) in str(caught.value)
    assert not advice.exchanges() and before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize("where", ["file", "file/below", "x" * 300])
def test_a_place_that_is_no_folder_is_refused_before_any_work(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="needs a folder"):
        check_mail(tmp_path / where)
    check_mail(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="not to be written"):
        check_mail(tmp_path / "letters")


def test_a_folder_that_is_gone_by_then_is_one_line(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "letters").touch()
    with pytest.raises(ConfigError, match="no letter can be written"):
        ask()
