"""`experiments.dropped_blocks`: what leave-one-out says is what leaving one out finds."""

import pytest
import torch
from torch import Tensor

from experiments.dropped_blocks import drawn, fit_twice, left_out
from llmbo.comparison.recorded import Recording, find_recorded


@pytest.fixture(scope="module")
def evaluations() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(Recording.read(find_recorded("problem-r-surrogate")), 24, seed=0, origin="qnehvi")


def test_each_row_is_predicted_from_the_others(evaluations: tuple[Tensor, Tensor, Tensor]) -> None:
    Z, gone, Y = evaluations
    model = fit_twice(Z, gone, Y)
    error, density = left_out(model)
    inputs, targets = model.train_inputs[0], model.train_targets
    errors, densities = [], []
    with torch.no_grad():
        noise = float(model.likelihood.noise)
        K, mean = model.covar_module(inputs).to_dense(), float(model.mean_module.constant)
        for row in range(len(targets)):
            others = torch.arange(len(targets)) != row
            weights = torch.linalg.solve(K[others][:, others] + noise * torch.eye(int(others.sum())), K[others, row])
            variance = K[row, row] + noise - weights @ K[others, row]
            errors.append(targets[row] - mean - weights @ (targets[others] - mean))
            densities.append(torch.distributions.Normal(0.0, variance.sqrt()).log_prob(errors[-1]))
    assert error == pytest.approx(float(torch.stack(errors).square().mean().sqrt() * Y.std()), rel=1e-4)
    assert density == pytest.approx(float(torch.stack(densities).mean()), rel=1e-4)


def test_an_indicator_tells_where_a_block_is_gone(evaluations: tuple[Tensor, Tensor, Tensor]) -> None:
    Z, gone, _ = evaluations
    assert torch.equal(gone > 0, Z[:, : gone.shape[1]] == 0) and 0 < (gone > 0).double().mean() < 0.5
