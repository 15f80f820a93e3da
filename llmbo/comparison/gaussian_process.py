"""The Gaussian process behind a recorded benchmark: building, fitting, saving and exact prediction of a `SingleTaskGP`.

    k(x, x') = a^2 M(|x - x'| / l) + b^2 (x.x' + c), learnt mean and noise        M: Matérn of smoothness 5/2

The linear part extrapolates. Everything is float64, of standardised targets.
"""

from collections.abc import Mapping

import gpytorch
import numpy as np
import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.kernels import MaternKernel, PolynomialKernel, ScaleKernel
from gpytorch.mlls import ExactMarginalLogLikelihood
from numpy.typing import NDArray
from torch import Tensor

OPTIONS = {"ftol": 1e-13, "gtol": 1e-6, "maxiter": 200}  # SciPy's L-BFGS-B


def gaussian_process(train_X: Tensor, train_Y: Tensor) -> SingleTaskGP:
    """An unfitted process on `n x d` inputs and `n x 1` targets."""
    # not `LinearKernel`: the sum would decompose its low-rank root, six times the work of all else
    kernel = ScaleKernel(MaternKernel(nu=2.5)) + ScaleKernel(PolynomialKernel(power=1))
    return SingleTaskGP(train_X, train_Y, covar_module=kernel)


def fit_gaussian_process(process: SingleTaskGP) -> SingleTaskGP:
    """Hyperparameters of the greatest marginal likelihood, under BoTorch's prior of the noise."""
    likelihood = ExactMarginalLogLikelihood(process.likelihood, process)
    # the default stops at once where the likelihood rises slowly: mean, linear part and length scale can stand in for each other
    fit_gpytorch_mll(likelihood, optimizer_kwargs={"options": OPTIONS})
    return process


def hyperparameters_of(process: gpytorch.Module) -> dict[str, float]:
    """Values by GPyTorch's names."""
    return {
        name.replace("raw_", ""): (parameter if constraint is None else constraint.transform(parameter)).item()
        for name, parameter, constraint in process.named_parameters_and_constraints()
    }


def with_hyperparameters(process: SingleTaskGP, values: Mapping[str, float]) -> SingleTaskGP:
    """The process, ready to predict.

    Raises:
        ValueError: A hyperparameter is missing, unknown, or out of its range.
    """
    expected = hyperparameters_of(process)
    if values.keys() != expected.keys():
        raise ValueError(f"hyperparameters: expected {', '.join(expected)}, got {', '.join(values)}")
    for name, value in values.items():
        try:
            gpytorch.Module.initialize(process, **{name: torch.tensor(value, dtype=torch.float64)})
            taken = all(parameter.isfinite() for parameter in process.parameters())
        except (RuntimeError, TypeError, ValueError):
            taken = False
        if not taken:
            raise ValueError(f"hyperparameter {name}: expected a number in its range, got {value!r}")
    process.eval()
    return process


def posterior_mean(process: SingleTaskGP, X: Tensor) -> NDArray[np.float64]:
    """`n` posterior means at `n x d` inputs, by Cholesky factors: importing BoTorch turns GPyTorch's approximate solves off."""
    with torch.no_grad(), gpytorch.settings.skip_posterior_variances():
        return np.asarray(process.posterior(X).mean.squeeze(-1))
