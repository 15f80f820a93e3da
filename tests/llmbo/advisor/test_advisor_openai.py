"""Every way a server can fail, through the real `openai` client: bounded in time and calls, and never an exception."""

import json
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from llmbo.advisor.client import Limits, Price
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.openai_client import MAX_RETRIES, OpenAIClient
from llmbo.advisor.roles import Answer, Question
from llmbo.advisor.store import AdviceStore
from llmbo.errors import ConfigError

DEADLINE = 1.5
LIMITS = Limits(
    calls=8, tokens=50_000, seconds=600, cost=None, deadline=DEADLINE, price=Price(1.0, 10.0), reply_tokens=700
)
Ask = Callable[..., Answer]


@pytest.fixture
def ask(chat_server: Any, question: Callable[..., Question], advice: AdviceStore) -> Ask:
    """Ask a question of the server as it is now; each call is a round of its own."""
    client = OpenAIClient("test-model", chat_server.url, chat_server.secret)
    rounds = iter(range(100))

    def go(hook: str = "propose", limits: Limits = LIMITS, **options: Any) -> Answer:
        advisor = LLMAdvisor(client, limits, advice)
        consultation = advice.open(next(rounds), hook)
        answer = advisor.ask(question(hook, **options), consultation)
        consultation.close(answer)
        assert chat_server.secret not in json.dumps([c.to_dict() for c in advice.all()])
        return answer

    return go


@pytest.mark.parametrize("hook", ["warm_start", "propose", "directions", "filter"])
def test_a_good_reply_takes_one_request(ask: Ask, chat_server: Any, advice: AdviceStore, hook: str) -> None:
    answer = ask(hook)
    assert answer and answer.stopped is None
    (request,) = chat_server.requests
    assert request["response_format"]["type"] == "json_schema" and request["model"] == "test-model"
    (exchange,) = advice.exchanges()
    assert (exchange.prompt_tokens, exchange.completion_tokens, exchange.attempts) == (1000, 100, 1)
    assert exchange.cost == pytest.approx((1000 * 1.0 + 100 * 10.0) / 1e6)


# name -> text of every reply, and why nothing comes of it
BAD_TEXT = {
    "wrong json": ('{"candidates": []}', "no JSON object with the key 'proposals'"),
    "prose": ("I would rather thin the middle layers.", "no JSON object"),
    "truncated": ('{"proposals":[{"base":"dense","edits":[{"la', "ends before its JSON object does"),
    "wrong ids": ('{"proposals":[{"base":77}]}', "trial 77 does not exist"),
    "illegal layers": ('{"proposals":[{"base":"dense","edits":[{"layers":[99],"kv_delta":-1}]}]}', "layer 99"),
    "duplicates": ('{"proposals":[{"base":0},{"base":1}]}', "the same as trial"),
    "html": ("<html><body>It works!</body></html>", "no JSON object"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_a_useless_reply_is_repaired_at_most_twice_with_its_reason(
    ask: Ask, chat_server: Any, advice: AdviceStore, name: str
) -> None:
    text, reason = BAD_TEXT[name]
    chat_server.answer = lambda body, handler: text
    answer = ask()
    assert not answer and len(chat_server.requests) == 3 == len(advice.exchanges())
    assert all(reason in rejection.reason for rejection in answer.rejections)
    assert reason in chat_server.requests[1]["messages"][-1]["content"]
    chat_server.answer = lambda body, handler: text if len(chat_server.requests) == 4 else chat_server.good(body)
    assert ask()  # the repair is heard


def test_prose_around_json_needs_no_repair(ask: Ask, chat_server: Any) -> None:
    chat_server.answer = lambda body, handler: f"Of course!\n```json\n{chat_server.good(body)}\n```\nGood luck."
    assert ask() and len(chat_server.requests) == 1


def test_a_key_that_is_sent_back_is_blotted_out(ask: Ask, chat_server: Any, advice: AdviceStore) -> None:
    chat_server.answer = lambda body, handler: chat_server.good(body).replace('"?"', f'"{chat_server.secret}"')
    assert ask()  # which looks for the key in all that is kept
    assert "***" in (advice.exchanges()[0].reply or "")


def test_a_half_good_reply_is_enough(ask: Ask, chat_server: Any) -> None:
    def half(body: dict[str, Any], handler: object) -> str:
        reply = json.loads(chat_server.good(body))
        return json.dumps({"proposals": [{"base": 77}, *reply["proposals"]]})

    chat_server.answer = half
    answer = ask()
    assert answer.candidates and answer.rejections and len(chat_server.requests) == 1


@pytest.mark.parametrize(
    ("message", "choice", "reason"),
    [
        ({"refusal": "I cannot help with pruning."}, {}, "refused: I cannot help"),
        ({}, {"finish_reason": "length"}, "cut off"),
    ],
)
def test_refusals_and_cut_replies_are_named(
    ask: Ask, chat_server: Any, message: dict[str, Any], choice: dict[str, Any], reason: str
) -> None:
    chat_server.answer = lambda body, handler: chat_server.send(
        handler, 200, chat_server.completion("{", message, **choice)
    )
    answer = ask()
    assert not answer and any(reason in rejection.reason for rejection in answer.rejections)


def failing(status: int, body: str = '{"error": {"message": "no"}}', **headers: str) -> Callable[[Any], Any]:
    return lambda chat: lambda request, handler: chat.send(handler, status, body, **headers)


def hanging(chat: Any) -> Any:
    return lambda request, handler: time.sleep(2 * DEADLINE)


def dripping(chat: Any) -> Any:
    def drip(request: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(int(20 * DEADLINE)):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)

    return drip


def closing(chat: Any) -> Any:
    def close(request: dict[str, Any], handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        handler.wfile.write(b'{"choices": [{"mess')

    return close


def huge(chat: Any) -> Any:
    return lambda request, handler: chat.send(handler, 200, chat.completion("x" * 50_000_000))


# name -> (what the server does, requests it may get, what the run's report says)
def then_hanging(server: Any) -> Any:
    busy, silent = failing(429)(server), hanging(server)
    return lambda body, handler: (busy if len(server.requests) == 1 else silent)(body, handler)


DEAD = {
    "401": (
        failing(401, '{"error": {"message": "Incorrect API key: sk-secret-that-must-turn-up-nowhere"}}'),
        1,
        "HTTP 401",
    ),
    "404": (failing(404, '{"error": {"message": "no such model"}}'), 1, "no such model"),
    "429": (failing(429), 1 + MAX_RETRIES, "HTTP 429"),
    "429, come back tomorrow": (failing(429, Retry_After="86400"), 1, "HTTP 429"),
    "500": (failing(500), 1 + MAX_RETRIES, "HTTP 500"),
    "429, then hanging": (then_hanging, 2, "; then the server did not answer in time"),
    "hanging": (hanging, 1, "did not answer in time"),
    "dripping": (dripping, 1, "did not answer in time"),
    "closing mid-reply": (closing, 1 + MAX_RETRIES, "connection failed"),
    "50 MB": (huge, 1, "more than 1000000 bytes"),
    "no completion": (failing(200, '{"hello": "world"}'), 1, "no chat completion"),
    "html page": (failing(200, "<html>proxy login</html>", Content_Type="text/html"), 1, "no chat completion"),
}


@pytest.mark.parametrize("name", DEAD)
def test_a_dead_server_costs_at_most_one_deadline_and_is_never_asked_again(
    ask: Ask, chat_server: Any, name: str
) -> None:
    make, most, reason = DEAD[name]
    chat_server.answer = make(chat_server)
    start = time.monotonic()
    answer = ask()
    assert time.monotonic() - start < DEADLINE + 1.0
    assert not answer and reason in (answer.stopped or "")
    assert len(chat_server.requests) <= most
    asked = len(chat_server.requests)
    assert ask("directions").stopped == answer.stopped and len(chat_server.requests) == asked


def test_no_server_at_all(question: Callable[..., Question], advice: AdviceStore) -> None:
    client = OpenAIClient("m", "http://127.0.0.1:9/v1", "k")
    answer = LLMAdvisor(client, LIMITS, advice).ask(question(), advice.open(0, "propose"))
    assert not answer and "connection failed" in (answer.stopped or "")


def test_retry_after_is_obeyed(ask: Ask, chat_server: Any) -> None:
    times: list[float] = []

    def busy(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> str | None:
        times.append(time.monotonic())
        if len(times) > 1:
            return chat_server.good(body)
        return chat_server.send(handler, 429, "{}", Retry_After="0.7")

    chat_server.answer = busy
    assert ask() and 0.7 <= times[1] - times[0] < 1.4


@pytest.mark.parametrize("supported", ["json_object", None])
def test_what_a_server_can_do_is_found_out_once(
    ask: Ask, chat_server: Any, advice: AdviceStore, supported: str | None
) -> None:
    def modest(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> str | None:
        asked = body.get("response_format", {})
        if asked.get("type") != supported or "schema" in asked:
            return chat_server.send(handler, 400, '{"error": {"message": "response_format is not supported"}}')
        return chat_server.good(body)

    chat_server.answer = modest
    assert ask() and ask("directions")
    first, second = advice.exchanges()
    assert first.attempts == (3 if supported else 4) and second.attempts == 1
    assert first.mode == (supported or "text")


def test_a_reasoning_models_name_for_the_token_limit_is_found(ask: Ask, chat_server: Any) -> None:
    def modern(body: dict[str, Any], handler: BaseHTTPRequestHandler) -> str | None:
        if "max_tokens" in body:
            return chat_server.send(handler, 400, '{"error": {"message": "Unsupported parameter: max_tokens"}}')
        return chat_server.good(body)

    chat_server.answer = modern
    assert ask() and len(chat_server.requests) == 2


@pytest.mark.parametrize(
    ("cap", "reason"),
    [({"calls": 2}, "2 calls"), ({"tokens": 4_500}, "4500 tokens"), ({"cost": 0.011}, r"\$0.011"), ({"seconds": 0.0}, "0 seconds")],
    ids=str,
)  # fmt: skip
def test_caps_are_checked_before_each_call(
    ask: Ask, chat_server: Any, advice: AdviceStore, cap: dict[str, Any], reason: str
) -> None:
    limits = Limits(**{**vars(LIMITS), **cap})
    answers = [ask("propose", limits) for _ in range(6)]
    assert answers[-1].stopped is not None and reason.replace("\\", "") in answers[-1].stopped
    spent = advice.exchanges()
    assert len(spent) == len(chat_server.requests) <= limits.calls
    assert sum(exchange.prompt_tokens + exchange.completion_tokens for exchange in spent) <= limits.tokens
    assert limits.cost is None or sum(exchange.cost or 0 for exchange in spent) <= limits.cost


def test_an_unknown_price_is_unknown_not_zero(ask: Ask, advice: AdviceStore) -> None:
    ask(limits=Limits(**{**vars(LIMITS), "price": None}))
    assert advice.exchanges()[0].cost is None


def test_openai_itself_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        OpenAIClient.from_environment("gpt", None)
    assert OpenAIClient.from_environment("gpt", "http://localhost:1/v1").base_url == "http://localhost:1/v1"
    assert "secret" not in repr(OpenAIClient("m", None, "a secret"))
