"""Which members learn between the smallest and the dense model: arms of the comparison beside the default, by name."""

import torch

from llmbo.problem.preparation import Problem
from llmbo.search.baselines.designs import RandomProposer
from llmbo.training.elastic import Draw, on_path


def smaller(problem: Problem, generator: torch.Generator) -> tuple[int, ...]:
    """A member of the allocation path, the square of a uniform number's part of the way to the dense model: half of them are in its first
    quarter."""
    return problem.family.part_way(float(torch.rand((), generator=generator, dtype=torch.float64)) ** 2)


def anything(problem: Problem, generator: torch.Generator) -> tuple[int, ...]:
    """Any allocation, of any size, as the random search has them."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return RandomProposer(problem.space).propose([], 1, seed)[0].x


DRAWS: dict[str, Draw] = {"elastic": on_path, "elastic-small": smaller, "elastic-random": anything}
