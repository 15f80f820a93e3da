"""Any server that speaks OpenAI's chat protocol, through the `openai` client: OpenAI, vLLM, Ollama, llama.cpp, LM Studio."""

import functools
import json
import random
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai

from llmbo.advisor.censor import KEY_VARIABLE, URL_VARIABLE, environment_key, environment_url
from llmbo.advisor.client import ClientError, Completion
from llmbo.advisor.render import Prompt, estimated_tokens
from llmbo.advisor.shapes import complaint, reply_text
from llmbo.config.advisor import checked_url
from llmbo.errors import ConfigError, first_line

MAX_BYTES = 1_000_000  # of a response; more is no reply
BACKOFF = 0.5  # seconds before the first retry, doubled each time
MAX_RETRIES = 4
MODES = ("json_schema", "json_object with schema", "json_object", "text")
_UNSUPPORTED = (400, 415, 422, 501)  # what servers say to a response_format they do not know; some say 500 and name it
_HOPELESS = (401, 403, 404, 405, 410)


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Whom to trust, read once: 20 ms of each request otherwise, also of one that is not encrypted."""
    return httpx.create_ssl_context()


class _Retry(Exception):
    """This attempt failed, another may not; `after` seconds if the server said so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _OtherMode(Exception):
    """The server does not take this way of asking for JSON."""


class _Hopeless(Exception):
    """No attempt can succeed."""


class _Refused(Exception):
    """The server answered with another status than success."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.headers, self.body = status, headers, body


@dataclass
class OpenAIClient:
    """Chat completions with bounded retries. Remembers which way of asking for JSON worked.

    Args:
        base_url: The server, None for OpenAI's own.
        api_key: Never shown or stored.
    """

    model: str
    base_url: str | None
    api_key: str = field(repr=False)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _mode: int = 0
    _tokens_key: str = ""

    def __post_init__(self) -> None:
        self._tokens_key = "max_completion_tokens" if self.base_url is None else "max_tokens"

    @classmethod
    def from_environment(cls, model: str, base_url: str | None) -> "OpenAIClient":
        """With the key from `OPENAI_API_KEY`; a server of one's own may need none.

        Raises:
            ConfigError: OpenAI's own server without a key, or `OPENAI_BASE_URL` names no server.
        """
        key, given = environment_key(), environment_url()
        base_url = base_url or (checked_url(given, f"{URL_VARIABLE} must hold") if given else None)
        if not key and base_url is None:
            raise ConfigError(
                f"--advisor openai:{model} needs a key: set {KEY_VARIABLE}, or name a server as openai:{model}@http://HOST:PORT/v1."
            )
        return cls(model, base_url, key or "none")

    def complete(self, prompt: Prompt, deadline: float) -> Completion:
        if not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ClientError(
                f"the key in {KEY_VARIABLE} holds characters that HTTP cannot send: copy it anew, as plain letters", 0
            )
        end = self.clock() + deadline
        reply = self._tried(prompt, prompt.max_tokens, end)
        if not reply.short or prompt.second_try <= prompt.max_tokens:
            return reply
        try:
            again = self._tried(prompt, prompt.second_try, end)
        except ClientError as error:
            problem = f"{reply.problem}; with {prompt.second_try} tokens: {error}"
            return replace(reply, problem=problem, attempts=reply.attempts + error.attempts)
        return replace(
            again,
            prompt_tokens=reply.prompt_tokens + again.prompt_tokens,
            completion_tokens=reply.completion_tokens + again.completion_tokens,
            attempts=reply.attempts + again.attempts,
        )

    # Not the SDK's own retries (openai 3.54, measured): they sit out `Retry-After` up to two minutes each and ask again whatever
    # is left of the deadline (16 s and five requests where 1.5 s were given), repeat the 501 by which a server refuses a response
    # format (five requests, 7 s), and do not repeat a reply that breaks off while it is streamed, as `MAX_BYTES` needs it to be.
    def _tried(self, prompt: Prompt, tokens: int, end: float) -> Completion:
        """A reply of at most `tokens`, after as many attempts as it takes until the clock shows `end`."""
        attempts, delay = 0, BACKOFF
        retries, complained = 0, ""
        while True:
            attempts += 1
            try:
                return self._completion(self._within(end, prompt, tokens), attempts, tokens)
            except _OtherMode as error:
                if self._mode + 1 == len(MODES):
                    raise ClientError(str(error), attempts) from None
                self._mode += 1
            except _Hopeless as error:  # what it said before tells more than that it says nothing now
                raise ClientError(f"{complained}{error}", attempts) from None
            except _Retry as error:
                complained = f"{error}; then "
                wait = delay * random.uniform(0.75, 1.0) if error.after is None else error.after
                delay *= 2
                retries += 1
                if retries > MAX_RETRIES or self.clock() + wait >= end:
                    raise ClientError(str(error), attempts) from None
                self.sleep(wait)

    def _within(self, end: float, prompt: Prompt, tokens: int) -> bytes:
        """The response body, or an exception when `end` comes first, whatever the server does meanwhile.

        In a thread, since no timeout of an HTTP library bounds a server that sends a byte now and then.
        """
        result: list[bytes | BaseException] = []

        def work() -> None:
            try:
                result.append(self._request(prompt, tokens, end))
            except BaseException as error:
                result.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(max(0.1, end - self.clock()))
        if not result:
            raise _Hopeless("the server did not answer in time")
        if isinstance(result[0], BaseException):
            raise self._judged(result[0]) from None
        return result[0]

    def _request(self, prompt: Prompt, tokens: int, end: float) -> bytes:
        def check(response: Any) -> None:
            """Before the SDK reads: it would take in the body of an error whatever its size, and follow a server elsewhere."""
            if response.is_redirect:
                place = _place(response.headers.get("location", "nowhere"))
                raise _Hopeless(
                    f"the server sends requests on to {place}, which gets none: name it yourself if you trust it"
                )
            if not response.is_success:
                raise _Refused(response.status_code, response.headers, self._body(response, end))

        transport = openai.DefaultHttpxClient(
            follow_redirects=False, event_hooks={"response": [check]}, verify=_certificates()
        )
        with openai.OpenAI(
            api_key=self.api_key, base_url=self.base_url, timeout=max(0.1, end - self.clock()), max_retries=0,
            default_headers={"Accept-Encoding": "identity"}, http_client=transport,
        ) as client:  # fmt: skip
            create = client.chat.completions.with_streaming_response.create
            with create(**self._arguments(prompt, tokens)) as response:
                return self._body(response.http_response, end)

    def _body(self, response: Any, end: float) -> bytes:
        """At most `MAX_BYTES`, before and after unpacking what some servers pack unasked."""
        body = bytearray()
        for chunk in response.iter_raw():
            body += chunk
            if len(body) > MAX_BYTES:
                raise _Hopeless(f"the server sent more than {MAX_BYTES} bytes")
            if self.clock() > end:
                raise _Hopeless("the server did not answer in time")
        packed = response.headers.get("content-encoding", "identity").strip().lower()
        if packed == "identity" or not body:
            return bytes(body)
        if packed not in ("gzip", "deflate"):
            raise _Hopeless(f"the server packed its answer as '{packed}', which it was not asked to")
        whole = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(body, MAX_BYTES + 1)
        if len(whole) > MAX_BYTES:
            raise _Hopeless(f"the server sent more than {MAX_BYTES} bytes")
        return whole

    def _arguments(self, prompt: Prompt, tokens: int) -> dict[str, Any]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        formats: tuple[dict[str, Any], ...] = (
            {"type": "json_schema", "json_schema": {"name": prompt.name, "schema": prompt.schema}},
            {"type": "json_object", "schema": prompt.schema},  # llama.cpp and its relatives
            {"type": "json_object"},
            {},
        )
        arguments: dict[str, Any] = {"model": self.model, "messages": messages, self._tokens_key: tokens}
        asked = formats[self._mode]
        return arguments | ({"response_format": asked} if asked else {})

    def _judged(self, error: BaseException) -> BaseException:
        """What a failed request means for the next one."""
        if isinstance(error, openai.APITimeoutError):
            return _Hopeless("the server did not answer in time")
        if isinstance(error, openai.APIConnectionError):
            error = error.__cause__ or error
        if isinstance(error, _Refused):
            whole = error.body.decode(errors="replace")
            said = complaint(_parsed(error.body)) or (whole, None)
            return self._status(error.status, said[0], whole, error.headers)
        if isinstance(error, (openai.APIConnectionError, OSError)) or type(error).__module__.startswith("httpx"):
            return _Retry(f"connection failed ({first_line(error)})")
        return error

    def _status(self, status: int, text: str, whole: str, headers: Mapping[str, str]) -> Exception:
        reason = f"HTTP {status}: {_line(text)}"
        if status == 400 and "max_tokens" in whole and self._tokens_key == "max_tokens":
            self._tokens_key = "max_completion_tokens"  # reasoning models
            return _Retry(reason, after=0.0)
        if self._mode + 1 < len(MODES) and (status in _UNSUPPORTED or "response_format" in whole):
            return _OtherMode(reason)
        if status in (408, 409, 429) or status >= 500:
            return _Retry(reason, _retry_after(headers))
        return _Hopeless(reason if status in _HOPELESS else f"the request was refused, {reason}")

    def _completion(self, body: bytes, attempts: int, tokens: int) -> Completion:
        data = _parsed(body)
        said = complaint(data)
        if said is not None:  # with status 200, as gateways pass on the error of a provider
            text, status = said
            if status is None:
                raise _Hopeless(f"the server's answer is an error: {_line(text)}")
            raise self._status(status, text, body.decode(errors="replace"), {})
        try:
            choice = data["choices"][0]
            message, cut = choice["message"], choice.get("finish_reason") in ("length", "max_tokens")
            text, refusal = reply_text(message, cut), message.get("refusal")
        except (LookupError, TypeError, AttributeError):
            raise _Hopeless("the server's answer is no chat completion") from None
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        problem = None
        if refusal:
            problem = f"the model refused: {_line(str(refusal))}"
        elif cut or not text:
            what = "cut off" if text else "empty"
            problem = f"the reply was {what} at {tokens} tokens, thinking included (--advisor-reply-tokens): be shorter"
        return Completion(
            text=text,
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")) or estimated_tokens(text),
            mode=MODES[self._mode],
            problem=problem,
            attempts=attempts,
            short=not refusal and (cut or not text),
        )


def _parsed(body: bytes) -> Any:
    """The JSON in a body, or None."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _line(text: str) -> str:
    """The first line of what a server says."""
    return next(iter(text.strip().splitlines()), "no reason given")


def _place(location: str) -> str:
    """Where a redirect leads, without what may be secret."""
    try:
        parts = urlsplit(location)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}" if parts.netloc else parts.path
    except ValueError:
        return "a place that makes no sense"


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 10**9 else 0


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds the server asks to wait; only the plain number is understood."""
    try:
        return min(max(0.0, float(headers["retry-after"])), 3600.0)
    except (KeyError, ValueError):
        return None
