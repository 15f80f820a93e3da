"""Text in, text out, usage: what talks to a model, and the limits that every run sets to it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from llmbo.advisor.render import GROWTH, REPLY_TOKENS, Prompt
from llmbo.advisor.roles import Exchange


@dataclass(frozen=True)
class Completion:
    """A model's reply.

    Args:
        problem: Why the text is not to be trusted as a whole (cut off, refused), or None.
        attempts: Requests that were made, retries and fallbacks included.
        short: A larger token limit might have brought more.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    mode: str = ""
    problem: str | None = None
    attempts: int = 1
    short: bool = False


class ClientError(Exception):
    """There is no reply, and the client has tried what it could: the message says why, in the server's words or ours."""

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(reason)
        self.attempts = attempts


class LLMClient(Protocol):
    """A chat model."""

    model: str

    def complete(self, prompt: Prompt, deadline: float) -> Completion:
        """Answer within `deadline` seconds, retries included. Whatever else it raises is taken for a `ClientError` as well.

        Raises:
            ClientError: There is no answer.
            LlmboError: There is none before the user has done something; the run ends, to be taken up again.
        """
        ...


class Spending(Protocol):
    """What was asked before."""

    def exchanges(self) -> Sequence[Exchange]:
        """All of the run's, whichever process made them."""
        ...

    def failed(self) -> Sequence[Exchange]:
        """Those of this process that brought nothing: a run that is taken up again gives its model another chance."""
        ...


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True)
class Limits:
    """Caps on a whole run, checked before each call.

    Args:
        seconds: Spent waiting for replies.
        cost: In dollars, None for no cap.
        deadline: Seconds that a dead or misbehaving model may cost, all told, before the run goes on without advice.
        reply_tokens: Of one reply, thinking included, until a reply turns out empty or cut.
    """

    calls: int
    tokens: int
    seconds: float
    cost: float | None
    deadline: float
    price: Price | None
    reply_tokens: int = REPLY_TOKENS

    def cost_of(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        return self.price.of(prompt_tokens, completion_tokens) if self.price else None

    def sized(self, spending: "Spending", prompt: Prompt) -> Prompt:
        """The prompt with as many tokens for its reply as replies have been seen to take, within what is left."""
        took = max((e.completion_tokens for e in spending.exchanges() if e.error is None), default=0)
        wanted = 2 * took if took > self.reply_tokens else self.reply_tokens
        first = max(self.reply_tokens, min(wanted, self._left(spending, prompt, 1)))
        again = min(GROWTH * first, self._left(spending, prompt, 2) - first)  # both replies are paid for
        return replace(prompt, max_tokens=first, second_try=max(0, again))

    def _left(self, spending: "Spending", prompt: Prompt, requests: int) -> int:
        """Tokens for replies that the caps leave after `requests` times the prompt."""
        spent = spending.exchanges()
        left = self.tokens - sum(e.prompt_tokens + e.completion_tokens for e in spent) - requests * prompt.tokens
        if self.cost is not None and self.price is not None and self.price.completion:
            dollars = self.cost - sum(e.cost or 0.0 for e in spent) - self.price.of(requests * prompt.tokens, 0)
            left = min(left, int(dollars * 1e6 / self.price.completion))
        return left

    def refusal(self, spending: "Spending", prompt: Prompt) -> str | None:
        """Why this prompt must not be sent after what was spent, or None."""
        spent, failed = spending.exchanges(), spending.failed()
        given_up = next((exchange.error for exchange in failed if exchange.reply is None), None)
        if given_up is not None:
            return given_up
        tokens = sum(exchange.prompt_tokens + exchange.completion_tokens for exchange in spent)
        cost = sum(exchange.cost or 0.0 for exchange in spent)
        coming = self.cost_of(prompt.tokens, prompt.max_tokens) or 0.0
        checks = (
            (len(spent) + 1 > self.calls, f"the cap of {self.calls} calls is reached"),
            (tokens + prompt.tokens + prompt.max_tokens > self.tokens, f"the cap of {self.tokens} tokens is reached"),
            (self.cost is not None and cost + coming > self.cost, f"the cap of ${self.cost} is reached"),
            (
                sum(exchange.seconds for exchange in spent) >= self.seconds,
                f"the cap of {self.seconds:g} seconds is reached",
            ),
            (self.patience(spending) <= 0, f"{self.deadline:g} seconds were lost to replies that could not be used"),
        )
        return next((reason for reached, reason in checks if reached), None)

    def patience(self, spending: "Spending") -> float:
        """Seconds that may still be lost."""
        return self.deadline - sum(exchange.seconds for exchange in spending.failed())
