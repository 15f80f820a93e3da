"""Local search on the front: small random moves of its points, and nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.problem.objectives import Objective, outcomes
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import attempts, fresh, topped_up
from llmbo.search.pareto import pareto_front
from llmbo.types import Proposal, Trial

MAX_MOVES = 3


@dataclass(frozen=True)
class LocalSearchProposer:
    """One to three moves away from a random front point; a move changes a level, or exchanges one between two blocks."""

    space: SearchSpace
    objectives: Sequence[Objective]

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        complete = [trial for trial in trials if trial.complete]
        front = pareto_front(outcomes(complete, self.objectives)) or range(len(complete))  # while none keeps the limits
        points = torch.tensor([complete[index].x for index in front])
        found = fresh(self._neighbours(points, q, seed), trials, q, self.space, "local-search")
        return topped_up(found, trials, q, self.space, seed)

    def _neighbours(self, points: Tensor, q: int, seed: int) -> Iterator[tuple[int, ...]]:
        generator = torch.Generator().manual_seed(seed)

        def pick(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        for _ in range(attempts(q)):
            x = points[pick(len(points))].clone()
            for _ in range(1 + pick(MAX_MOVES)):
                step = 2 * pick(2) - 1
                x[pick(self.space.d)] += step
                if pick(2):
                    x[pick(self.space.d)] -= step
            yield tuple(x.tolist())
