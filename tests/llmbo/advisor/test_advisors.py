"""What every advisor promises, and what a run with one may cost and can gain, on a toy problem whose quality is a formula."""

import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from math import floor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmbo.advisor.assemble import AdvisorInputs, build_advised, build_session
from llmbo.advisor.client import Limits
from llmbo.advisor.context import Setting
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.mail import MailClient
from llmbo.advisor.offline import OFFLINE, NoAdvisor, OfflineAdvisor
from llmbo.advisor.openai_client import OpenAIClient
from llmbo.advisor.parse import judge
from llmbo.advisor.proposer import AUDIT, AdvisedProposer, AdvisorSession, dropped_and_audited
from llmbo.advisor.replay import ReplayAdvisor
from llmbo.advisor.roles import Advisor, Answer, Decision, Question, Transcript
from llmbo.advisor.store import FILE, AdviceStore, Consultation, MemoryNotes, read_jsonl
from llmbo.advisor.summary import summarise
from llmbo.comparison.strategies import strategy_of
from llmbo.config import RunConfig
from llmbo.config.advisor import DEFAULT_HOOKS, HOOKS
from llmbo.errors import ConfigError, ReplyAwaited
from llmbo.problem.marginals import measure_marginals
from llmbo.problem.objectives import ref_point, to_maximize
from llmbo.run.store import TrialStore
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.baselines import ThresholdProposer
from llmbo.search.loop import run_search
from llmbo.search.pareto import hypervolume
from llmbo.search.pool import candidate_pool
from llmbo.types import Advice, Proposal, Source, Trial

LIMITS = Limits(calls=50, tokens=10**6, seconds=600, cost=None, deadline=2.0, price=None)
NUM_INITIAL = 8
PLACES = 3


class Quiet:
    """An observer that says nothing."""

    def on_proposing(self, round: int) -> None: ...

    def on_trial_start(self, proposal: Proposal, number: int) -> None: ...

    def on_trial_end(self, trial: Trial, trials: Sequence[Trial]) -> None: ...


@dataclass(frozen=True)
class Saboteur:
    """As hostile as `hostile`, and knows the truth: it drops the candidates that are really best."""

    toy: Any

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        layers = self.toy.space.num_layers
        worst = {"layers": [f"0-{layers - 1}"], "neurons_keep": 0}
        items = [{"base": "dense", "edits": [worst], "target_share": round(0.45 + 0.04 * n, 2)} for n in range(9)]
        best = sorted(range(len(question.candidates)), key=lambda i: self.toy.evaluate(question.candidates[i])["kl"])
        return judge(
            {
                "proposals": items,
                "directions": [{"name": "bad", "edits": [{"layers": [f"0-{layers - 1}"], "neurons_delta": -1, "kv_delta": 1}]}],
                "decisions": [{"id": i, "keep": False, "confidence": 1.0} for i in best],
            },
            question,
        )  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """An advisor by mail, and somebody who answers its letters."""

    advisor: Advisor
    good: Callable[[dict[str, Any]], str]

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        while True:
            try:
                return self.advisor.ask(question, transcript)
            except ReplyAwaited as awaited:
                letter = json.loads(awaited.letter.with_suffix(".json").read_text())
                awaited.reply.write_text(self.good(letter))


@pytest.fixture
def make_session(chat_server: Any, tmp_path: Path) -> Callable[..., AdvisorSession]:
    """(toy, advisor's name, hooks, advice) -> the session of that advisor."""

    def make(
        toy: Any, name: str, hooks: tuple[str, ...] = HOOKS, advice: AdviceStore | None = None, level: str = "full"
    ) -> AdvisorSession:
        advice = advice or AdviceStore(MemoryNotes())
        advisors: dict[str, Callable[[], Advisor]] = {
            "none": NoAdvisor,
            "saboteur": lambda: Saboteur(toy),
            "openai": lambda: LLMAdvisor(OpenAIClient("m", chat_server.url, chat_server.secret), LIMITS, advice),
            "mail": lambda: Answered(
                LLMAdvisor(MailClient(tmp_path / "letters", advice), LIMITS, advice), chat_server.good
            ),
            **{name: lambda name=name: OfflineAdvisor(name, OFFLINE[name]) for name in OFFLINE},  # type: ignore[misc]
        }
        advisor = ReplayAdvisor(Path(name)) if name not in advisors else advisors[name]()
        setting = Setting(toy.family, toy.objectives, toy.dense, None, level)
        probe = (
            None if name in ("none", "random") else lambda: measure_marginals(toy.family, [toy.evaluator], "kl", 0.1)
        )
        return AdvisorSession(advisor, advice, setting, hooks, 1, probe)

    return make


def advised(toy: Any, session: AdvisorSession) -> AdvisedProposer:
    places = PLACES if "warm_start" in session.hooks else 0
    search = QNehviProposer(toy.family, toy.objectives, toy.dense, NUM_INITIAL - places, session)
    return AdvisedProposer(
        search, ThresholdProposer(toy.family, toy.objectives, toy.dense), session, NUM_INITIAL - places, places
    )


def search(proposer: Any, toy: Any, budget: int, seed: int = 0, q: int = 4) -> list[Trial]:
    """A run without a database."""
    trials: list[Trial] = []
    while len(trials) < budget:
        batch = proposer.propose(trials, q, 1000 * seed + len(trials))
        assert batch
        round = 1 + max((trial.round for trial in trials), default=-1)
        trials += [
            toy.trial(len(trials) + n, proposal, round) for n, proposal in enumerate(batch[: budget - len(trials)])
        ]
    return trials


def volume(trials: Sequence[Trial], toy: Any) -> float:
    return hypervolume(to_maximize([t.values for t in trials], toy.objectives), ref_point(toy.objectives))


@pytest.fixture
def little_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search looks at few candidates: for what does not depend on how good its choice is."""
    monkeypatch.setattr("llmbo.search.acquisition.candidate_pool", partial(candidate_pool, size=64))
    monkeypatch.setattr("llmbo.search.acquisition.LOCAL_ROUNDS", 1)


ADVISORS = ["none", *OFFLINE, "saboteur", "openai", "mail"]


@pytest.mark.parametrize("name", ADVISORS)
@pytest.mark.parametrize("hook", HOOKS)
def test_contract(
    make_toy: Callable[..., Any],
    question: Callable[..., Question],
    make_session: Callable[..., AdvisorSession],
    name: str,
    hook: str,
) -> None:
    """At most what was asked for, legal and new; the same question gets the same answer; nothing global is touched."""
    toy = make_toy(6)
    asked = question(hook)
    seen = {trial.x for trial in asked.context.trials} | {toy.space.max_levels}
    state = torch.random.get_rng_state(), random.getstate()
    answers = [make_session(toy, name).advisor.ask(asked, AdviceStore(MemoryNotes()).open(3, hook)) for _ in range(2)]
    assert answers[0] == answers[1]
    assert torch.equal(torch.random.get_rng_state(), state[0]) and random.getstate() == state[1]
    answer = answers[0]
    points = [candidate.x for candidate in answer.candidates]
    assert len(set(points)) == len(points) <= asked.count and seen.isdisjoint(points)
    assert toy.space.legal(torch.tensor(points, dtype=torch.float64).view(len(points), toy.space.d)).all()
    assert all(len(d.levels) == toy.space.d and any(d.levels) for d in answer.directions)
    assert len({d.index for d in answer.decisions}) == len(answer.decisions)
    assert all(0 <= d.index < len(asked.candidates) for d in answer.decisions)
    assert answer.stopped is None and (bool(answer) == (name != "none") or (name, hook) == ("heuristic", "filter"))
    assert Answer.from_dict(json.loads(json.dumps(answer.to_dict()))) == answer


@pytest.mark.usefixtures("little_search")
@pytest.mark.parametrize(
    ("name", "hooks"),
    [*(("saboteur", (hook,)) for hook in HOOKS), *((name, HOOKS) for name in ("none", "saboteur", "openai", "dead"))],
)
def test_every_hook_alone_keeps_its_bounds(
    toy: Any, make_session: Callable[..., AdvisorSession], chat_server: Any, name: str, hooks: tuple[str, ...]
) -> None:
    if name == "dead":
        chat_server.answer = lambda body, handler: chat_server.send(handler, 401, "{}")
    session = make_session(toy, name.replace("dead", "openai"), hooks)
    trials = search(advised(toy, session), toy, 14)
    assert len({trial.x for trial in trials}) == 14
    warm = [trial for trial in trials if trial.origin == "advisor:warm_start"]
    assert len(warm) <= PLACES and all(NUM_INITIAL - PLACES <= trial.number < NUM_INITIAL for trial in warm[:PLACES])
    assert {trial.origin for trial in trials} <= {
        "threshold",
        "qnehvi",
        "recipe",
        *(f"advisor:{hook}" for hook in hooks),
    }
    assert {c.hook for c in session.advice.all()} <= set(hooks)
    if name in ("none", "dead"):  # without advice it is the run that the search makes alone
        alone = search(QNehviProposer(toy.family, toy.objectives, toy.dense, NUM_INITIAL), toy, 14)
        assert [(t.x, t.origin) for t in trials] == [(t.x, t.origin) for t in alone]


class Beloved(AdvisorSession):
    """Keeps what it has said in the present round."""

    liked: frozenset[tuple[int, ...]] = frozenset()

    def advise(self, trials: Sequence[Trial], q: int, seed: int, outlook: Callable[[], Any]) -> Advice:
        advice = super().advise(trials, q, seed, outlook)
        self.liked = frozenset(row.x for row in advice.rows)
        return advice


class Fond(QNehviProposer):
    """Nothing is worth anything to it but what the advisor says."""

    def posterior(self, complete: Sequence[Trial]) -> Any:
        def value(X: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            assert isinstance(self.advice, Beloved)
            return torch.tensor([float(tuple(x) in self.advice.liked) for x in X.int().tolist()])

        return SimpleNamespace(
            expected_improvement=lambda front: value, log_nehvi=value, predicted_gains=lambda X: torch.zeros(2, len(X))
        )


@pytest.mark.usefixtures("little_search")
@pytest.mark.parametrize("seed", range(30))
def test_advice_that_always_wins_keeps_to_its_share(toy: Any, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """At each trial of the run, and no tighter than that: a round gives it all the places there are."""
    rng = random.Random(seed)
    budget, q, share = rng.randint(1, 50), rng.randint(1, 7), rng.choice([0.0, 0.29, 0.3, 0.5, 1.0, rng.random()])
    hooks = rng.choice([DEFAULT_HOOKS, HOOKS, ("propose", "directions")])
    config = RunConfig(
        model="m", budget=budget, batch=q, advisor="random", advisor_hooks=hooks, advisor_every=1,
        advisor_share=share, advisor_warm_start=rng.randint(0, 6),
    )  # fmt: skip
    monkeypatch.setattr("llmbo.advisor.assemble.QNehviProposer", Fond)
    monkeypatch.setattr("llmbo.advisor.assemble.AdvisorSession", Beloved)
    inputs = AdvisorInputs(Setting(toy.family, toy.objectives, toy.dense, None, "full"), None, None)
    proposer = build_advised(config, inputs, AdviceStore(MemoryNotes()))
    trials = search(proposer, toy, budget, seed, q)
    assert len(trials) == budget and proposer.warm_start <= min(config.advisor_warm_start, share * budget + 1e-9)
    advised = [0, *accumulate(trial.source.advised for trial in trials)]
    most = [max(proposer.warm_start, floor(share * n + 1e-9)) for n in range(budget + 1)]
    assert (
        all(number <= bound for number, bound in zip(advised, most, strict=True))
        and advised[-1] <= share * budget + 1e-9
    )
    ends = [n for n in range(1, budget) if trials[n - 1].round != trials[n].round]
    for start, end in pairwise([0, *ends]):
        design = any(trial.source in (Source.PATH, Source.WARM_START) for trial in trials[start:end])
        if not design and "filter" not in hooks:
            assert advised[end] == min(advised[start] + end - start, most[end])


@pytest.mark.parametrize("seed", [0])
def test_a_hostile_advisor_costs_little(
    make_toy: Callable[..., Any], make_session: Callable[..., AdvisorSession], seed: int
) -> None:
    """The veto: everything it says is wrong, and its places in the design and its drops are bounded."""
    toy = make_toy(6, seed=seed)
    alone = volume(search(QNehviProposer(toy.family, toy.objectives, toy.dense, NUM_INITIAL), toy, 28, seed), toy)
    hostile = volume(search(advised(toy, make_session(toy, "saboteur")), toy, 28, seed), toy)
    assert hostile > 0.97 * alone


def test_good_advice_helps(make_toy: Callable[..., Any], make_session: Callable[..., AdvisorSession]) -> None:
    """The rules know the toy's marginal costs, so their first proposals must beat those of chance."""
    means = {}
    for name in ("random", "heuristic"):
        volumes = []
        for seed in range(2):
            toy = make_toy(10, seed=seed)
            volumes.append(
                volume(search(advised(toy, make_session(toy, name, ("warm_start", "propose"))), toy, 16, seed), toy)
            )
        means[name] = sum(volumes)
    assert means["heuristic"] > means["random"]


def test_at_most_half_a_batch_is_dropped_and_a_tenth_of_that_is_audited() -> None:
    answer = Answer(decisions=tuple(Decision(i, i == 9, 0.1 * i) for i in range(10)))
    audits = 0
    for seed in range(400):
        going = dropped_and_audited(answer, 10, seed)
        assert sorted(going) == [4, 5, 6, 7, 8]  # the surest, and never what is to be kept
        audits += sum(not gone for gone in going.values())
    assert 0.7 * AUDIT < audits / 2000 < 1.3 * AUDIT


@pytest.mark.usefixtures("little_search")
def test_dropped_candidates_are_replaced_and_audits_evaluated(
    toy: Any, make_session: Callable[..., AdvisorSession]
) -> None:
    session = make_session(toy, "saboteur", ("filter",))
    trials = search(advised(toy, session), toy, 24)
    evaluated = {trial.x for trial in trials}
    reviews = [c for c in session.advice.all() if c.hook == "filter"]
    assert reviews
    for review in reviews:
        assert review.answer is not None
        going = dropped_and_audited(review.answer, len(review.extra["reviewed"]), review.extra["seed"])
        assert 0 < len(going) <= len(review.extra["reviewed"]) // 2
        for index, gone in going.items():
            assert gone or tuple(review.extra["reviewed"][index]) in evaluated
    assert all(sum(trial.round == round for trial in trials) == 4 for round in range(6))


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., tuple[TrialStore, AdviceStore]]:
    """(toy, name) -> a store on disk, and its advice with the copy in a folder of that name."""

    def open_(toy: Any, name: str = "run") -> tuple[TrialStore, AdviceStore]:
        (tmp_path / name).mkdir(exist_ok=True)
        store = TrialStore.create(f"sqlite:///{tmp_path / name / 'study.db'}", "run", toy.space, toy.objectives, {}, {})
        return store, AdviceStore(store, tmp_path / name / FILE)

    return open_


def story(store: TrialStore) -> str:
    return json.dumps([[t.number, t.round, t.x, t.origin, t.state, dict(t.values), t.seconds] for t in store.trials()])


def run(toy: Any, session: AdvisorSession, store: TrialStore, budget: int) -> None:
    ticks = iter(range(10**6))
    run_search(advised(toy, session), toy.evaluator, store, budget, 4, 1, Quiet(), clock=lambda: float(next(ticks)))


@pytest.mark.usefixtures("little_search")
@pytest.mark.parametrize(("name", "priced"), [("heuristic", False), ("openai", True)])
def test_a_replayed_run_is_the_recorded_one(
    make_toy: Callable[..., Any], make_priced: Callable[..., Any], make_session: Callable[..., AdvisorSession], stored: Any,
    chat_server: Any, tmp_path: Path, name: str, priced: bool,
) -> None:  # fmt: skip
    toy = make_priced() if priced else make_toy()
    store, advice = stored(toy)
    run(toy, make_session(toy, name, advice=advice), store, 14)
    asked = len(chat_server.requests)
    again, other = stored(toy, "again")
    file, told = tmp_path / "run" / FILE, list[str]()
    session = make_session(toy, str(file), advice=other)
    session.advisor = ReplayAdvisor(file, told.append)
    run(toy, session, again, 14)
    assert story(again) == story(store) and len(chat_server.requests) == asked
    assert [trial.recipe for trial in again.trials()] == [trial.recipe for trial in store.trials()]
    assert priced == any(trial.recipe for trial in again.trials() if trial.source.advised)
    assert any(trial.origin.startswith("advisor:") for trial in again.trials())
    assert sum(exchange.cost or 0.0 for exchange in other.exchanges()) == 0
    assert told == []
    changed = make_session(toy, str(file), level="partial")
    changed.advisor = ReplayAdvisor(file, told.append)
    changed.advise(again.trials()[:8], 4, 0, lambda: None), changed.advise(again.trials()[:12], 4, 0, lambda: None)
    assert len(told) == (name == "openai") and all("is not the one that was answered" in line for line in told)
    file.write_text(re.sub(r'"digest": "\w+"', '"digest": ""', file.read_text()))  # as older versions leave it
    changed.advisor, changed.advice = ReplayAdvisor(file, told.append), AdviceStore(MemoryNotes())
    assert changed.advise(again.trials()[:8], 4, 0, lambda: None).rows and len(told) == (name == "openai")


class Killed(Exception):
    """Stands in for a power cut."""


def dying(keep: Callable[[str, Any], None], writes: int) -> Callable[[str, Any], None]:
    """Keeps so many notes."""
    count = itertools.count(1)

    def kept(key: str, value: Any) -> None:
        keep(key, value)
        if next(count) == writes:
            raise Killed

    return kept


@pytest.mark.usefixtures("little_search")
def test_nothing_is_asked_twice_and_a_resumed_run_gets_the_same_advice(
    toy: Any, make_session: Callable[..., AdvisorSession], stored: Any, chat_server: Any
) -> None:
    """Broken off right after the n-th note is stored."""
    store, advice = stored(toy)
    run(toy, make_session(toy, "openai", advice=advice), store, 14)
    asked = len(chat_server.requests)
    for writes in (1, 5):
        chat_server.requests.clear()
        resumed, other = stored(toy, f"resumed after {writes}")
        resumed.set_note = dying(resumed.set_note, writes)
        with pytest.raises(Killed):
            run(toy, make_session(toy, "openai", advice=other), resumed, 14)
        resumed, other = stored(toy, f"resumed after {writes}")
        run(toy, make_session(toy, "openai", advice=other), resumed, 14)
        strip = lambda story: [row[:6] for row in json.loads(story)]  # noqa: E731  (the clock started anew)
        assert strip(story(resumed)) == strip(story(store))
        assert len(chat_server.requests) == asked


@pytest.mark.usefixtures("little_search")
def test_the_copy_for_people_holds_everything(
    toy: Any, make_session: Callable[..., AdvisorSession], stored: Any, tmp_path: Path, chat_server: Any
) -> None:
    store, advice = stored(toy)
    run(toy, make_session(toy, "openai", advice=advice), store, 16)
    copy = read_jsonl(tmp_path / "run" / FILE)
    assert [c.to_dict() for c in copy] == [c.to_dict() for c in advice.all()]
    assert {c.hook for c in copy} == set(HOOKS)
    assert all(exchange.user and exchange.reply for c in copy for exchange in c.exchanges)
    assert chat_server.secret not in (tmp_path / "run" / FILE).read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("", None), ("{}\n", "line 1"), ("no json\n", "line 1"), ("\x00\n", "line 1")],
)
def test_a_recording_that_is_none_is_refused(tmp_path: Path, content: str | None, message: str | None) -> None:
    file = tmp_path / "recording.jsonl"
    if content is not None:
        file.write_text(content)
    if message is None:
        assert read_jsonl(file) == []
        return
    with pytest.raises(ConfigError, match=message):
        ReplayAdvisor(file)


def test_a_broken_last_line_of_a_recording_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "recording.jsonl"
    file.write_text(json.dumps(Consultation(2, "propose").to_dict()) + '\n{"round": 3, "ho')
    assert [c.round for c in read_jsonl(file)] == [2]


@pytest.mark.usefixtures("little_search")
@pytest.mark.parametrize("name", ["openai", "saboteur"])
def test_the_summary_adds_up(
    toy: Any, make_session: Callable[..., AdvisorSession], chat_server: Any, name: str
) -> None:
    session = make_session(toy, name)
    trials = search(advised(toy, session), toy, 16)
    settings = {"advisor": name, "advisor_context": "full", "advisor_hooks": HOOKS, "seed": 0}
    part = summarise(settings, session.advice, trials, toy.objectives, toy.dense)
    assert sum(part.hypervolume_by_origin.values()) == pytest.approx(volume(trials, toy))
    assert sum(hook.calls for hook in part.hooks.values()) == len(chat_server.requests)
    assert sum(hook.prompt_tokens for hook in part.hooks.values()) == 1000 * len(chat_server.requests)
    for hook in ("warm_start", "propose"):
        outcomes = part.hooks[hook].outcomes
        assert outcomes.evaluated == sum(trial.origin == f"advisor:{hook}" for trial in trials)
    assert sum(direction.trials for direction in part.directions) == sum(
        t.origin == "advisor:directions" for t in trials
    )
    assert part.filter is not None and part.filter.dropped >= len(part.filter.audited)
    assert part.probe is not None and part.probe.evaluations > 0 and part.stopped is None


def test_marginals_are_what_one_level_less_costs(toy: Any) -> None:
    found = measure_marginals(toy.family, [toy.evaluator] * 2, "kl", 0.5)
    before = toy.evaluate(found.x)["kl"]
    for index, cost in enumerate(found.cost):
        less = tuple(level - (place == index) for place, level in enumerate(found.x))
        assert cost is None if found.x[index] == 0 else cost == pytest.approx(toy.evaluate(less)["kl"] - before)
    assert found.noise == 0 and found.evaluations == 0.5 * (1 + sum(cost is not None for cost in found.cost))


def test_advice_is_asked_for_less_and_less(toy: Any, make_session: Callable[..., AdvisorSession]) -> None:
    session = make_session(toy, "random", ("propose",))
    trials = [toy.trial(0, Proposal(toy.family.at(0.5), "threshold", source=Source.PATH))]
    asked = []
    for round in range(12):
        asked += [round] if session.due("propose", trials) else []
        assert not session.due("filter", trials)  # a hook that is switched off
        trials.append(toy.trial(len(trials), Proposal(toy.random_points(round + 1, 5)[-1], "qnehvi"), round + 1))
    assert asked == [0, 1, 3, 6, 10]


def test_a_proposal_that_was_vetoed_may_win_later(toy: Any, make_session: Callable[..., AdvisorSession]) -> None:
    session = make_session(toy, "random", ("propose",))
    trials = toy.trials(toy.family.path[:-1:6].int().tolist())
    session.consult("propose", trials, 4, 0)
    later = replace(trials[0], number=len(trials), round=4, x=toy.random_points(1, 5)[0], origin="qnehvi")
    rows = {row.x for row in session.advise([*trials, later], 4, 1, lambda: None).rows}
    assert {candidate.x for candidate in session.advice.candidates("propose")} <= rows


def test_an_advised_arm_of_a_comparison(toy: Any) -> None:
    """Built from the table like any strategy, for problems that have no statistics."""
    build = strategy_of("advised").build
    arm = build(toy, toy.objectives, {"by": "random", "hooks": ["propose", "warm_start"], "num_initial": 8})
    origins = {trial.origin for trial in search(arm, toy, 10)}
    assert "advisor:warm_start" in origins and "threshold" in origins
    with pytest.raises(ConfigError, match="did you mean heuristic"):
        build(toy, toy.objectives, {"by": "heuristics"})
    with pytest.raises(ConfigError, match="llmbo optimize"):
        build(toy, toy.objectives, {"by": "transformers:self"})
    with pytest.raises(ConfigError, match=r"mail:letters .* replay:FILE"):
        build(toy, toy.objectives, {"by": "mail:letters"})


def test_a_context_too_small_is_said_before_the_search(toy: Any) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llmbo[local-advisor]'")
    told: list[str] = []
    for room in (5000, 7000):  # a prompt for four layers has up to 5900 tokens
        text = SimpleNamespace(max_position_embeddings=room)
        model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda text=text: text))
        loaded: Any = SimpleNamespace(name="m", model=model, tokenizer=None)
        inputs = AdvisorInputs(Setting(toy.family, toy.objectives, toy.dense, None, "full"), loaded, None, told.append)
        build_session(RunConfig(model="m", advisor="transformers:self"), inputs, AdviceStore(MemoryNotes()))
    assert len(told) == 1 and "transformers:self takes 5000 tokens" in told[0] and "up to 5900" in told[0]
