"""A guard over width exchanges: where they have broken the allocation path, the search goes on along the path before them.

Exchanges rest on derivatives (`pruning.exchanges`), which may mislead for reasons that nobody has thought of. What was measured tells:
along a path quality falls with size. It is judged by trials alone, so that a resumed search decides like an uninterrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.search.gain import far_worse
from llmbo.types import Proposal, Proposer, Trial


@dataclass
class SoundPath:
    """Proposes along the path after width exchanges until one of its members turns out broken, then along the one before them.

    A member is broken that is far worse than a smaller one.

    Args:
        moved: The path after exchanges.
        plain: The path before them.
        quality: What members are judged by.
        dense: The dense model's values by objective name.
        build: The proposer that searches from a path.
        tell: Is told in one line, once, that the path has been left.
    """

    moved: ThresholdFamily
    plain: ThresholdFamily
    quality: Objective
    dense: Mapping[str, float]
    build: Callable[[ThresholdFamily], Proposer]
    tell: Callable[[str], None] = lambda line: None
    _proposer: Proposer = field(init=False, repr=False)
    _left: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self._proposer = self.build(self.moved)

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        if not self._left and (fault := self._fault(trials)):
            self._left, self._proposer = True, self.build(self.plain)
            self.tell(fault)
        return self._proposer.propose(trials, q, seed)

    def _fault(self, trials: Sequence[Trial]) -> str | None:
        """What is wrong with the path, for the user."""
        name, sign, space = self.quality.name, self.quality.sign, self.plain.space
        path = [trial for trial in trials if trial.complete and trial.on_path]
        shares = space.share(torch.tensor([trial.x for trial in path], dtype=torch.float64).view(-1, space.d))
        values = torch.tensor([trial.values[name] for trial in path], dtype=torch.float64)
        excess = (sign * (self.dense[name] - values)).clamp_min(0)
        before = {tuple(x) for x in self.plain.path.int().tolist()}
        for member in shares.argsort().tolist():
            smaller = excess.where(shares < shares[member], torch.inf)
            if path[member].x not in before and len(path) > 1 and bool(far_worse(excess[member], smaller.min())):
                other = int(smaller.argmin())
                found = (
                    f"at share {shares[at]:.2f} (trial {path[at].number}) {name} is {values[at]:.3g}"
                    for at in (member, other)
                )
                return (
                    f"Width exchanges have broken the allocation path: {', '.join(found)}. They are dropped, the search goes on "
                    "along the path before them."
                )
        return None


def on_sound_path(
    moved: ThresholdFamily,
    plain: ThresholdFamily,
    objectives: Sequence[Objective],
    dense: Mapping[str, float],
    build: Callable[[ThresholdFamily], Proposer],
    tell: Callable[[str], None],
) -> Proposer:
    """The proposer that searches from the path after width exchanges, watched over; alone where there were none."""
    if torch.equal(moved.path, plain.path):
        return build(moved)
    quality = next(objective for objective in objectives if not objective.known)
    return SoundPath(moved, plain, quality, dense, build, tell)
