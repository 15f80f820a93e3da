"""Any server that speaks OpenAI's chat protocol, through the `openai` client: OpenAI, vLLM, Ollama, llama.cpp, LM Studio."""

import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai

from llmbo.advisor.client import ClientError, Completion
from llmbo.advisor.render import Prompt, estimated_tokens
from llmbo.errors import ConfigError, first_line

MAX_BYTES = 1_000_000  # of a response; more is no reply
BACKOFF = 0.5  # seconds before the first retry, doubled each time
MAX_RETRIES = 4
MODES = ("json_schema", "json_object with schema", "json_object", "text")
_UNSUPPORTED = (400, 415, 422, 501)  # what servers say to a response_format they do not know; some say 500 and name it
_HOPELESS = (401, 403, 404, 405, 410)


class _Retry(Exception):
    """This attempt failed, another may not; `after` seconds if the server said so."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class _OtherMode(Exception):
    """The server does not take this way of asking for JSON."""


class _Hopeless(Exception):
    """No attempt can succeed."""


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
            ConfigError: OpenAI's own server without a key.
        """
        key = os.environ.get("OPENAI_API_KEY", "")
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
        if not key and base_url is None:
            raise ConfigError(
                f"--advisor openai:{model} needs a key: set OPENAI_API_KEY, or name a server as openai:{model}@http://HOST:PORT/v1."
            )
        return cls(model, base_url, key or "none")

    # Not the SDK's own retries (openai 3.54, measured): they sit out `Retry-After` up to two minutes each and ask again whatever
    # is left of the deadline (16 s and five requests where 1.5 s were given), repeat the 501 by which a server refuses a response
    # format (five requests, 7 s), and do not repeat a reply that breaks off while it is streamed, as `MAX_BYTES` needs it to be.
    def complete(self, prompt: Prompt, deadline: float) -> Completion:
        end, attempts, delay = self.clock() + deadline, 0, BACKOFF
        retries = 0
        while True:
            attempts += 1
            try:
                return self._completion(self._within(end, prompt), attempts)
            except _OtherMode as error:
                if self._mode + 1 == len(MODES):
                    raise ClientError(self._clean(error), attempts) from None
                self._mode += 1
            except _Hopeless as error:
                raise ClientError(self._clean(error), attempts) from None
            except _Retry as error:
                wait = delay * random.uniform(0.75, 1.0) if error.after is None else error.after
                delay *= 2
                retries += 1
                if retries > MAX_RETRIES or self.clock() + wait >= end:
                    raise ClientError(self._clean(error), attempts) from None
                self.sleep(wait)

    def _within(self, end: float, prompt: Prompt) -> bytes:
        """The response body, or an exception when `end` comes first, whatever the server does meanwhile.

        In a thread, since no timeout of an HTTP library bounds a server that sends a byte now and then.
        """
        result: list[bytes | BaseException] = []

        def work() -> None:
            try:
                result.append(self._request(prompt, max(0.1, end - self.clock())))
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

    def _request(self, prompt: Prompt, timeout: float) -> bytes:
        with openai.OpenAI(api_key=self.api_key, base_url=self.base_url, timeout=timeout, max_retries=0) as client:
            create = client.chat.completions.with_streaming_response.create
            with create(**self._arguments(prompt)) as response:
                body = bytearray()
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise _Hopeless(f"the server sent more than {MAX_BYTES} bytes")
                return bytes(body)

    def _arguments(self, prompt: Prompt) -> dict[str, Any]:
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        formats: tuple[dict[str, Any], ...] = (
            {"type": "json_schema", "json_schema": {"name": prompt.name, "schema": prompt.schema}},
            {"type": "json_object", "schema": prompt.schema},  # llama.cpp and its relatives
            {"type": "json_object"},
            {},
        )
        arguments: dict[str, Any] = {"model": self.model, "messages": messages, self._tokens_key: prompt.max_tokens}
        asked = formats[self._mode]
        return arguments | ({"response_format": asked} if asked else {})

    def _judged(self, error: BaseException) -> BaseException:
        """What a failed request means for the next one."""
        if isinstance(error, openai.APITimeoutError):
            return _Hopeless("the server did not answer in time")
        if isinstance(error, openai.APIStatusError):
            return self._status(error)
        if isinstance(error, (openai.APIConnectionError, OSError)) or type(error).__module__.startswith("httpx"):
            return _Retry(f"connection failed ({first_line(error.__cause__ or error)})")
        return error

    def _status(self, error: openai.APIStatusError) -> Exception:
        status, text = error.status_code, str(error)
        reason = f"HTTP {status}: {first_line(error)[:200]}"
        if status == 400 and "max_tokens" in text and self._tokens_key == "max_tokens":
            self._tokens_key = "max_completion_tokens"  # reasoning models
            return _Retry(reason, after=0.0)
        if self._mode + 1 < len(MODES) and (status in _UNSUPPORTED or "response_format" in text):
            return _OtherMode(reason)
        if status in (408, 409, 429) or status >= 500:
            return _Retry(reason, _retry_after(error))
        return _Hopeless(reason if status in _HOPELESS else f"the request was refused, {reason}")

    def _completion(self, body: bytes, attempts: int) -> Completion:
        try:
            data = json.loads(body)
            choice = data["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content") or "", message.get("refusal")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            raise ClientError("the server's answer is no chat completion", attempts) from None
        usage = data.get("usage") if isinstance(data.get("usage"), dict) else {}
        problem = "the reply was cut off: be shorter" if choice.get("finish_reason") == "length" else None
        if refusal:
            problem = f"the model refused: {self._without_key(str(refusal))[:200]}"
        return Completion(
            text=self._without_key(str(text)),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")) or estimated_tokens(str(text)),
            mode=MODES[self._mode],
            problem=problem,
            attempts=attempts,
        )

    def _clean(self, error: Exception) -> str:
        return self._without_key(str(error))

    def _without_key(self, text: str) -> str:
        """Some servers send the key back."""
        return text.replace(self.api_key, "***") if self.api_key != "none" else text


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 10**9 else 0


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds the server asks to wait; only the plain number is understood."""
    try:
        return min(max(0.0, float(error.response.headers["retry-after"])), 3600.0)
    except (KeyError, ValueError):
        return None
