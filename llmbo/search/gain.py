"""Quality at equal size: what a trial gains over the threshold family at its own parameter share.

A point may land on the front by filling a gap and still lose to the family interpolated between its members, so gain
says what hypervolume hides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmbo.problem.interpolation import interpolated
from llmbo.problem.objectives import Objective
from llmbo.types import Trial

FAR = 3.0  # times what a smaller member loses: no path is so uneven, and no measurement of one so noisy
SLACK = 0.1  # of the quality's unit, added to both
EPSILON = 0.02  # nats; keeps the log from chasing differences near the dense model that no measurement resolves


def far_worse(excess: Tensor, smaller: Tensor) -> Tensor:
    """Whether members with this excess are broken, as smaller ones have only that; any equal shapes, at least 0."""
    return excess + SLACK > FAR * (smaller + SLACK)


@dataclass(frozen=True)
class FamilyCurve:
    """F(s): the threshold family's excess quality by share, log-linear between measured members."""

    shares: Tensor
    log_excess: Tensor

    @classmethod
    def through(cls, shares: Tensor, excess: Tensor) -> "FamilyCurve":
        """Fit measured members (`n` shares and excesses); the dense model's (1, 0) is added, and what is broken left out."""
        shares = torch.cat([shares, torch.ones(1, dtype=torch.float64)])
        excess = torch.cat([excess, torch.zeros(1, dtype=torch.float64)])
        order = shares.argsort()
        shares, excess = shares[order], excess[order].clamp_min(0)
        sound = ~far_worse(excess, excess.cummin(0).values)
        return cls(shares[sound], torch.log(excess[sound] + EPSILON))

    def __call__(self, share: Tensor) -> Tensor:
        """log (F(s) + eps) at any share, same shape."""
        return interpolated(self.shares, self.log_excess[:, None], share).squeeze(-1)


def trial_gains(trials: Sequence[Trial], quality: Objective, dense: Mapping[str, float]) -> dict[int, float]:
    """Gain in `quality`'s unit of every complete trial, by number; positive beats the family.

    Only where the family is known: between its smallest measured member and the dense model. Members gain 0 by
    definition, save where two share a size.

    Args:
        dense: The dense model's values by objective name.
    """
    complete = [trial for trial in trials if trial.complete]
    excess = torch.tensor(
        [quality.sign * (dense[quality.name] - trial.values[quality.name]) for trial in complete], dtype=torch.float64
    )
    shares = torch.tensor([trial.values["params_share"] for trial in complete], dtype=torch.float64)
    member = torch.tensor([trial.on_path for trial in complete], dtype=torch.bool)
    if not member.any():
        return {}
    curve = FamilyCurve.through(shares[member], excess[member])
    gain = (curve(shares).exp() - EPSILON) - excess
    known = shares >= shares[member].min()
    return {trial.number: float(gain[i]) for i, trial in enumerate(complete) if known[i]}
