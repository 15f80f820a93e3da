"""Recorded replies again: the same run, offline and at no cost."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from llmbo.advisor.llm import read
from llmbo.advisor.parse import merged
from llmbo.advisor.roles import Answer, Exchange, Question, Transcript
from llmbo.advisor.store import read_jsonl


class ReplayAdvisor:
    """Answers each hook of each round with what a recording holds for it, and with nothing when it holds nothing."""

    def __init__(self, file: Path) -> None:
        self._recorded: dict[tuple[int, str], Sequence[Exchange]] = {}
        self._stopped: dict[tuple[int, str], str | None] = {}
        for consultation in read_jsonl(file):
            key = (consultation.round, consultation.hook)
            self._recorded[key] = consultation.exchanges
            self._stopped[key] = consultation.answer.stopped if consultation.answer else None

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        key = (question.round, question.hook)
        if key not in self._recorded:
            return Answer(stopped="the recording holds no reply for this round")
        answer = Answer(stopped=self._stopped[key])
        for exchange in self._recorded[key]:
            free = replace(exchange, cost=0.0, seconds=0.0)
            if len(transcript.recorded()) < len(self._recorded[key]):
                transcript.record(free)
            if exchange.reply is not None:
                answer = merged(answer, read(exchange, question))
        return answer
