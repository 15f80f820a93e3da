"""What the search believes about architectures it has not measured.

x: grid levels, `d`.   share(x): parameter share.   v: measured quality, smaller is better.   v0: the dense model's.
F(s): the threshold family's excess v - v0 at share s.

Size explains nearly all of v, and the family already says how. So the GP learns only the gain at equal size,

    gain(x) = log (F(share) + eps) + beta c(x) + kappa r(x) - log (v - v0 + eps)

    c(x) = log (1 + D(x) / (F(share) + eps))        D: what the family's expansions expect on top of it (`llmbo.problem.expansion`), nats
    r(x) = |e - S e|^2,  e = z(x) - z(family at share)     S: every layer with half of either neighbour, attention and MLPs apart,
                                                           or 0 where no c tells directions apart

over the features

    z_i = sqrt(I_i / mean I) x_i / max level                   I_i: Fisher importance of block i

which make equal steps matter about equally, so that one lengthscale serves all sixty dimensions. On 120 measured
architectures of SmolLM2 this ranked unseen ones better (Spearman 0.82) than unweighted levels (0.79), automatic
relevance determination (0.71), and deviations from the family smoothed along depth (0.62).

The gain is 0 on the family, and 0 on average elsewhere: c says what derivatives at pruned members let expect, and beyond that what
leaves the family unevenly along depth loses. beta and kappa say how much, and are regressed on what was measured. Without
kappa a search spends its first thirty evaluations on finding out. If all distance counted beside c, the search
would stay near the family though better models lie farther away: of five such searches of 200 evaluations only one came loose.
Among 2,266 measured architectures of SmolLM2 c alone ranks gains with Spearman 0.75.
"""

import math
from collections.abc import Sequence
from typing import Any

import gpytorch
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms.outcome import Standardize
from gpytorch.constraints import GreaterThan
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood, Likelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from llmbo.problem.depth import binomial_smoothed
from llmbo.problem.family import ThresholdFamily
from llmbo.search.gain import EPSILON

# feature columns that the GP does not look at, beside other costs
SHARE = -1  # parameter share
DISTANCE = -2  # r(x), from the path
CHANGE = -3  # KL expected on top of the family's at equal share

LOSS_BY_DISTANCE = 0.08  # prior kappa without c; SmolLM2: 0.04-0.06 of structured changes, 0.11 of random vectors
LOSS_BEYOND_EXPECTED = 0.04  # prior kappa with it
RIDGE = (0.01, 1.0)  # sums of squared c and r that the priors of beta and kappa are worth
FITTED_ROWS = 300  # that hyperparameters are fitted to, evenly over the trials: time grows with their cube. Predictions look at all
LARGEST_FALL = 0.3  # of the excess, to which expansions may let it fall: they are good for small steps only


class Features:
    """Points -> what the GP sees (`d` weighted levels), known costs as shares of the dense model's, and the columns named above.

    Args:
        costs: Names of known costs.
    """

    def __init__(self, family: ThresholdFamily, costs: Sequence[str] = ()) -> None:
        self.family, self.space = family, family.space
        self.dense = {name: float(self.space.cost(name, self.space.bounds[1])) for name in costs}
        self._scale = (family.importance / family.importance.mean()).sqrt() / family.space.bounds[1]

    def __call__(self, X: Tensor) -> Tensor:
        """`n x d` levels -> `n x (d + costs + 3)` features."""
        costs = [self.space.cost(name, X) / dense for name, dense in self.dense.items()]
        share = self.space.share(X)
        deviation = (X - self.family.profile(share)) * self._scale
        counted = deviation if self.family.expansions is None else _uneven(deviation)
        columns = (*costs, self.family.expected_change(X, share), counted.square().sum(-1), share)
        return torch.cat([X * self._scale, *(column.unsqueeze(-1) for column in columns)], dim=-1)

    def in_levels(self, length: Tensor) -> Tensor:
        """How many levels of each block are a length among weighted levels, `d`."""
        return length / self._scale

    def column(self, cost: str) -> int:
        """Where a known cost stands."""
        return self.space.d + list(self.dense).index(cost)


def _uneven(deviation: Tensor) -> Tensor:
    """e - S e of `n x d` deviations, a value for each layer's attention and then for each MLP: what neighbours do not share."""
    profiles = deviation.unflatten(-1, (2, -1))
    return (profiles - binomial_smoothed(profiles)).flatten(-2)


def gains(values: Tensor, expected: Tensor, dense: float) -> Tensor:
    """gain(x) of `n` measured qualities over the `n` log excesses expected there."""
    return expected - torch.log((values - dense).clamp_min(0) + EPSILON)


def quality_from_gain(gain: Tensor, expected: Tensor, dense: float) -> Tensor:
    """Inverse of `gains`."""
    return dense + torch.exp(expected - gain) - EPSILON


def expected_fall(change: Tensor, log_excess: Tensor) -> Tensor:
    """-c(x) of `n` expected changes (nats) where the family's log excess is `log_excess`: the gain they let expect."""
    return -torch.log((1 + change / log_excess.exp()).clamp_min(LARGEST_FALL))


def prior_weights(fall: Tensor | None, distance: Tensor, gain: Tensor) -> tuple[float, float]:
    """beta and kappa: ridge regression towards their priors, since the first proposals are made before anything but the path is measured.

    Args:
        fall: `n` gains that the expansions let expect; None where there are none, and beta is 0.
        distance: `n` values of r.
        gain: `n` gains over the family at equal share.
    """
    prior = torch.tensor([0.0, LOSS_BY_DISTANCE] if fall is None else [1.0, LOSS_BEYOND_EXPECTED], dtype=torch.float64)
    ridge = torch.tensor(RIDGE, dtype=torch.float64)
    A = torch.stack([torch.zeros_like(distance) if fall is None else fall, -distance], dim=-1)
    found = torch.linalg.solve(A.T @ A + ridge.diag(), A.T @ gain + ridge * prior).clamp_min(0)
    return float(found[0]), float(found[1])


def fit_surrogate(train_Z: Tensor, train_Y: Tensor, d: int, train_Yvar: Tensor | None = None) -> SingleTaskGP:
    """Fit the GP of gains: RBF kernel, the lengthscale prior scaled with dimension (Hvarfner et al. 2024, arXiv:2402.02229).

    Args:
        train_Z: `n x (d + costs + 3)` features.
        train_Y: `n x 1` gains.
        d: Columns that the GP looks at.
        train_Yvar: `n` variances of gains that are estimates; whatever noise all measurements share is learnt on top.
    """
    kernel = RBFKernel(
        active_dims=tuple(range(d)), lengthscale_prior=LogNormalPrior(math.sqrt(2) + math.log(d) / 2, math.sqrt(3))
    )
    prior: dict[str, Any] = {"noise_prior": LogNormalPrior(-4.0, 1.0), "noise_constraint": GreaterThan(1e-4)}
    if train_Yvar is None:
        likelihood: Likelihood = GaussianLikelihood(**prior)
    else:  # in the units of the standardised outcome
        fixed = (train_Yvar / train_Y.var()).clamp_min(1e-6)
        with gpytorch.settings.min_fixed_noise(double_value=1e-6):
            likelihood = FixedNoiseGaussianLikelihood(fixed, learn_additional_noise=True, **prior)
    model = SingleTaskGP(
        train_Z, train_Y, likelihood=likelihood, covar_module=ScaleKernel(kernel), outcome_transform=Standardize(m=1)
    )
    likelihood_of_gains = ExactMarginalLogLikelihood(model.likelihood, model)
    if len(train_Z) <= FITTED_ROWS or train_Yvar is not None:  # a fixed noise belongs to its row
        fit_gpytorch_mll(likelihood_of_gains)
        return model
    inputs: Tensor
    (inputs,), targets = model.train_inputs, model.train_targets
    rows = torch.linspace(0, len(inputs) - 1, FITTED_ROWS).long()
    model.set_train_data(inputs[rows], targets[rows], strict=False)  # type: ignore[operator]
    fit_gpytorch_mll(likelihood_of_gains)
    model.set_train_data(inputs, targets, strict=False)  # type: ignore[operator]
    return model
