"""qLogNEHVI as BoTorch's tutorials use it: a GP for every objective, levels relaxed to real numbers and rounded.

It knows nothing about decoders: no threshold family, no weighting of blocks, parameters modelled like any measurement.
Daulton et al. 2021 (arXiv:2105.08195), Ament et al. 2023 (arXiv:2310.20708).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models.gp_regression import SingleTaskGP
from botorch.models.model_list_gp_regression import ModelListGP
from botorch.models.transforms import Normalize, Standardize
from botorch.optim.optimize import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.mlls import SumMarginalLogLikelihood
from torch import Tensor

from llmbo.problem.objectives import Objective, ref_point, to_maximize
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines.designs import RandomProposer, fresh, topped_up
from llmbo.search.logei import qLogNoisyExpectedHypervolumeImprovement
from llmbo.search.threads import one_thread
from llmbo.types import Proposal, Trial, TrialState

NUM_RANDOM = 64  # candidates to fall back on where rounding leads to an illegal or known point


@dataclass(frozen=True)
class PlainBotorchProposer:
    """Sequentially greedy batches, each point with those before it pending."""

    space: SearchSpace
    objectives: Sequence[Objective]
    num_restarts: int = 4
    raw_samples: int = 64
    mc_samples: int = 64
    maxiter: int = 40

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        with one_thread(), torch.random.fork_rng(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fits and restarts that BoTorch repeats by itself
            torch.manual_seed(seed)
            model, train_X = self._fitted([trial for trial in trials if trial.complete])
            running = [trial.x for trial in trials if trial.state is TrialState.RUNNING]
            proposals: list[Proposal] = []
            while len(proposals) < q:
                pending = [*running, *(proposal.x for proposal in proposals)]
                acq_function = self._acquisition(model, train_X, pending)
                asked = [*trials, *self._as_running(proposals, len(trials))]
                found = fresh(self._best(acq_function, asked, seed), asked, 1, self.space, "botorch")
                if not found:
                    break
                proposals += found
        return topped_up(proposals, trials, q, self.space, seed)

    def _fitted(self, complete: Sequence[Trial]) -> tuple[ModelListGP, Tensor]:
        train_X = torch.tensor([trial.x for trial in complete], dtype=torch.float64)
        train_Y = to_maximize([trial.values for trial in complete], self.objectives)
        model = ModelListGP(
            *(
                SingleTaskGP(
                    train_X,
                    column.unsqueeze(-1),
                    input_transform=Normalize(self.space.d, bounds=self.space.bounds),
                    outcome_transform=Standardize(m=1),
                )
                for column in train_Y.T
            )
        )
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        return model, train_X

    def _acquisition(
        self, model: ModelListGP, train_X: Tensor, pending: Sequence[tuple[int, ...]]
    ) -> qLogNoisyExpectedHypervolumeImprovement:
        return qLogNoisyExpectedHypervolumeImprovement(
            model=model,
            ref_point=ref_point(self.objectives),
            X_baseline=train_X,
            prune_baseline=True,
            sampler=SobolQMCNormalSampler(torch.Size([self.mc_samples]), seed=0),
            X_pending=torch.tensor(pending, dtype=torch.float64) if pending else None,
        )

    def _best(
        self, acq_function: qLogNoisyExpectedHypervolumeImprovement, trials: Sequence[Trial], seed: int
    ) -> Iterator[tuple[int, ...]]:
        """The rounded optimum, then random legal points, the best of them first."""
        candidate, _ = optimize_acqf(
            acq_function,
            bounds=self.space.bounds,
            q=1,
            num_restarts=self.num_restarts,
            raw_samples=self.raw_samples,
            options={"maxiter": self.maxiter},
        )
        yield tuple(int(level) for level in candidate.round().flatten().tolist())
        others = [proposal.x for proposal in RandomProposer(self.space).propose(trials, NUM_RANDOM, seed)]
        if others:
            with torch.no_grad():
                values = acq_function(torch.tensor(others, dtype=torch.float64).unsqueeze(1))
            yield from (others[index] for index in values.argsort(descending=True).tolist())

    def _as_running(self, proposals: Sequence[Proposal], first: int) -> list[Trial]:
        return [
            Trial(first + n, 0, p.x, p.origin, TrialState.RUNNING, source=p.source) for n, p in enumerate(proposals)
        ]
