"""Block scores and a knapsack, in the manner of Puzzle (Bercovich et al. 2024, arXiv:2411.19146).

s_b(l): what block b at level l costs in quality, the rest of the model being dense.   c_b(l): its share of the parameters.

    minimise sum_b s_b(l_b)   so that   sum_b c_b(l_b) <= budget

is solved exactly by HiGHS for ever more budgets. It takes for granted that block errors add up, which they do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import LinearConstraint

from llmbo.errors import ConfigError
from llmbo.problem.knapsack import cheapest
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import fresh, van_der_corput
from llmbo.types import Proposal, Trial

FRACTIONS = (0.5,)  # of a block's levels; Puzzle probes every width, which costs more than most budgets here hold
GROWTH = 2.0  # exponent of a score in the removed fraction, where one probe must do: errors grow with its square
MAX_BUDGETS = 64  # tried in one proposal before saying that nothing is left


@dataclass(frozen=True)
class KnapsackProposer:
    """First single-block probes (trials like any other, origin "probe"), then optimal sums of scores. It ignores the seed.

    Args:
        dense: The dense model's values by objective name.
        fractions: Levels at which every block is probed.
    """

    space: SearchSpace
    objectives: Sequence[Objective]
    dense: dict[str, float]
    fractions: tuple[float, ...] = FRACTIONS

    def __post_init__(self) -> None:
        if not self.fractions or not all(0 <= fraction < 1 for fraction in self.fractions):
            raise ConfigError(f"The fractions of knapsack must lie between 0 and 1, got {list(self.fractions)}.")

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        probes = self._probes()
        proposals = fresh(probes, trials, q, self.space, "probe")
        if proposals:
            return proposals
        scores, costs = self._scores({trial.x: trial for trial in trials if trial.complete}), self._costs()
        seen = [self.space.max_levels, *(trial.x for trial in trials)]
        while len(proposals) < q:
            x = self._next(scores, costs, seen, sum(x not in probes for x in seen))
            if x is None:
                break
            seen.append(x)
            proposals.append(Proposal(x, "knapsack"))
        return proposals

    def _probes(self) -> dict[tuple[int, ...], tuple[int, int]]:
        """Point -> block and level."""
        dense, probes = self.space.max_levels, {}
        for fraction in self.fractions:
            for block, top in enumerate(dense):
                level = int(fraction * top)
                probes[(*dense[:block], level, *dense[block + 1 :])] = (block, level)
        return probes

    def _scores(self, measured: dict[tuple[int, ...], Trial]) -> list[np.ndarray]:
        """s_b at every level of every block: a power law through the dense model, linear between probes."""
        quality = next(objective for objective in self.objectives if not objective.known)
        known: list[dict[int, float]] = [{top: 0.0} for top in self.space.max_levels]
        for x, (block, level) in self._probes().items():
            if x in measured:
                excess = quality.sign * (self.dense[quality.name] - measured[x].values[quality.name])
                known[block][level] = max(0.0, excess)
        typical = float(np.median([score for block in known for score in block.values() if score > 0] or [1.0]))
        return [self._curve(block, top, typical) for block, top in zip(known, self.space.max_levels, strict=True)]

    def _curve(self, known: dict[int, float], top: int, typical: float) -> np.ndarray:
        levels = np.arange(top + 1)
        removed = (1 - levels / top) ** GROWTH
        points = known if len(known) > 1 else {**known, 0: typical}  # its probe has failed
        at, scores = zip(*sorted(((1 - level / top) ** GROWTH, score) for level, score in points.items()), strict=True)
        beyond = scores[-1] / at[-1] * removed
        return np.where(removed > at[-1], beyond, np.interp(removed, at, scores))

    def _costs(self) -> list[np.ndarray]:
        """c_b at every level; shares add up over blocks exactly."""
        dense = torch.tensor(self.space.max_levels, dtype=torch.float64)
        costs = []
        for block, top in enumerate(self.space.max_levels):
            X = dense.repeat(top + 1, 1)
            X[:, block] = torch.arange(top + 1)
            share = self.space.share(X).numpy()
            costs.append(share - share[0])
        return costs

    def _next(
        self, scores: list[np.ndarray], costs: list[np.ndarray], seen: list[tuple[int, ...]], position: int
    ) -> tuple[int, ...] | None:
        """The optimum for the next budget that has one not seen yet."""
        largest = self.space.limits.get("params_share", 1.0)
        for offset, place in enumerate(van_der_corput(MAX_BUDGETS, position)):
            budget = largest if offset == MAX_BUDGETS - 1 else largest - (largest - self.space.min_share) * place
            x = self._solve(scores, costs, seen, budget)
            if x is not None:
                return x
        return None

    def _solve(
        self, scores: list[np.ndarray], costs: list[np.ndarray], seen: list[tuple[int, ...]], budget: float
    ) -> tuple[int, ...] | None:
        starts = np.cumsum([0, *map(len, scores[:-1])])
        taken = np.zeros((len(seen), sum(map(len, scores))))
        for row, x in zip(taken, seen, strict=True):
            row[starts + np.array(x)] = 1
        attention = [(np.arange(len(s)) > 0) & (block < self.space.num_layers) for block, s in enumerate(scores)]
        also = [
            LinearConstraint(taken, -np.inf, len(scores) - 1),
            LinearConstraint(np.concatenate(attention)[None].astype(float), 1, np.inf),
        ]
        x = tuple(cheapest(scores, costs, self.space.min_share, budget, also) or ())
        if not x:
            return None
        legal = bool(self.space.legal(torch.tensor([x], dtype=torch.float64)))
        return x if legal and x not in seen else None
