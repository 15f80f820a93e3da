"""What every proposer must keep (`types.Proposer`), checked where a third party's proposer must not spoil a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint

import torch

from llmbo.config.plugins import failure
from llmbo.errors import StrategyError
from llmbo.problem.space import SearchSpace
from llmbo.types import Proposal, Proposer, Trial


def broken_rule(proposals: Sequence[Proposal], trials: Sequence[Trial], q: int, space: SearchSpace) -> str | None:
    """What is wrong with the proposals of a round, or None."""
    points = [proposal.x for proposal in proposals]
    if len(points) > q:
        return f"{len(points)} candidates where {q} were asked for"
    if any(len(x) != space.d or any(type(level) is not int for level in x) for x in points):
        return f"a candidate that is no tuple of {space.d} whole numbers"
    if len(set(points)) < len(points):
        return "the same candidate twice"
    if not set(points).isdisjoint(trial.x for trial in trials):
        return "a candidate that it has evaluated before"
    if not bool(space.legal(torch.tensor(points, dtype=torch.float64).view(len(points), space.d)).all()):
        return "an illegal candidate"
    return None


@dataclass(frozen=True)
class PluginProposer:
    """A third party's proposer. Its faults end a search in one line that names it; everything measured is stored by then."""

    point: EntryPoint
    proposer: Proposer
    space: SearchSpace

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        try:
            proposals = list(self.proposer.propose(trials, q, seed))
            fault = broken_rule(proposals, trials, q, self.space)
        except Exception as error:
            raise StrategyError(f"{failure('strategy', self.point, error)} {_kept(trials)}") from error
        if fault:
            raise StrategyError(
                f"The strategy '{self.point.name}' ({self.point.value}) proposed {fault}. {_kept(trials)}"
            )
        return proposals


def _kept(trials: Sequence[Trial]) -> str:
    return f"The {len(trials)} evaluations so far are kept: once it is mended, the same command goes on from them."
