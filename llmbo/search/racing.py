"""Stop a candidate whose first windows already say that the front dominates it.

All candidates see the same windows in the same order, so differences to a rival of the front are paired, and far less noisy
than either's mean. A race is lost when no larger rival is better by more than chance explains:

    mean(d) > t_(alpha, m - 1) * sd(d) * sqrt((1/m) (1 - m/n)),     d_i = v_i - rival's v_i over the m of n windows seen

(Maron and Moore 1994, "Hoeffding races"; Student's t instead of Hoeffding's bound, with the finite-population correction, since
the final value is the mean over these n windows and nothing else.) The look at every checkpoint gets its share of ALPHA.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.stats import t as student
from torch import Tensor

from llmbo.problem.objectives import Objective, outcomes
from llmbo.problem.proxy import ProxyEvaluator
from llmbo.search.pareto import pareto_front
from llmbo.types import Measurement, Trial

ALPHA = 0.002  # chance that a candidate of the front is stopped, for windows whose differences are normal
MIN_WINDOWS = 4  # fewer tell no spread


def checkpoints(num_windows: int) -> list[int]:
    """Numbers of windows after which to look: every half as many again."""
    looks, seen = [], MIN_WINDOWS
    while seen < num_windows:
        looks.append(seen)
        seen += max(2, seen // 2)
    return looks


def estimate(values: Tensor, rival: Tensor) -> tuple[float, float]:
    """Mean over all windows as the first ones tell it, and its standard error; exact and 0 once all are seen.

    What windows have in common with the rival's cancels out: the estimate is the rival's mean plus the mean difference.

    Args:
        values: Of the first `m` windows, lower is better.
        rival: Of all `n` windows.
    """
    m, n = len(values), len(rival)
    d = values - rival[:m]
    return float(rival.mean() + d.mean()), float(d.std()) * math.sqrt((1 / m) * (1 - m / n))


def lost(values: Tensor, rival: Tensor) -> bool:
    """Whether the mean over all windows will be worse than the rival's."""
    mean, error = estimate(values, rival)
    level = 1 - ALPHA / max(1, len(checkpoints(len(rival))))
    return mean - float(rival.mean()) > float(student.ppf(level, len(values) - 1)) * error


@dataclass(frozen=True)
class RacingEvaluator:
    """Implements `types.Evaluator`. A rival's windows are what its trial has kept; one of an earlier version is measured again.

    Args:
        objectives: One of them is measured: `kl` or `loss`.
        trials: All trials so far.
    """

    proxy: ProxyEvaluator
    objectives: Sequence[Objective]
    trials: Callable[[], Sequence[Trial]]

    @property
    def at_once(self) -> int:
        """One: each may be the next one's rival."""
        return 1

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        """As `ProxyEvaluator`. A race that was lost also has the `tokens` it took and the standard `error` of its estimate."""
        return [self._race(x) for x in batch]

    def _race(self, x: tuple[int, ...]) -> Measurement:
        name = next(objective.name for objective in self.objectives if not objective.known)
        n = len(self.proxy.windows)
        rival = self._rival(x, name)
        found: dict[str, Tensor] = {}
        with self.proxy.supernet.active(self.proxy.space.decode(x)) as model:
            for first, last in pairwise((0, *(checkpoints(n) if rival else ()), n)):
                part = self.proxy.measure(model, first, last)
                found = {key: torch.cat([found[key], values]) for key, values in part.items()} if found else part
                if rival and last < n and lost(found[name], rival[name]):
                    means = {key: estimate(values, rival[key])[0] for key, values in found.items()}
                    error = estimate(found[name], rival[name])[1]
                    stopped = self.proxy.measured(x, found, means)
                    stopped.update(tokens=float(self.proxy.windows[:last].numel()), error=error)
                    return stopped
        return self.proxy.measured(x, found)

    def _rival(self, x: tuple[int, ...], name: str) -> dict[str, Tensor] | None:
        """Window values of the best front point that is no larger than `x` in any known objective."""
        complete = [trial for trial in self.trials() if trial.complete]
        front = [complete[index] for index in pareto_front(outcomes(complete, self.objectives))]
        point = torch.tensor([x], dtype=torch.float64)
        costs = {o.name: float(self.proxy.space.cost(o.name, point)) for o in self.objectives if o.known}
        smaller = [trial for trial in front if all(trial.values[key] <= cost for key, cost in costs.items())]
        if not smaller:
            return None
        best = min(smaller, key=lambda trial: (trial.values[name], trial.number))
        if best.windows:
            return {key: torch.tensor(values, dtype=torch.float64) for key, values in best.windows.items()}
        with self.proxy.supernet.active(self.proxy.space.decode(best.x)) as model:
            return self.proxy.measure(model, 0, len(self.proxy.windows))
