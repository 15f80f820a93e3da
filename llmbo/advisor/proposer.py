"""What a round does with advice. The surrogate keeps the veto: see `AdvisedProposer` for the bounds."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch

from llmbo.advisor.context import Context, Setting, offset_from_path
from llmbo.advisor.parse import all_rescaled
from llmbo.advisor.recipes import along
from llmbo.advisor.roles import Advisor, Answer, Candidate, Question
from llmbo.advisor.store import AdviceStore
from llmbo.problem.marginals import Marginals
from llmbo.search.pool import known_recipes
from llmbo.types import Advice, Direction, Outlook, Proposal, Proposer, Source, Trial, TrialState

ORIGINS = {
    Source.WARM_START: "advisor:warm_start", Source.ADVICE: "advisor:propose", Source.DIRECTION: "advisor:directions",
}  # fmt: skip
DESIGN = (Source.PATH, Source.WARM_START)  # of the initial design
NUM_PROPOSALS = 4
NUM_DIRECTIONS = 4
ROWS_PER_DIRECTION = 24
STEPS = (-1.0, -0.5, 0.5, 1.0, 1.5, 2.0)  # levels of a direction's largest delta; advisors mostly get the sign right
AUDIT = 0.1  # of what the filter drops is evaluated all the same, so that its precision is known
MAX_REFUSALS = 6
# hook -> (search round of its first consultation, rounds between the first two as a multiple of `every`)
SCHEDULE = {"propose": (0, 1), "directions": (0, 2), "filter": (1, 2)}


Look = Callable[[], Outlook | None]  # what the optimiser thinks; it takes its time


@dataclass
class AdvisorSession:
    """A run's dialogue with its advisor, asked at most once for each hook and round; answers become rows of the candidate pool.

    Implements `types.AdviceSource`.

    Args:
        every: Rounds between the first two consultations; the gaps grow by as much each time, as the surrogate learns.
        probe: Measures the marginal costs, once in a run; None if the advisor does not read them.
        share: Part of a run's trials that may be advised, see `AdvisedProposer`.
    """

    advisor: Advisor
    advice: AdviceStore
    setting: Setting
    hooks: tuple[str, ...]
    every: int = 2
    probe: Callable[[], Marginals] | None = None
    share: float = 1.0
    along: dict[tuple[int, ...], Direction] = field(
        default_factory=dict
    )  # row of this round -> the direction it follows

    def consult(
        self,
        hook: str,
        trials: Sequence[Trial],
        count: int,
        seed: int,
        candidates: Sequence[Proposal] = (),
        outlook: Look | None = None,
    ) -> Answer:
        """The stored answer of this hook in this round, or a new one."""
        round = next_round(trials)
        stored = self.advice.of(round, hook)
        if stored is not None and stored.answer is not None:
            return stored.answer
        points = tuple(candidate.x for candidate in candidates)
        question = self.question(hook, trials, count, seed, points, outlook)
        consultation = self.advice.open(round, hook)
        answer = self.advisor.ask(question, consultation)
        most = question.max_candidates
        answer = replace(answer, candidates=answer.candidates[:most], directions=answer.directions[:count])
        return consultation.close(answer, **({"reviewed": [list(x) for x in points], "seed": seed} if points else {}))

    def question(
        self,
        hook: str,
        trials: Sequence[Trial],
        count: int,
        seed: int,
        candidates: tuple[tuple[int, ...], ...] = (),
        outlook: Look | None = None,
    ) -> Question:
        """What the advisor is asked in this state."""
        return Question(hook, self._context(trials, outlook), next_round(trials), count, seed, candidates)

    def most(self, number: int) -> int:
        """How many of the first `number` trials may be advised."""
        return math.floor(self.share * number + 1e-9)  # 0.29 * 100 is a little less than 29

    def advise(self, trials: Sequence[Trial], q: int, seed: int, outlook: Look) -> Advice:
        self.along.clear()
        for hook, size in (("propose", NUM_PROPOSALS), ("directions", NUM_DIRECTIONS)):
            if self.due(hook, trials):
                self.consult(hook, trials, size, seed, outlook=outlook)
        places = self.most(len(trials) + q) - sum(trial.source.advised for trial in trials)
        if places <= 0:  # what was proposed waits for a round with room
            return Advice()
        taken = {trial.x for trial in trials}
        rows = [row for row in self._proposed(next_round(trials)) if row.x not in taken]
        directions = self._directions(next_round(trials))
        return Advice((*rows, *self._moved(directions, trials, seed)), tuple(directions), places)

    def due(self, hook: str, trials: Sequence[Trial]) -> bool:
        """Whether this round consults the advisor for `hook`."""
        if hook not in self.hooks:
            return False
        first, gap = SCHEDULE[hook]
        begun = [trial.round for trial in trials if trial.source not in DESIGN]
        rounds = next_round(trials) - min(begun) if begun else 0
        for consultation in count():
            at = first + gap * self.every * consultation * (consultation + 1) // 2
            if at >= rounds:
                return at == rounds
        raise AssertionError("unreachable")

    def _context(self, trials: Sequence[Trial], outlook: Look | None) -> Context:
        refusals = [
            f"{rejection.reason}"
            for consultation in self.advice.all()
            if consultation.answer is not None
            for rejection in consultation.answer.rejections
        ]
        return Context(
            self.setting, trials, self._marginals(), tuple(dict.fromkeys(reversed(refusals)))[:MAX_REFUSALS],
            tuple(self._proposed(next_round(trials))), outlook if "optimiser" in self.setting.tells else None,
        )  # fmt: skip

    def _marginals(self) -> Marginals | None:
        if self.probe is None or "tables" not in self.setting.tells:
            return None
        stored = self.advice.remember("marginals", lambda: vars(self.probe()) if self.probe else None)
        return Marginals(**{**stored, "x": tuple(stored["x"]), "cost": tuple(stored["cost"])})

    def _proposed(self, round: int) -> list[Proposal]:
        """Every candidate ever proposed: one that was vetoed once may win later."""
        sources = {"warm_start": Source.WARM_START, "propose": Source.ADVICE}
        return [
            advised(candidate.x, sources[consultation.hook], candidate.why, candidate.recipe)
            for consultation in self.advice.all()
            if consultation.hook in sources and consultation.answer is not None and consultation.round <= round
            for candidate in consultation.answer.candidates
        ]

    def _directions(self, round: int) -> list[Direction]:
        return [
            direction
            for consultation in self.advice.all()
            if consultation.answer is not None and consultation.round <= round
            for direction in consultation.answer.directions
        ]

    def direction_of(self, x: tuple[int, ...]) -> Direction:
        """The direction whose row, before local search refined it, lies nearest to x."""
        return self.along[_nearest(self.along, x)]

    def explained(self, proposal: Proposal, trials: Sequence[Trial]) -> Proposal:
        """An advised candidate of the search with the reason given for what it was before local search refined it."""
        if proposal.source is Source.DIRECTION:
            direction = self.direction_of(proposal.x)
            return replace(proposal, why=": ".join(filter(None, (direction.name, direction.why))))
        rows = {row.x: row.why for row in self._proposed(next_round(trials)) if row.source is proposal.source}
        return replace(proposal, why=rows[_nearest(rows, proposal.x)]) if rows else proposal

    def _moved(self, directions: Sequence[Direction], trials: Sequence[Trial], seed: int) -> Iterator[Proposal]:
        """Front points and members of the family moved along each direction, at its sizes or any."""
        rng, family = random.Random(seed), self.setting.family
        if not directions:
            return
        low, high = float(family.shares[0]), float(family.shares[-1])
        bases = [offset_from_path(family, trial.x) for trial in Context(self.setting, trials).front]
        bases.append(torch.zeros(family.space.d, dtype=torch.float64))
        taken = {trial.x for trial in trials} | {family.space.max_levels}
        known = known_recipes(family, Context(self.setting, trials).front)
        for direction in (d for d in directions if d.profile and family.prices is not None):
            for x, recipe in along(family, known, direction, rng):
                if x not in taken:
                    self.along.setdefault(x, direction)
                    yield advised(x, Source.DIRECTION, recipe=recipe.to_dict())
        for direction in (d for d in directions if d.levels):
            levels = torch.tensor(direction.levels, dtype=torch.float64)
            drawn = [
                (
                    rng.choice(bases) + rng.choice(STEPS) * levels / levels.abs().max(),
                    rng.choice(direction.at) if direction.at else rng.uniform(low, high),
                )
                for _ in range(ROWS_PER_DIRECTION)
            ]
            offsets, targets = zip(*drawn, strict=True)
            for x in all_rescaled(family, torch.stack(offsets), targets):
                if x not in taken:
                    self.along.setdefault(x, direction)
                    yield advised(x, Source.DIRECTION)


@dataclass
class AdvisedProposer:
    """A proposer whose first design and batches an advisor has a say in.

    The bounds: the advisor fills at most `warm_start` places of the first design. Later its candidates only join the
    surrogate's pool (through `AdvisorSession.advise`). Of the first n trials at most share * n are advised, rounded down, or
    `warm_start` where that is more, for every n. It may drop at most half of a batch, which the search then refills,
    and a random tenth of what it drops is evaluated all the same. Without advice, whatever the reason, the run is the
    one that `search` and `design` would have made alone.

    Args:
        search: Chooses candidates; takes part of the design itself, later asks the session for advice.
        design: Fills the places that the advisor leaves.
        design_size: Trials after which the advisor's places come.
        warm_start: The advisor's places in the design.
    """

    search: Proposer
    design: Proposer
    session: AdvisorSession
    design_size: int
    warm_start: int

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        places = self.design_size + self.warm_start - len(trials)
        ours = min(self.warm_start, min(q, places) - max(0, self.design_size - len(trials)))
        if "warm_start" in self.session.hooks and ours > 0:
            return self._design(trials, min(q, places), ours, seed)
        batch = _advised_last(self._reviewed(self._searched(trials, q, seed), trials, seed))
        while batch and batch[-1].source.advised and self._room(trials, batch, len(batch)) < 0:  # it fell short of q
            batch.pop()
        return batch

    def _room(self, trials: Sequence[Trial], batch: Sequence[Proposal], size: int) -> int:
        """How many more of a batch of this size may be advised."""
        advised = sum(trial.source.advised for trial in trials) + sum(proposal.source.advised for proposal in batch)
        return max(self.warm_start, self.session.most(len(trials) + size)) - advised

    def _design(self, trials: Sequence[Trial], q: int, ours: int, seed: int) -> list[Proposal]:
        """`q` places of which the last `ours` are the advisor's; it is asked once, as late as the design allows."""
        before = _advised_last(self.search.propose(trials, q - ours, seed) if q > ours else [])
        if not self._first_advice():
            self.session.consult("warm_start", [*trials, *_running(before, trials)], self.warm_start, seed)
        taken = {trial.x for trial in trials} | {proposal.x for proposal in before}
        ours = max(0, min(ours, self._room(trials, before, len(before) + ours)))
        mine = [c for c in self._first_advice() if c.x not in taken][:ours]
        rows = [advised(c.x, Source.WARM_START, c.why, c.recipe) for c in mine]
        known = [*trials, *_running([*before, *rows], trials)]
        return [*before, *rows, *self.design.propose(known, q - len(before) - len(rows), seed)]

    def _first_advice(self) -> tuple[Candidate, ...]:
        return self.session.advice.candidates("warm_start")

    def _searched(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        """A batch of the search, with reasons; which direction led to a candidate is noted."""
        batch = [self.session.explained(proposal, trials) for proposal in self.search.propose(trials, q, seed)]
        followed = [p.x for p in batch if p.source is Source.DIRECTION]
        if followed:
            self.session.advice.note_directions({x: self.session.direction_of(x).name for x in followed})
        return batch

    def _reviewed(self, batch: list[Proposal], trials: Sequence[Trial], seed: int) -> list[Proposal]:
        if len(batch) < 2 or any(p.source is Source.PATH for p in batch) or not self.session.due("filter", trials):
            return batch
        answer = self.session.consult("filter", trials, len(batch) // 2, seed, batch)
        going = dropped_and_audited(answer, len(batch), seed)
        kept = [proposal for index, proposal in enumerate(batch) if not going.get(index, False)]
        if len(kept) == len(batch):
            return batch
        # What is dropped must not come back; counted as advised trials it frees no place for advice either.
        passed = [replace(p, source=Source.ADVICE) if going.get(index) else p for index, p in enumerate(batch)]
        return kept + self._searched([*trials, *_running(passed, trials)], len(batch) - len(kept), seed)


def advised(x: tuple[int, ...], source: Source, why: str = "", recipe: Mapping[str, Any] = {}) -> Proposal:
    """A proposal that stems from the advisor."""
    return Proposal(x, ORIGINS[source], why, source, recipe)


def _advised_last(batch: Sequence[Proposal]) -> list[Proposal]:
    """The share of advice that is kept at a batch's end is then kept at each of its trials."""
    return sorted(batch, key=lambda proposal: proposal.source.advised)


def _running(proposals: Sequence[Proposal], trials: Sequence[Trial]) -> list[Trial]:
    """Proposals as pending trials: neither proposed again nor ignored. They do not make the round another one."""
    number, round = len(trials), next_round(trials) - 1
    return [
        Trial(number + i, round, p.x, p.origin, TrialState.RUNNING, source=p.source) for i, p in enumerate(proposals)
    ]


def dropped_and_audited(answer: Answer, batch: int, seed: int) -> dict[int, bool]:
    """Position of each candidate that the filter drops -> whether it really goes (False: evaluated as an audit)."""
    rng = random.Random(seed)
    against = sorted((d for d in answer.decisions if not d.keep), key=lambda d: (-d.confidence, d.index))[: batch // 2]
    return {decision.index: rng.random() >= AUDIT for decision in against}


def _nearest(rows: Iterable[tuple[int, ...]], x: tuple[int, ...]) -> tuple[int, ...]:
    """The row fewest levels away from x."""
    return min(rows, key=lambda row: sum(abs(a - b) for a, b in zip(row, x, strict=True)))


def next_round(trials: Sequence[Trial]) -> int:
    return 1 + max((trial.round for trial in trials), default=-1)
