"""Proposers without a model of the search space: they are baselines, and the initial designs of the others."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from scipy.stats import qmc
from torch import Tensor

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.search.gain import EPSILON, FamilyCurve
from llmbo.types import Proposal, Proposer, Source, Trial

NUM_INITIAL = 12  # trials before a strategy with an initial design looks at any value
ATTEMPTS = 1000  # draws in vain before a random proposer says that nothing is left


@dataclass(frozen=True)
class ThresholdProposer:
    """Members of a threshold family, each where the front can still gain most. It ignores the seed.

    Quality falls with size along the family, so between two measured members lies at most a rectangle of hypervolume, as wide
    as their shares differ and as high as their qualities do. The largest rectangle gets the next member, in its middle.
    Whatever is worse than the reference point counts for nothing, so no member is spent there in vain.

    Args:
        objectives: The first measured one is the quality.
        dense: The dense model's values by objective name.
        origin: What its proposals are called. With a family that thresholds Taylor scores it is LLM-Pruner's allocation
            (arXiv:2305.11627, there under Taylor ranking, here under the problem's own ranking and compensation).
        source: Whether gains are measured against them.
    """

    family: ThresholdFamily
    objectives: Sequence[Objective]
    dense: Mapping[str, float]
    origin: str = "threshold"
    source: Source = Source.PATH

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        rows = [tuple(row) for row in self.family.path.int().tolist()]
        height = self._expected_loss([trial for trial in trials if trial.complete and trial.x in set(rows)])
        taken = {trial.x for trial in trials} | {self.family.space.max_levels}  # the dense model is no candidate
        known = [member for member, x in enumerate(rows) if x in taken]
        proposals: list[Proposal] = []
        while len(proposals) < q and len(known) < len(rows):
            ends = [end for end in (0, len(rows) - 1) if end not in known]
            member = ends[0] if ends else self._between(known, height)
            known = sorted([*known, member])
            proposals.append(Proposal(rows[member], self.origin, source=self.source))
        return proposals

    def _expected_loss(self, members: Sequence[Trial]) -> Tensor:
        """How much worse than the dense model each member is believed to be, no worse than the reference: `num_members`.

        Args:
            members: Those that have been measured.
        """
        quality = next(objective for objective in self.objectives if not objective.known)
        shares = self.family.shares
        worst = quality.sign * (self.dense[quality.name] - quality.reference)
        if not members:  # a straight line, for want of better
            return worst * (1 - shares) / (1 - shares[0]).clamp_min(1e-12)
        excess = [quality.sign * (self.dense[quality.name] - trial.values[quality.name]) for trial in members]
        known = self.family.space.share(torch.tensor([trial.x for trial in members], dtype=torch.float64))
        curve = FamilyCurve.through(known, torch.tensor(excess, dtype=torch.float64))
        return (curve(shares).exp() - EPSILON).clamp(0, worst)

    def _between(self, known: Sequence[int], height: Tensor) -> int:
        """The member in the middle of the largest rectangle between neighbours of `known`; of the widest when all are flat."""
        shares = self.family.shares
        gaps = [(low, high) for low, high in pairwise(known) if high - low > 1]
        low, high = max(
            gaps,
            key=lambda gap: (
                float((shares[gap[1]] - shares[gap[0]]) * (height[gap[0]] - height[gap[1]])),
                float(shares[gap[1]] - shares[gap[0]]),
            ),
        )
        middle = (shares[low] + shares[high]) / 2
        return low + 1 + int((shares[low + 1 : high] - middle).abs().argmin())


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
        for groups in range(top[0], 0, -1):  # nothing at all in place of a block is no stock shape
            pairs = product([groups], range(top[-1], 0, -1))
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
    return novel((Proposal(x, origin) for x in candidates), trials, q, space)


def novel(found: Iterable[Proposal], trials: Sequence[Trial], q: int, space: SearchSpace) -> list[Proposal]:
    """Likewise of candidates that somebody has a proposal for."""
    seen = {trial.x for trial in trials} | {space.max_levels}
    proposals: list[Proposal] = []
    for proposal in found:
        if len(proposals) == q:
            break
        x = proposal.x
        if x not in seen and bool(space.legal(torch.tensor([x], dtype=torch.float64))):
            seen.add(x)
            proposals.append(proposal)
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
    yield from dict.fromkeys(items[int(place * len(items))] for place in van_der_corput(4 * len(items)))


def van_der_corput(n: int, first: int = 0) -> list[float]:
    """`n` elements of the base-2 sequence 0, 1/2, 1/4, 3/4, 1/8, .., from number `first` on."""
    return qmc.Halton(d=1, scramble=False).fast_forward(first).random(n).flatten().tolist()


def attempts(q: int) -> int:
    """Draws for `q` candidates: plenty in a space that has them, soon over in one that is used up."""
    return ATTEMPTS + 20 * q


def _draws(draw: Callable[[torch.Generator], Tensor], q: int, seed: int) -> Iterator[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(attempts(q)):
        yield tuple(draw(generator).int().tolist())
