"""What real servers send and do, and what becomes of a run whose advisor fails: it is understood, or the run goes on without it."""

import gzip
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmbo.advisor.assemble import AdvisorInputs, Guarded, build_session
from llmbo.advisor.client import ClientError, Limits, Price
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.openai_client import MAX_BYTES, MAX_RETRIES, OpenAIClient
from llmbo.advisor.roles import Answer, Candidate, Decision, Question, Rejection
from llmbo.advisor.store import AdviceStore
from llmbo.config import RunConfig
from llmbo.types import Direction

LIMITS = Limits(calls=8, tokens=60_000, seconds=600, cost=None, deadline=5.0, price=None, reply_tokens=700)
EDITS = [{"layers": [0], "neurons_delta": -1}, {"layers": [5], "neurons_delta": 1}]
FINAL, DRAFT = (
    json.dumps({"proposals": [{"base": f"threshold:{share}", "edits": EDITS, "target_share": share, "why": why}]})
    for share, why in ((0.6, "final"), (0.7, "DRAFT"))
)
Ask = Callable[..., Answer]


@pytest.fixture
def ask(chat_server: Any, question: Callable[..., Question], advice: AdviceStore) -> Ask:
    """Ask the server, in a round of its own each time. No time is lost between attempts."""
    client = OpenAIClient("m", chat_server.url, chat_server.secret, sleep=lambda seconds: None)
    rounds = iter(range(100))

    def go(limits: Limits = LIMITS, hook: str = "propose") -> Answer:
        consultation = advice.open(next(rounds), hook)
        return consultation.close(LLMAdvisor(client, limits, advice).ask(question(hook), consultation))

    return go


def sends(chat: Any, status: int, body: Any) -> Callable[..., None]:
    data = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return lambda request, handler: chat.send(handler, status, data)


# name -> the message in which the advice comes
MESSAGES: dict[str, dict[str, Any]] = {
    "good": {"content": FINAL},
    "reasoning_content": {"content": "", "reasoning_content": FINAL},
    "reasoning beside null": {"content": None, "reasoning": FINAL},
    "reasoning beside blanks": {"content": " \n", "reasoning": f"Hm.\n{FINAL}"},
    "reasoning beside content": {"content": FINAL, "reasoning_content": DRAFT},
    "thoughts": {"content": f"<think>\nMaybe {DRAFT} ? No: early layers are cheaper.\n</think>\n\n{FINAL}"},
    "two thoughts": {"content": f"<think>{DRAFT}</think> {DRAFT} <think>no</think> {FINAL}"},
    "thoughts that the template began": {"content": f"Maybe {DRAFT} ?</think>{FINAL}"},
    "thinking": {"content": f"<Thinking>{DRAFT}</Thinking>\n```json\n{FINAL}\n```"},
    "Magistral": {"content": f"[THINK]{DRAFT}[/THINK]{FINAL}"},
    "long thoughts": {"content": f"<think>{'hm ' * 30_000}</think>{FINAL}"},
    "thoughts in reasoning": {"content": None, "reasoning_content": f"{DRAFT}</think>{FINAL}"},
    "chunks": {
        "content": [
            {"type": "thinking", "thinking": [{"type": "text", "text": DRAFT}]},
            {"type": "text", "text": json.dumps(json.loads(FINAL), indent=1)},
        ]
    },
    "cut into chunks": {"content": [{"type": "text", "text": FINAL[:40]}, {"type": "output_text", "text": FINAL[40:]}]},
    "chunks of text": {"content": [FINAL[:40], FINAL[40:]]},
    "one chunk": {"content": {"type": "text", "text": FINAL}},
    "tool": {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "reply", "arguments": FINAL}}]},
    "tool with an object": {"content": "", "tool_calls": [{"function": {"name": "reply", "arguments": json.loads(FINAL)}}]},
    "function": {"content": None, "function_call": {"name": "reply", "arguments": FINAL}},
    "tools null": {"content": FINAL, "tool_calls": None, "function_call": None, "refusal": None, "reasoning": None},
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_the_advice_is_found_in_the_messages_of_real_servers(ask: Ask, chat_server: Any, name: str) -> None:
    chat_server.answer = lambda body, handler: chat_server.send(
        handler, 200, chat_server.completion("", MESSAGES[name])
    )
    assert [candidate.why for candidate in ask().candidates] == ["final"] and len(chat_server.requests) == 1


# name -> a message that holds no advice, whatever its fields are
EMPTY: dict[str, Any] = {
    "nothing": {"content": None}, "blank": {"content": " \n"}, "number": {"content": 7}, "no chunks": {"content": []},
    "strange chunks": {"content": [None, 7, {"type": "image"}, {"type": "text", "text": None}]}, "no call": {"tool_calls": [None, {}, 3]},
    "strange reasoning": {"content": "", "reasoning": {"a": 1}}, "still thinking": {"content": f"<think>{DRAFT}"},
    "thoughts alone": {"content": f"<think>{DRAFT}</think>"},
}  # fmt: skip


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_reply_gets_a_second_try_with_more_tokens_and_is_named(
    ask: Ask, chat_server: Any, advice: AdviceStore, name: str
) -> None:
    chat_server.answer = lambda body, handler: chat_server.send(handler, 200, chat_server.completion("", EMPTY[name]))
    answer = ask()
    assert not answer and "the reply was empty at 2800 tokens" in answer.rejections[0].reason
    assert "--advisor-reply-tokens" in answer.rejections[0].reason
    assert [request["max_tokens"] for request in chat_server.requests] == [700, 2800] * 3


def thinking(chat: Any, needed: int, content: str | None = FINAL) -> Callable[..., None]:
    """A model whose reasoning, `needed` tokens of it, counts as its reply."""

    def answer(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        spent = min(needed, body["max_tokens"])
        cut = body["max_tokens"] < needed
        message = {"content": "", "reasoning": DRAFT} if cut else {"content": content}
        whole = json.loads(chat.completion("", message, finish_reason="length" if cut else "stop"))
        whole["usage"] = {"prompt_tokens": 1000, "completion_tokens": spent}
        chat.send(handler, 200, json.dumps(whole))

    return answer


def test_a_thinking_model_gets_the_tokens_that_it_takes(ask: Ask, chat_server: Any, advice: AdviceStore) -> None:
    chat_server.answer = thinking(chat_server, 2000)
    assert [candidate.why for candidate in ask().candidates] == ["final"]
    (exchange,) = advice.exchanges()
    assert (exchange.attempts, exchange.prompt_tokens, exchange.completion_tokens) == (
        2,
        2000,
        2700,
    )  # both are paid for
    assert ask(hook="directions").stopped is None
    assert [request["max_tokens"] for request in chat_server.requests[:3]] == [
        700,
        2800,
        5400,
    ]  # and it is not cut again
    chat_server.requests.clear()
    chat_server.answer = thinking(chat_server, 300)
    ask(Limits(**{**vars(LIMITS), "reply_tokens": 9000}))
    assert chat_server.requests[0]["max_tokens"] == 9000


def test_a_second_try_that_fails_leaves_the_first(ask: Ask, chat_server: Any) -> None:
    """A server whose context is small refuses the larger limit; the cut reply is repaired as before."""
    cut = chat_server.completion(FINAL[:-9], finish_reason="length")

    def small(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        if body["max_tokens"] > 1000:
            return chat_server.send(handler, 404, '{"error": {"message": "longer than my context"}}')
        return chat_server.send(handler, 200, cut if len(chat_server.requests) < 3 else chat_server.completion(FINAL))

    chat_server.answer = small
    answer = ask()
    assert answer.candidates and answer.stopped is None
    assert (
        "cut off at 700 tokens" in answer.rejections[0].reason
        and "longer than my context" in answer.rejections[0].reason
    )


@pytest.mark.parametrize(
    "caps", [{"tokens": n} for n in (4_000, 9_000, 12_000, 25_000)] + [{"cost": 0.02}, {"cost": 0.1}], ids=str
)
def test_no_second_try_goes_beyond_the_caps(
    ask: Ask, chat_server: Any, advice: AdviceStore, caps: dict[str, Any]
) -> None:
    limits = Limits(**{**vars(LIMITS), "price": Price(1.0, 10.0), **caps})
    chat_server.answer = thinking(chat_server, 10**6)
    for _ in range(4):
        answer = ask(limits)
    assert "cap of" in (answer.stopped or "") and chat_server.requests
    spent = advice.exchanges()
    assert sum(exchange.prompt_tokens + exchange.completion_tokens for exchange in spent) <= limits.tokens
    assert limits.cost is None or sum(exchange.cost or 0.0 for exchange in spent) <= limits.cost


# name -> (body that comes with status 200, whether it is tried again, what is said)
COMPLAINTS: dict[str, tuple[Any, bool, str]] = {
    "429": ({"error": {"message": "model is overloaded", "code": 429}}, True, "HTTP 429: model is overloaded"),
    "503 as text": ({"error": {"message": "busy", "code": "503"}}, True, "HTTP 503: busy"),
    "status beside it": ({"error": "busy", "status": 502}, True, "HTTP 502: busy"),
    "in the choice": ({"choices": [{"error": {"message": "provider died", "code": 500}, "message": {}}]}, True, "HTTP 500: provider died"),
    "choices null": ({"choices": None, "error": {"message": "slow down", "code": 429}}, True, "HTTP 429: slow down"),
    "404": ({"error": {"message": "no such model", "code": 404}}, False, "HTTP 404: no such model"),
    "401": ({"error": {"message": "no credit", "code": 401}}, False, "HTTP 401: no credit"),
    "text": ({"error": "model 'm' not found"}, False, "model 'm' not found"),
    "a word for a code": ({"error": {"message": "no quota left", "code": "insufficient_quota"}}, False, "no quota left"),
    "list": ([{"error": {"message": "key expired", "code": 403}}], False, "HTTP 403: key expired"),
    "object": ({"object": "error", "message": "too long", "code": 404}, False, "HTTP 404: too long"),
    "detail": ({"detail": "Not Found"}, False, "Not Found"),
    "details": ({"detail": [{"loc": ["body"], "msg": "missing"}]}, False, "missing"),
    "nothing said": ({"error": {"message": "", "code": 404}}, False, "HTTP 404"),
    "truth": ({"error": True}, False, "the server's answer is an error"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPLAINTS)
def test_an_error_with_status_200_is_told_and_treated_like_the_status_it_names(
    ask: Ask, chat_server: Any, name: str
) -> None:
    body, again, reason = COMPLAINTS[name]
    chat_server.answer = sends(chat_server, 200, body)
    answer = ask()
    assert not answer and reason in (answer.stopped or "")
    assert len(chat_server.requests) == (1 + MAX_RETRIES if again else 1)


def test_a_gateway_that_recovers_is_heard(ask: Ask, chat_server: Any) -> None:
    busy = sends(chat_server, 200, {"error": {"message": "busy", "code": 429}})
    chat_server.answer = lambda b, h: busy(b, h) if len(chat_server.requests) < 3 else FINAL
    assert ask() and len(chat_server.requests) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{}",
        b'{"choices": []}',
        b'{"choices": [7]}',
        b'{"choices": {}}',
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("status", [200, 401])
def test_nonsense_is_a_reason_too(ask: Ask, chat_server: Any, body: bytes, status: int) -> None:
    chat_server.answer = sends(chat_server, status, body)
    assert ("no chat completion" if status == 200 else "HTTP 401") in (ask().stopped or "")


BOMB = gzip.compress(bytes(100_000_000))


@pytest.mark.parametrize("status", [200, 401, 500])
@pytest.mark.parametrize("kind", ["bomb", "endless", "dripping", "packed in brotli"])
def test_no_body_takes_more_than_its_share_of_memory_and_time(
    ask: Ask, chat_server: Any, kind: str, status: int
) -> None:
    gone = threading.Event()

    def answer(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        if kind == "bomb":
            return chat_server.send(handler, status, BOMB, Content_Encoding="gzip")
        if kind == "packed in brotli":
            return chat_server.send(handler, status, b"x", Content_Encoding="br")
        handler.send_response(status)
        handler.end_headers()
        try:
            while not gone.is_set():
                handler.wfile.write(b" " * (65536 if kind == "endless" else 1))
                gone.wait(0 if kind == "endless" else 0.05)
        except OSError:
            gone.set()

    chat_server.answer = answer
    tracemalloc.start()
    try:
        answer_ = ask(Limits(**{**vars(LIMITS), "deadline": 1.0}))
        assert tracemalloc.get_traced_memory()[1] < 20 * MAX_BYTES
    finally:
        tracemalloc.stop()
    reasons = {"dripping": "did not answer in time", "packed in brotli": "packed its answer as 'br'"}
    assert (
        reasons.get(kind, f"more than {MAX_BYTES} bytes") in (answer_.stopped or "") and len(chat_server.requests) == 1
    )
    assert kind not in ("endless", "dripping") or gone.wait(2)  # the connection is closed, not left to itself
    gone.set()


def test_a_reply_that_is_packed_unasked_is_unpacked(ask: Ask, chat_server: Any) -> None:
    packed = gzip.compress(chat_server.completion(FINAL).encode())
    chat_server.answer = lambda body, handler: chat_server.send(handler, 200, packed, Content_Encoding="gzip")
    assert ask()


@pytest.fixture
def elsewhere() -> Iterator[tuple[str, list[str]]]:
    """Another host's URL, and the requests that reach it."""
    reached: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reached.append(f"{self.headers} {self.rfile.read(int(self.headers.get('Content-Length', 0)))!r}")
            self.send_response(200)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"localhost:{server.server_port}", reached
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_follows_a_redirect(
    ask: Ask, chat_server: Any, elsewhere: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    place, reached = elsewhere
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    location = f"http://user:pw-1@{place}/v1/chat/completions?token=pw-1"
    chat_server.answer = lambda body, handler: chat_server.send(handler, status, "", Location=location)
    reason = ask().stopped or ""
    assert f"http://{place}/v1/chat/completions" in reason and "pw-1" not in reason
    assert reached == [] and len(chat_server.requests) == 1


PROXIES = {
    "ALL_PROXY": "socks5://127.0.0.1:1080", "all_proxy": "socks://127.0.0.1:1080", "HTTP_PROXY": "http://[::1", "http_proxy": "nonsense:x",
    "HTTPS_PROXY": "ftp://h", "OPENAI_ORG_ID": "org\n1", "OPENAI_PROJECT_ID": "pro\u201cject", "SSL_CERT_FILE": "/nowhere.pem",
}  # fmt: skip


@pytest.mark.parametrize("name", PROXIES)
def test_no_surroundings_end_a_run(ask: Ask, advice: AdviceStore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whether they break the client or not, there is an answer or a reason."""
    monkeypatch.setenv(name, PROXIES[name])
    monkeypatch.setenv("NO_PROXY", "")
    answer = ask()
    assert bool(answer) != bool(answer.stopped)
    assert ask().stopped == answer.stopped and all(
        exchange.error is None or exchange.error.isprintable() for exchange in advice.exchanges()
    )


def test_a_run_in_a_socks_environment_goes_on_and_says_why(
    llmbo: Any, chat_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("all_proxy", "socks://127.0.0.1:1080")
    done = llmbo(
        budget=8, advisor=chat_server.advisor, advisor_hooks="warm_start", advisor_share=1, advisor_warm_start=6
    )
    assert done.exit_code == 0, done.output
    assert "socks://127.0.0.1:1080" in llmbo.report()["advisor"]["stopped"] and not chat_server.requests
    assert "socks://127.0.0.1:1080" in done.output


FAULTS = [
    ImportError("no socksio"), ValueError("bad\nproxy"), UnicodeEncodeError("ascii", "\ud800", 0, 1, "no"), MemoryError(),
    RecursionError("deep"), AttributeError("x"), OSError(28, "No space left"), KeyError("choices"), ClientError("said \ud800", 3),
    ExceptionGroup("several", [ValueError("one")]), AssertionError(),
]  # fmt: skip


class Failing:
    """A client that raises."""

    model = "failing"

    def __init__(self, fault: Exception) -> None:
        self.fault = fault
        self.asked = 0

    def complete(self, prompt: Any, deadline: float) -> Any:
        self.asked += 1
        raise self.fault


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_whatever_a_client_raises_is_a_reason(
    question: Callable[..., Question], advice: AdviceStore, fault: Exception
) -> None:
    client = Failing(fault)
    for round in range(2):  # and it is not asked again
        consultation = advice.open(round, "propose")
        answer = consultation.close(LLMAdvisor(client, LIMITS, advice).ask(question(), consultation))
        assert not answer and answer.stopped and answer.stopped.isprintable()
    assert client.asked == 1
    assert json.dumps([one.to_dict() for one in advice.all()]).encode()


@pytest.mark.parametrize("level", [1, 2])
def test_half_a_surrogate_pair_does_no_harm(ask: Ask, chat_server: Any, advice: AdviceStore, level: int) -> None:
    """In the reply's text, and behind the escapes of its JSON: in a reason, a key, a refused value; and in an error."""
    half = "\ud800" if level == 1 else "\\ud800"
    item = json.loads(FINAL)["proposals"][0] | {"why": "HALF"}
    reply = json.dumps({"proposals": [item, {"HALF": "HALF"}, {"base": "HALF"}]}).replace("HALF", f"x{half}")
    chat_server.answer = lambda body, handler: reply
    assert ask().candidates
    chat_server.answer = sends(chat_server, 404, {"error": {"message": f"x{half}"}})
    assert ask().stopped
    assert json.dumps([one.to_dict() for one in advice.all()], ensure_ascii=False).encode()


class Plugged:
    """Somebody else's advisor."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def ask(self, question: Question, transcript: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        None, {}, "advice", Answer(candidates=(Candidate((1, 2)),)), Answer(candidates=(Candidate((999,) * 12),)),
        Answer(candidates=(Candidate((0,) * 12),)), Answer(candidates=(Candidate((1.5,) * 12),)),  # type: ignore[arg-type]
        Answer(directions=(Direction("d", (1.0,)),)), Answer(directions=(Direction("d", (0.0,) * 12),)),
        Answer(directions=(Direction("d", (float("nan"),) * 12),)), Answer(decisions=(Decision(7, False, 1.0),)),
        Answer(directions=(Direction("d", (1.0,) * 12, 5),)), Answer(directions=(Direction(None, (1.0,) * 12),)),  # type: ignore[arg-type]
        Answer(rejections=(Rejection("x", "y", "rude"),)), Answer(rejections=(Rejection("x", object(), "illegal"),)),  # type: ignore[arg-type]
    ],
    ids=lambda answer: str(answer)[:60],
)  # fmt: skip
def test_what_somebody_elses_advisor_says_is_checked(
    question: Callable[..., Question], advice: AdviceStore, answer: Any
) -> None:
    checked = Guarded(Plugged(answer)).ask(question(), advice.open(0, "propose"))
    assert not checked and "the advisor failed" in (checked.stopped or "")
    good = Answer(directions=(Direction("d", (1.0,) * 12, "why"),), rejections=(Rejection("x", "y", "illegal"),))
    assert Guarded(Plugged(good)).ask(question(), advice.open(0, "propose")) == good


def test_an_advisor_that_cannot_be_made_ends_no_run(
    question: Callable[..., Question], tmp_path: Path, advice: AdviceStore
) -> None:
    """The recording was there when the settings were checked."""
    config = RunConfig(model="m", advisor=f"replay:{tmp_path / 'gone.jsonl'}")
    session = build_session(config, AdvisorInputs(question().context.setting, None, None), advice)
    answer = session.advisor.ask(question(), advice.open(0, "propose"))
    assert not answer and "gone.jsonl" in (answer.stopped or "")
