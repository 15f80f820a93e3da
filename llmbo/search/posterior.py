"""What the fitted surrogate says in the objectives' terms: costs that are known exactly beside costs that a GP has learnt.

Assumes maximisation, as BoTorch does; `objectives.to_maximize` fixed the signs. Known costs are exact functions of the architecture
and enter as deterministic models (Daulton et al. 2021, arXiv:2105.08195); only what is measured has a GP. Limits on what is measured
and no objective are outcome constraints (Gardner et al. 2014).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.models import ModelList, SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import Model
from botorch.posteriors.torch import TorchPosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from torch import Tensor

from llmbo.problem.objectives import Objective, ref_point
from llmbo.search.gain import EPSILON, FamilyCurve
from llmbo.search.logei import qLogNoisyExpectedHypervolumeImprovement
from llmbo.search.pool import levels_of
from llmbo.search.surrogate import (
    CHANGE,
    DISTANCE,
    SHARE,
    Features,
    expected_fall,
    fit_surrogate,
    gains,
    prior_weights,
    quality_from_gain,
)
from llmbo.types import Trial

MC_SAMPLES = 64
CHUNK = 256  # candidates in one posterior: it holds their joint covariance

OF_EXPANSIONS = ("kl", "loss")  # what they speak of: KL, and what is in its unit and rises with it

AcquisitionValue = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PriorMean:
    """Log excess of the path at the points' shares, what its expansions expect, and what points away from it lose beyond that."""

    curve: FamilyCurve
    beta: float
    kappa: float

    def __call__(self, Z: Tensor) -> Tensor:
        path = self.curve(Z[..., SHARE])
        return path - self.beta * expected_fall(Z[..., CHANGE], path) + self.kappa * Z[..., DISTANCE]


@dataclass(frozen=True)
class KnownObjective:
    """An objective that is `scale` times a feature column, exactly."""

    column: int
    scale: float

    def mean(self, Z: Tensor) -> Tensor:
        return self.scale * Z[..., self.column]

    def above(self, Z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """How far each of `n` points reaches into each of `k` intervals, `n x k`."""
        return (torch.minimum(self.mean(Z)[:, None], upper) - lower).clamp_min(0)


@dataclass(frozen=True)
class MeasuredObjective:
    """An objective whose cost (its negative) is log-normal: cost - dense + eps = exp(expected - gain), gain from a GP."""

    gp: SingleTaskGP
    expected: PriorMean
    dense: float

    def from_gain(self, gain: Tensor, Z: Tensor) -> Tensor:
        return -quality_from_gain(gain, self.expected(Z).expand_as(gain), self.dense)

    @torch.no_grad()
    def mean(self, Z: Tensor) -> Tensor:
        return self.from_gain(self.gp.posterior(Z).mean.squeeze(-1), Z)

    @torch.no_grad()
    def log_excess(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of log(cost - dense + eps), `n` each."""
        posteriors = [self.gp.posterior(chunk) for chunk in Z.split(CHUNK)]
        mean = self.expected(Z) - torch.cat([posterior.mean.squeeze(-1) for posterior in posteriors])
        variance = torch.cat([posterior.variance.squeeze(-1) for posterior in posteriors])
        return mean, variance.clamp_min(1e-12).sqrt()

    def above(self, Z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Expected reach into each of `k` intervals, `n x k`: a difference of put options (Black and Scholes)."""
        mean, deviation = self.log_excess(Z)
        bounds = torch.cat([lower, upper])
        strikes, column = bounds.unique(return_inverse=True)  # neighbouring cells share their walls
        strike = -strikes - self.dense + EPSILON
        d2 = (strike.clamp_min(1e-12).log() - mean[:, None]) / deviation[:, None]
        expected = (mean + deviation**2 / 2).exp()[:, None]
        put = strike.clamp_min(0) * torch.special.ndtr(d2) - expected * torch.special.ndtr(d2 - deviation[:, None])
        put = torch.where(strike > 0, put, 0.0).clamp_min(0)[:, column]
        return (put[:, : len(lower)] - put[:, len(lower) :]).clamp_min(0)

    def log_limit(self, limit: float) -> float:
        """Where `log_excess` stands when the cost is just `limit`."""
        return math.log(max(limit - self.dense + EPSILON, 1e-12))

    def needed_gain(self, Z: Tensor, limit: float) -> Tensor:
        """The gain at which the cost is just `limit`, of the shape of a point's share."""
        return self.expected(Z) - self.log_limit(limit)

    def below(self, Z: Tensor, limit: float) -> Tensor:
        """Probability that the cost keeps a limit, `n`."""
        mean, deviation = self.log_excess(Z)
        return torch.special.ndtr((self.log_limit(limit) - mean) / deviation)


@dataclass(frozen=True)
class ObjectivesPosterior:
    """What is believed of all objectives, and how much a candidate may gain.

    Args:
        objectives: In the order of the objectives.
        limits: Outcome constraints: what is believed of a measured cost, and its largest allowed value.
        ref_point: For maximisation, `m`.
    """

    features: Features
    objectives: tuple[KnownObjective | MeasuredObjective, ...]
    limits: tuple[tuple[MeasuredObjective, float], ...]
    ref_point: Tensor

    @classmethod
    def fit(
        cls,
        features: Features,
        objectives: Sequence[Objective],
        dense: Mapping[str, float],
        limits: Mapping[str, float],
        complete: Sequence[Trial],
    ) -> "ObjectivesPosterior":
        """Learn from complete trials, one GP for each measured objective and each limit that is none.

        Args:
            dense: The dense model's values by objective name.
            limits: Largest allowed values of what is measured.
        """
        family = features.family
        train_Z = features(levels_of(complete, family.space.d))
        on_path = torch.tensor([trial.on_path for trial in complete])
        errors = torch.tensor([trial.values.get("error", 0.0) for trial in complete], dtype=torch.float64)

        def measured(name: str, sign: float) -> MeasuredObjective:
            costs = -sign * torch.tensor([trial.values[name] for trial in complete], dtype=torch.float64)
            shares, least = train_Z[:, SHARE], -sign * dense[name]
            curve = FamilyCurve.through(shares[on_path], costs[on_path] - least)
            speaks = family.expansions is not None and name in OF_EXPANSIONS
            fall = expected_fall(train_Z[:, CHANGE], curve(shares)) if speaks else None
            weights = prior_weights(fall, train_Z[:, DISTANCE], gains(costs, curve(shares), least))
            expected = PriorMean(curve, *weights)
            train_Y = gains(costs, expected(train_Z), least).unsqueeze(-1)
            variance = (errors / ((costs - least).clamp_min(0) + EPSILON)) ** 2 if errors.any() else None
            return MeasuredObjective(fit_surrogate(train_Z, train_Y, family.space.d, variance), expected, least)

        found = tuple(
            KnownObjective(features.column(objective.name), objective.sign * features.dense[objective.name])
            if objective.known
            else measured(objective.name, objective.sign)
            for objective in objectives
        )
        names = {objective.name for objective in objectives}  # their limits bound the reference point already
        others = tuple((measured(name, -1.0), limit) for name, limit in sorted(limits.items()) if name not in names)
        return cls(features, found, others, ref_point(objectives))

    def expected_improvement(self, X_front: Tensor) -> AcquisitionValue:
        """Closed-form expected gain in hypervolume over `X_front`, whose measured values are taken at their posterior mean.

        The undominated space is cut into cells; objectives are independent given the point, so the gain in a cell is the
        product of the expected reach into it along each objective (Emmerich et al. 2006; Yang et al. 2019).
        """
        Z_front = self.features(X_front)
        front = torch.stack([objective.mean(Z_front) for objective in self.objectives], dim=-1)
        lower, upper = FastNondominatedPartitioning(self.ref_point, front).hypercell_bounds

        def value(X: Tensor) -> Tensor:
            Z = self.features(X)
            gain = torch.ones(len(X), lower.shape[0], dtype=torch.float64)
            for column, objective in enumerate(self.objectives):
                gain = gain * objective.above(Z, lower[:, column], upper[:, column])
            gain = gain.sum(-1)
            for measured, limit in self.limits:
                gain = gain * measured.below(Z, limit)
            return gain

        return value

    @property
    def quality(self) -> MeasuredObjective:
        """The first measured objective."""
        return next(objective for objective in self.objectives if isinstance(objective, MeasuredObjective))

    def predicted_gains(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the first measured objective's gain over the path at equal share, in its unit, `n` each.

        What is measured of it afterwards is `gain.trial_gains`.
        """
        Z = self.features(X)
        mean, deviation = self.quality.log_excess(Z)
        excess = (mean + deviation**2 / 2).exp()  # of a log-normal variable
        return self.quality.expected.curve(Z[:, SHARE]).exp() - excess, excess * deviation.square().expm1().sqrt()

    @property
    def reach(self) -> Tensor:
        """Levels that one block alone must change for the correlation to fall to exp(-1/2), `d`."""
        kernel: Any = self.quality.gp.covar_module
        return self.features.in_levels(kernel.base_kernel.lengthscale.detach().double().squeeze())

    def log_nehvi(self, X: Tensor, X_baseline: Tensor, X_pending: Tensor) -> Tensor:
        """qLogNEHVI of each of `n` candidates beyond the front and the pending points, `n` (Ament et al. 2023, arXiv:2310.20708)."""
        outputs: list[Model] = [
            objective.gp if isinstance(objective, MeasuredObjective) else _deterministic(objective.mean)
            for objective in self.objectives
        ]
        constraints: list[Callable[[Tensor], Tensor]] = []
        for measured, limit in self.limits:
            # the gain that keeps a limit depends on the size: an output of its own, since constraints see outputs only
            constraints.append(partial(_shortfall, column=len(outputs)))
            outputs += [measured.gp, _deterministic(partial(measured.needed_gain, limit=limit))]
        model = ModelList(*outputs)
        Z_baseline = self.features(X_baseline)
        acq_function = qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=self.ref_point,
            X_baseline=Z_baseline,
            sampler=get_sampler(
                cast(TorchPosterior, model.posterior(Z_baseline[:1])), torch.Size([MC_SAMPLES]), seed=0
            ),
            objective=GenericMCMultiOutputObjective(self._outcome),
            constraints=constraints or None,
            X_pending=self.features(X_pending) if len(X_pending) else None,
            cache_root=False,  # there is no joint root with a deterministic model
        )
        with torch.no_grad():
            return acq_function(self.features(X).unsqueeze(1))

    def _outcome(self, samples: Tensor, X: Tensor | None = None) -> Tensor:
        """Samples of gains and costs -> samples of the objectives, in their order."""
        assert X is not None
        columns = [
            objective.from_gain(samples[..., column], X)
            if isinstance(objective, MeasuredObjective)
            else samples[..., column]
            for column, objective in enumerate(self.objectives)
        ]
        return torch.stack(columns, dim=-1)


def _deterministic(f: Callable[[Tensor], Tensor]) -> Model:
    return GenericDeterministicModel(lambda Z: f(Z).unsqueeze(-1))


def _shortfall(samples: Tensor, column: int) -> Tensor:
    """How far the gain in `column` falls short of the one needed, next to it; BoTorch calls it feasible where negative."""
    return samples[..., column + 1] - samples[..., column]
