"""Recorded replies again: the same run, offline and at no cost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from llmbo.advisor.llm import missing, read
from llmbo.advisor.parse import merged
from llmbo.advisor.render import Prompt, render, render_repair
from llmbo.advisor.roles import Answer, Exchange, Question, Transcript
from llmbo.advisor.store import read_jsonl


class ReplayAdvisor:
    """Answers each hook of each round with what a recording holds for it, and with nothing when it holds nothing.

    Args:
        tell: Is told in one line, once, that a prompt is not the one that was answered.
    """

    def __init__(self, file: Path, tell: Callable[[str], None] = lambda line: None) -> None:
        self._file, self._tell, self._told = file, tell, False
        self._recorded: dict[tuple[int, str], Sequence[Exchange]] = {}
        self._stopped: dict[tuple[int, str], str | None] = {}
        for consultation in read_jsonl(file):
            key = (consultation.round, consultation.hook)
            self._recorded[key] = consultation.exchanges
            self._stopped[key] = consultation.answer.stopped if consultation.answer else None

    @property
    def knows_prompts(self) -> bool:
        """Whether it can tell another prompt: older recordings, and those of advisors without prompts, hold no digests."""
        return any(exchange.digest for exchanges in self._recorded.values() for exchange in exchanges)

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        key = (question.round, question.hook)
        if key not in self._recorded:
            return Answer(stopped="the recording holds no reply for this round")
        answer = Answer(stopped=self._stopped[key])
        prompt = render(question)
        for exchange in self._recorded[key]:
            self._compare(exchange, prompt, question)
            free = replace(exchange, cost=0.0, seconds=0.0)
            if len(transcript.recorded()) < len(self._recorded[key]):
                transcript.record(free)
            if exchange.reply is not None:
                found = read(exchange, question)
                answer = merged(answer, found)
                prompt = render_repair(question, exchange.reply, found.rejections, missing(answer, question))
        return answer

    def _compare(self, exchange: Exchange, prompt: Prompt, question: Question) -> None:
        if self._told or exchange.digest in ("", prompt.digest):
            return
        self._told = True
        self._tell(
            f"The prompt of round {question.round}, {question.hook}, is not the one that was answered in {self._file} "
            f"(digest {exchange.digest}, now {prompt.digest}): its replies are used all the same."
        )
