"""Text in, text out, usage: what talks to a model, and the limits that every run sets to it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llmbo.advisor.render import Prompt
from llmbo.advisor.roles import Exchange


@dataclass(frozen=True)
class Completion:
    """A model's reply.

    Args:
        problem: Why the text is not to be trusted as a whole (cut off, refused), or None.
        attempts: Requests that were made, retries and fallbacks included.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    mode: str = ""
    problem: str | None = None
    attempts: int = 1


class ClientError(Exception):
    """There is no reply, and the client has tried what it could: the message says why, without secrets."""

    def __init__(self, reason: str, attempts: int) -> None:
        super().__init__(reason)
        self.attempts = attempts


class LLMClient(Protocol):
    """A chat model."""

    model: str

    def complete(self, prompt: Prompt, deadline: float) -> Completion:
        """Answer within `deadline` seconds, retries included.

        Raises:
            ClientError: There is no answer.
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
    """

    calls: int
    tokens: int
    seconds: float
    cost: float | None
    deadline: float
    price: Price | None

    def cost_of(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        return self.price.of(prompt_tokens, completion_tokens) if self.price else None

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
