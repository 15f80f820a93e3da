"""A model's replies to the first prompt of a comparison's advised arm, given blind, as recordings that the comparison replays.

    python -m experiments.advice ask experiments/configs/advice.toml --text text:path/to/wikitext2-valid.txt > prompt.md
    python -m experiments.advice record experiments/configs/advice.toml --text ... --replies DIR --by "MODEL, DATE"

`ask` prints the prompt. Give it to a model as often as there are seeds, each time on its own and with nothing else, and put what it
says into DIR as `0.json`, `1.json`, .... `record` writes `experiments/advice/SEED.jsonl` with the prompt's digest, and tells what of each
reply was of use.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.quiet import Quiet
from llmbo.advisor.llm import read
from llmbo.advisor.render import render
from llmbo.advisor.roles import Answer, Exchange, Question, Transcript
from llmbo.advisor.store import AdviceStore, MemoryNotes
from llmbo.advisor.strategy import AdvisedStrategy
from llmbo.comparison.config import CompareConfig, read_config
from llmbo.comparison.problems import OpenProblem, opened
from llmbo.comparison.store import EvaluationStore
from llmbo.models.silence import silence_libraries
from llmbo.types import Trial, TrialState

FOLDER = Path("experiments/advice")


def main(arguments: Sequence[str] | None = None) -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ask", "record"))
    parser.add_argument("config", type=Path)
    parser.add_argument("--text")
    parser.add_argument("--cache", type=Path, default=Path("comparisons/evaluations.db"))
    parser.add_argument("--replies", type=Path, help="record: a folder of replies, one for every seed")
    parser.add_argument("--by", help="record: the model and the date")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    if options.what == "record" and not (options.replies and options.by):
        parser.error("record needs --replies DIR and --by 'MODEL, DATE'")
    config = read_config(options.config, text=options.text)
    arm = next(arm for arm in config.arms if str(arm.options.get("by", "")).startswith("replay:"))
    problems = [arm.problem for arm in config.arms]
    with (
        EvaluationStore.open(options.cache) as store,
        opened(arm.problem, problems, config.margin, (), store, Quiet()) as problem,
    ):
        question = first_question(config, problem, arm.options)
    if options.what == "ask":
        prompt = render(question)
        print(f"# System\n\n{prompt.system}\n\n# User\n\n{prompt.user}")
        return
    for seed in config.seeds:
        reply = (options.replies / f"{seed}.json").read_text(encoding="utf-8")
        options.out.mkdir(parents=True, exist_ok=True)
        told = recorded(question, reply, options.by, options.out / f"{seed}.jsonl")
        print(f"seed {seed}: {len(told.candidates)} candidates, {len(told.rejections)} rejected", file=sys.stderr)
        for rejection in told.rejections:
            print(f"  {rejection.reason}", file=sys.stderr)


@dataclass
class Listening:
    """An advisor that keeps what it was asked, and says nothing."""

    question: Question | None = None

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        self.question = question
        return Answer()


def first_question(config: CompareConfig, problem: OpenProblem, options: Any) -> Question:
    """What an advised arm asks first, word for word: every seed begins with the same members of the path.

    Marginal costs that a model reads are measured for it, two evaluations a layer.
    """
    search, listening = problem.search, Listening()
    strategy = AdvisedStrategy(
        search, search.family, problem.objectives, search.dense, limits=search.limits, **{**options, "by": "heuristic"}
    )
    strategy.proposer.session.advisor = listening
    trials: list[Trial] = []
    for round in range(config.budget):
        for proposal in strategy.propose(trials, config.batch, round):
            values = problem.measure(proposal.x, proposal.origin).values
            made = Trial(
                len(trials), round, proposal.x, proposal.origin, TrialState.COMPLETE, values, source=proposal.source
            )
            trials.append(made)
        if listening.question:
            return listening.question
    raise SystemExit("no round asks for a warm start: raise warm_start")


def recorded(question: Question, reply: str, by: str, file: Path) -> Answer:
    """Write the recording of one reply to `file`."""
    prompt = render(question)
    exchange = Exchange(prompt.system, prompt.user, reply, model=by, digest=prompt.digest)
    answer = read(exchange, question)
    advice = AdviceStore(MemoryNotes(), file)
    consultation = advice.open(question.round, question.hook)
    consultation.record(
        exchange if file.stem == "0" else replace(exchange, system="", user="")
    )  # all were asked the same
    consultation.close(answer)
    return answer


if __name__ == "__main__":
    main()
