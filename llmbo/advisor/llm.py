"""Ask a model: render, send, parse, and at most two repairs. Gives up rather than raise."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from llmbo.advisor.client import ClientError, Limits, LLMClient, Spending
from llmbo.advisor.parse import merged, parse_reply
from llmbo.advisor.render import Prompt, render, render_repair
from llmbo.advisor.roles import Answer, Exchange, Question, Rejection, Transcript
from llmbo.errors import LlmboError, first_line

MAX_REPAIRS = 2
USELESS = "nothing in the reply can be used"


@dataclass(frozen=True)
class LLMAdvisor:
    """Any chat model as an advisor.

    Raises what `client` says to the user (`LlmboError`); nothing is lost by that, and the same question is asked when the run goes on.

    Args:
        spending: Every exchange of the run so far, for the caps.
    """

    client: LLMClient
    limits: Limits
    spending: Spending
    clock: Callable[[], float] = time.monotonic

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        prompt, answer = render(question), Answer()
        for turn in range(1 + MAX_REPAIRS):
            recorded = transcript.recorded()
            if turn < len(recorded):
                exchange = recorded[turn]
            else:
                prompt = self.limits.sized(self.spending, prompt)
                refusal = self.limits.refusal(self.spending, prompt)
                if refusal is not None:
                    return _stopped(answer, refusal)
                exchange = transcript.record(self._exchange(prompt, question))
            if exchange.reply is None:
                return _stopped(answer, exchange.error or "no reply")
            found = read(exchange, question)
            answer = merged(answer, found)
            if not found.rejections or _enough(answer, question):
                return answer
            prompt = render_repair(question, exchange.reply, found.rejections, missing(answer, question))
        return answer

    def _exchange(self, prompt: Prompt, question: Question) -> Exchange:
        start = self.clock()
        try:
            reply = self.client.complete(prompt, max(1.0, self.limits.patience(self.spending)))
        except LlmboError:  # for the user to mend, or to wait for
            raise
        except Exception as error:  # of the client's, its library's or its proxy's making: no run ends because of them
            given_up = isinstance(error, ClientError)
            reason = str(error) if given_up else f"the client failed ({type(error).__name__}: {first_line(error)})"
            return Exchange(
                prompt.system, prompt.user, None, reason, self.client.model, "", getattr(error, "attempts", 1),
                seconds=round(self.clock() - start, 3), digest=prompt.digest,
            )  # fmt: skip
        prompt_tokens = reply.prompt_tokens or prompt.tokens
        exchange = Exchange(
            prompt.system, prompt.user, reply.text, reply.problem, self.client.model, reply.mode, reply.attempts,
            prompt_tokens, reply.completion_tokens,
            self.limits.cost_of(prompt_tokens, reply.completion_tokens), round(self.clock() - start, 3),
            prompt.digest,
        )  # fmt: skip
        found = read(exchange, question)
        if not exchange.error and not found and found.rejections:
            return replace(exchange, error=USELESS)
        return exchange


def read(exchange: Exchange, question: Question) -> Answer:
    """What an exchange comes to."""
    answer = parse_reply(exchange.reply or "", question)
    if answer or exchange.error in (None, USELESS) or not answer.rejections:
        return answer
    first = answer.rejections[0]
    return Answer(rejections=(Rejection(first.text, exchange.error, first.kind), *answer.rejections[1:]))


def _enough(answer: Answer, question: Question) -> bool:
    """Whether a repair would cost more than it could bring: half of what was wanted is there, or any decision."""
    return bool(answer.decisions) or 2 * missing(answer, question) <= question.count


def missing(answer: Answer, question: Question) -> int:
    """How much of what was wanted has not come."""
    return max(0, question.count - len(answer.candidates) - len(answer.directions) - len(answer.decisions))


def _stopped(answer: Answer, reason: str) -> Answer:
    return replace(answer, stopped=reason)
