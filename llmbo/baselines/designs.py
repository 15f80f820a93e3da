"""Proposers that never look at a measured value: they are baselines, and the initial designs of the others."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, product

import torch
from torch import Tensor

from llmbo.family import ThresholdFamily
from llmbo.space import SearchSpace
from llmbo.types import Proposal, Proposer, Trial

NUM_INITIAL = 12  # trials before a strategy with an initial design looks at any value
ATTEMPTS = 1000  # draws per wanted candidate before a random design says that nothing is left


@dataclass(frozen=True)
class ThresholdProposer:
    """Members of a threshold family, at shares that fill the range ever more finely.

    The order is the van der Corput sequence, so that every prefix is spread evenly: the largest and the smallest member
    first, then halves, quarters, eighths. It ignores the seed and the measured values.

    Args:
        origin: What its proposals are called. With a family that thresholds Taylor scores it is LLM-Pruner's allocation
            (arXiv:2305.11627, there under Taylor ranking, here under the problem's own ranking and compensation).
    """

    family: ThresholdFamily
    origin: str = "threshold"

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        return fresh(self._members(), trials, q, self.family.space, self.origin)

    def _members(self) -> Iterator[tuple[int, ...]]:
        low, high = float(self.family.shares[0]), float(self.family.shares[-1])
        yield self.family.at(low)
        for position in range(1, 8 * len(self.family.shares)):  # fine enough to meet every member
            yield self.family.at(low + (high - low) * van_der_corput(position))


@dataclass(frozen=True)
class UniformProposer:
    """The same widths in every layer: all legal pairs of KV groups and neurons. It ignores the seed and the measured values.

    First the models that keep all KV groups, in an order that fills their range ever more finely, then the others.
    """

    space: SearchSpace

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        return fresh(self._members(), trials, q, self.space, "uniform")

    def _members(self) -> Iterator[tuple[int, ...]]:
        layers, top = self.space.num_layers, self.space.max_levels
        for groups in range(top[0], -1, -1):
            pairs = product([groups], range(top[-1], -1, -1))
            points = [(kv,) * layers + (neurons,) * layers for kv, neurons in pairs]
            yield from (points[i] for i in evenly(legal_rows(points, self.space)))


@dataclass(frozen=True)
class RandomProposer:
    """Random vectors with a random keep rate per candidate, so that all sizes come up.

    Each block's level is binomial around the candidate's rate; plain uniform vectors cluster around half size.
    """

    space: SearchSpace

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        levels = torch.tensor(self.space.max_levels)

        def draw(generator: torch.Generator) -> Tensor:
            rate = self.space.min_share + (1 - self.space.min_share) * torch.rand((), generator=generator)
            return torch.stack([(torch.rand(int(n), generator=generator) < rate).sum() for n in levels])

        return fresh(_draws(draw, q, seed), trials, q, self.space, "random")


@dataclass(frozen=True)
class RandomVectorsProposer:
    """Every block's level uniform between nothing and all."""

    space: SearchSpace

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        levels = torch.tensor(self.space.max_levels)

        def draw(generator: torch.Generator) -> Tensor:
            return (torch.rand(len(levels), generator=generator) * (levels + 1)).floor()

        return fresh(_draws(draw, q, seed), trials, q, self.space, "random-vectors")


@dataclass(frozen=True)
class Started:
    """An initial design, then another proposer: so all strategies with the same start share its trials.

    Args:
        start: Gives the initial design.
        search: Takes over after `num_initial` trials, or when `start` has no more to give.
    """

    start: Proposer
    search: Proposer
    space: SearchSpace
    num_initial: int = NUM_INITIAL

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        missing = self.num_initial - len(trials)
        learnt = sum(trial.complete for trial in trials) >= 2  # else all have failed, or are running still
        if missing > 0 or not learnt:
            initial = self.start.propose(trials, min(q, missing) if missing > 0 else q, seed)
            if initial or not learnt:
                return initial or RandomProposer(self.space).propose(trials, q, seed)
        return self.search.propose(trials, q, seed)


def fresh(
    candidates: Iterable[tuple[int, ...]], trials: Sequence[Trial], q: int, space: SearchSpace, origin: str
) -> list[Proposal]:
    """The first `q` distinct legal candidates that no trial has; the dense model is none."""
    seen = {trial.x for trial in trials} | {space.max_levels}
    proposals: list[Proposal] = []
    for x in candidates:
        if len(proposals) == q:
            break
        if x not in seen and bool(space.legal(torch.tensor([x], dtype=torch.float64))):
            seen.add(x)
            proposals.append(Proposal(x, origin))
    return proposals


def topped_up(
    proposals: list[Proposal], trials: Sequence[Trial], q: int, space: SearchSpace, seed: int
) -> list[Proposal]:
    """`proposals`, filled up to `q` at random: a small space may hold nothing else that a search would find."""
    if len(proposals) >= q:
        return proposals[:q]
    seen = {proposal.x for proposal in proposals}
    strays = RandomProposer(space).propose(trials, q, seed)
    return (proposals + [stray for stray in strays if stray.x not in seen])[:q]


def legal_rows(points: Sequence[tuple[int, ...]], space: SearchSpace) -> list[int]:
    """Indices of the legal points, by increasing share."""
    X = torch.tensor(points, dtype=torch.float64).view(len(points), space.d)
    legal = space.legal(X)
    return [index for index in space.share(X).argsort().tolist() if legal[index]]


def evenly(items: Sequence[int]) -> Iterator[int]:
    """All items, every prefix of them spread evenly over the sequence."""
    yield from dict.fromkeys(items[int(van_der_corput(n) * len(items))] for n in range(4 * len(items)))


def van_der_corput(n: int) -> float:
    """The n-th element of the base-2 sequence 0, 1/2, 1/4, 3/4, 1/8, .."""
    value, weight = 0.0, 0.5
    while n:
        value += weight * (n & 1)
        n >>= 1
        weight /= 2
    return value


def _draws(draw: Callable[[torch.Generator], Tensor], q: int, seed: int) -> Iterator[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    for attempt in count():
        if attempt > ATTEMPTS * q:
            return
        yield tuple(draw(generator).int().tolist())
