"""What the method must beat. Every baseline is a proposer like any other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from llmbo.family import ThresholdFamily
from llmbo.space import SearchSpace
from llmbo.types import Proposal, Trial


@dataclass(frozen=True)
class ThresholdProposer:
    """Members of the threshold family, at shares that fill the range ever more finely.

    The order is the van der Corput sequence, so that every prefix is spread evenly: the largest and the smallest member
    first, then halves, quarters, eighths. It ignores the seed and the measured values.
    """

    family: ThresholdFamily

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        seen = {trial.x for trial in trials} | {self.family.space.max_levels}  # the dense model is no candidate
        proposals: list[Proposal] = []
        for x in self._members():
            if len(proposals) == q:
                break
            if x not in seen:
                seen.add(x)
                proposals.append(Proposal(x, "threshold"))
        return proposals

    def _members(self) -> Iterator[tuple[int, ...]]:
        low, high = float(self.family.shares[0]), float(self.family.shares[-1])
        yield self.family.at(low)
        for position in range(1, 8 * len(self.family.shares)):  # fine enough to meet every member
            yield self.family.at(low + (high - low) * _van_der_corput(position))


@dataclass(frozen=True)
class RandomProposer:
    """Random vectors with a random keep rate per candidate, so that all sizes come up.

    Each block's level is binomial around the candidate's rate; plain uniform vectors cluster around half size.
    """

    space: SearchSpace

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        generator = torch.Generator().manual_seed(seed)
        seen = {trial.x for trial in trials} | {self.space.max_levels}  # the dense model is no candidate
        levels = torch.tensor(self.space.max_levels)
        proposals: list[Proposal] = []
        for attempt in count():
            if len(proposals) == q or attempt > 1000 * q:
                return proposals
            rate = self.space.min_share + (1 - self.space.min_share) * torch.rand((), generator=generator)
            X = torch.stack([(torch.rand(int(n), generator=generator) < rate).sum() for n in levels]).double()
            x = tuple(X.int().tolist())
            if x not in seen and bool(self.space.legal(X[None])):
                seen.add(x)
                proposals.append(Proposal(x, "random"))
        raise AssertionError("unreachable")


def _van_der_corput(n: int) -> float:
    """The n-th element of the base-2 sequence 1/2, 1/4, 3/4, 1/8, .."""
    value, weight = 0.0, 0.5
    while n:
        value += weight * (n & 1)
        n >>= 1
        weight /= 2
    return value
