"""Should the surrogate be told which blocks are gone? Leave-one-out over recorded evaluations, with and without an indicator of each.

    python -m experiments.dropped_blocks --seeds 8
    python -m experiments.dropped_blocks --seeds 8 --origin qnehvi

Level 0 of a block is the low end of its scale for the search's Gaussian process. The second one adds a kernel over the indicators "this
block is gone", weighted as the levels are, with a lengthscale and a variance of its own: it can leave them out. A third one has that kernel
over the levels again, so that a second kernel as such is not what is judged. Every seed draws as many evaluations; hyperparameters are
fitted to all of them, and each is predicted from the others. Errors are in log (KL + 0.02), densities in nats for each evaluation;
intervals over the seeds are Student's.
"""

import argparse
import math

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms.outcome import Standardize
from gpytorch.kernels import RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import LogNormalPrior
from torch import Tensor

from llmbo.comparison.recorded import Recording, find_recorded
from llmbo.comparison.statistics import band
from llmbo.search.gain import FamilyCurve
from llmbo.search.posterior import PriorMean
from llmbo.search.surrogate import CHANGE, DISTANCE, SHARE, Features, expected_fall, fit_surrogate, gains, prior_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recorded", default="problem-r-surrogate")
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--origin", help="draw from what this one proposed first, e.g. qnehvi (any)")
    options = parser.parse_args()
    recording = Recording.read(find_recorded(options.recorded))
    found: list[list[tuple[float, float]]] = []
    print(
        "seed   a block gone   error: levels  indicators  levels twice   log density: levels  indicators  levels twice"
    )
    for seed in range(options.seeds):
        Z, gone, Y = drawn(recording, options.evaluations, seed, options.origin)
        d = gone.shape[1]
        models = [fit_surrogate(Z, Y, d), fit_twice(Z, gone, Y), fit_twice(Z, Z[:, :d], Y)]
        found.append([left_out(model) for model in models])
        errors, densities = zip(*found[-1], strict=True)
        share = float(gone.any(1).double().mean())
        cells = [f"{seed:4}{share:15.0%}{errors[0]:16.4f}{errors[1]:12.4f}{errors[2]:14.4f}"]
        print(*cells, f"{densities[0]:21.4f}{densities[1]:12.4f}{densities[2]:14.4f}", flush=True)
    for what, arm, other in (("indicators - levels", 1, 0), ("indicators - levels twice", 1, 2)):
        if len(found) > 1:
            gain = band([arms[arm][1] - arms[other][1] for arms in found])
            print(f"log density, {what}: {gain.mean:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})")


def drawn(recording: Recording, number: int, seed: int, origin: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of evaluations at random: features, weighted indicators of blocks that are gone, and gains in KL beyond what the path and its
    expansions expect."""
    X, kl = torch.tensor(recording.points, dtype=torch.float64), torch.from_numpy(recording.values["kl"])
    members = {tuple(map(int, x)) for x in recording.family.path.tolist()}
    on_path = torch.tensor([x in members for x in recording.points])
    curve = FamilyCurve.through(recording.space.share(X[on_path]), kl[on_path])
    among = torch.tensor([origin in (None, own) for own in recording.origins]).nonzero().squeeze(1)
    rows = among[torch.randperm(len(among), generator=torch.Generator().manual_seed(seed))[:number]]
    features, d = Features(recording.family), recording.space.d
    Z, weights = features(X[rows]), features(recording.space.bounds[1][None])[:, :d]
    log_excess = curve(Z[:, SHARE])
    fall = expected_fall(Z[:, CHANGE], log_excess)
    expected = PriorMean(curve, *prior_weights(fall, Z[:, DISTANCE], gains(kl[rows], log_excess, 0.0)))
    return Z, (X[rows] == 0) * weights, gains(kl[rows], expected(Z), 0.0).unsqueeze(-1)


def fit_twice(Z: Tensor, more: Tensor, Y: Tensor) -> SingleTaskGP:
    """As `fit_surrogate`, with a second kernel over `n x d` more features."""
    d, columns = more.shape[1], Z.shape[1]
    kernels = [
        ScaleKernel(
            RBFKernel(
                active_dims=tuple(range(start, start + d)),
                lengthscale_prior=LogNormalPrior(math.sqrt(2) + math.log(d) / 2, math.sqrt(3)),
            )
        )
        for start in (0, columns)
    ]
    plain = fit_surrogate(Z, Y, d)  # for its likelihood's priors
    likelihood = GaussianLikelihood(
        noise_prior=plain.likelihood.noise_covar.noise_prior,
        noise_constraint=plain.likelihood.noise_covar.raw_noise_constraint,
    )
    model = SingleTaskGP(
        torch.cat([Z, more], dim=1),
        Y,
        likelihood=likelihood,
        covar_module=kernels[0] + kernels[1],
        outcome_transform=Standardize(m=1),
    )
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model


@torch.no_grad()
def left_out(model: SingleTaskGP) -> tuple[float, float]:
    """Each row predicted from the others (Rasmussen and Williams, 5.4.2): root of the mean squared error, in the outcome's unit, and mean
    log density, of standardised outcomes."""
    model.train()  # the prior at the rows
    prior = model(*model.train_inputs)
    K = model.likelihood(prior).covariance_matrix
    inverse = torch.linalg.inv(K)
    variance = 1 / inverse.diagonal()
    error = inverse @ (model.train_targets - prior.mean) * variance
    density = torch.distributions.Normal(0.0, variance.sqrt()).log_prob(error)
    return float(error.square().mean().sqrt() * model.outcome_transform.stdvs.squeeze()), float(density.mean())


if __name__ == "__main__":
    main()
