"""Choose q points by qLogNEHVI over a discrete pool around the front, then improve each by local search.

Assumes maximisation inside BoTorch; `objectives.to_maximize` fixed the signs. Costs are exact functions of the
architecture and enter as deterministic models (Daulton et al. 2021, arXiv:2105.08195; Ament et al. 2023,
arXiv:2310.20708); only what is measured has a GP. Limits on costs are kept by every point of the pool (`SearchSpace.legal`);
limits on objectives bound the reference point; other measured limits are outcome constraints (Gardner et al. 2014).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from botorch.acquisition.multi_objective import logei
from botorch.acquisition.multi_objective.objective import GenericMCMultiOutputObjective
from botorch.models import ModelList, SingleTaskGP
from botorch.models.deterministic import GenericDeterministicModel
from botorch.models.model import Model
from botorch.posteriors.torch import TorchPosterior
from botorch.sampling.get_sampler import get_sampler
from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
from torch import Tensor

from llmbo.problem.family import ThresholdFamily, interpolated
from llmbo.problem.objectives import Objective, outcomes, ref_point
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines import RandomProposer, ThresholdProposer
from llmbo.search.gain import EPSILON, FamilyCurve
from llmbo.search.pareto import pareto_front
from llmbo.search.surrogate import (
    CHANGE,
    OFF_FAMILY,
    SHARE,
    Features,
    expected_fall,
    fit_surrogate,
    gains,
    prior_weights,
    quality_from_gain,
)
from llmbo.search.threads import one_thread
from llmbo.types import Advice, AdviceSource, Proposal, Trial, TrialState

# BoTorch 0.18 would compile a C++ kernel at first use: half a minute of silence, and a process killed meanwhile leaves a
# lock on which every later one waits for ever. A shortlist of a few dozen candidates gains nothing from it.
logei._load_attempted = True

NUM_INITIAL = 12
MC_SAMPLES = 64
POOL_SIZE = 1024
SHORTLIST = 24  # candidates that qLogNEHVI chooses from
LOCAL_ROUNDS = 3
LOCAL_STARTS = 4
LOCAL_NEIGHBOURS = 96
CHUNK = 256  # candidates in one posterior: it holds their joint covariance

OF_EXPANSIONS = ("kl", "loss")  # what they speak of: KL, and what is in its unit and rises with it

AcquisitionValue = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class QNehviProposer:
    """Threshold family first, then Bayesian optimisation of the hypervolume.

    Args:
        family: The threshold family: initial design and prior mean.
        objectives: At least one measured, at least one known.
        dense: The dense model's values by objective name.
        num_initial: Members of the family evaluated before the first GP.
        advice: Asked in every round for candidates that join the pool; they must win on acquisition value like any other.
        limits: Largest allowed values of what is measured.
    """

    family: ThresholdFamily
    objectives: Sequence[Objective]
    dense: Mapping[str, float]
    num_initial: int = NUM_INITIAL
    advice: AdviceSource | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    _features: Features = field(init=False, repr=False)

    def __post_init__(self) -> None:
        costs = [objective.name for objective in self.objectives if objective.known]
        object.__setattr__(self, "_features", Features(self.family, costs))

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        design = sum(trial.on_path for trial in trials)
        complete = [trial for trial in trials if trial.complete]
        if design < self.num_initial or len(complete) < 3:
            start = ThresholdProposer(self.family, self.objectives, self.dense)
            initial = start.propose(trials, min(q, max(1, self.num_initial - design)), seed)
            if initial or len(complete) < 3:  # the family may have fewer members than the design
                return initial
        with one_thread(), torch.random.fork_rng():  # BoTorch's fits and samplers draw from the global generator
            torch.manual_seed(seed)
            return self._optimize(trials, complete, q, seed)

    def _optimize(self, trials: Sequence[Trial], complete: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        space = self.family.space
        generator = torch.Generator().manual_seed(seed)
        belief = self._belief(complete)
        front = self._front(complete)
        pending = _points([trial for trial in trials if trial.state is TrialState.RUNNING], space.d)
        seen = {trial.x for trial in trials} | {space.max_levels}
        advice = self.advice.advise(trials, seed) if self.advice else Advice()
        advised_by = {row.x: row for row in advice.rows}
        advised = torch.tensor([row.x for row in advice.rows], dtype=torch.float64).view(-1, space.d)
        pool = _legal(torch.cat([advised, candidate_pool(self.family, front, generator)]), space, seen)
        proposals: list[Proposal] = []
        while len(proposals) < q and len(pool):
            # The closed form is cheap enough for every candidate; qLogNEHVI, which integrates over noise and pending
            # points jointly, decides among the best. With three objectives it would take half a minute (64 partitions).
            improvement = belief.expected_improvement(torch.cat([front, pending]))
            best, *others = shortlist = _improve(improvement, pool, space, seen, generator, advised_by)
            if others and len(self.objectives) == 2:
                best = shortlist[belief.log_nehvi(shortlist, front, pending).argmax()]
            x = tuple(best.int().tolist())
            seen.add(x)
            proposals.append(replace(advised_by[x], x=x, why="") if x in advised_by else Proposal(x, "qnehvi"))
            pending = torch.cat([pending, best[None]])
            pool = pool[(pool != best).any(-1)]
        # A space of few points can use up the pool while legal points are left elsewhere.
        strays = RandomProposer(space).propose(trials, q, seed) if len(proposals) < q else []
        return (proposals + [stray for stray in strays if stray.x not in seen])[:q]

    def _front(self, complete: Sequence[Trial]) -> Tensor:
        """Where the front stands, `n x d`; while nothing keeps the limits, the trial that breaks them least."""
        rows = pareto_front(outcomes(complete, self.objectives))
        if not rows:
            excess = [
                max(trial.values[name] / limit for name, limit in self.limits.items()) if self.limits else 0.0
                for trial in complete
            ]
            rows = [excess.index(min(excess))]
        return _points([complete[row] for row in rows], self.family.space.d)

    def _belief(self, complete: Sequence[Trial]) -> "_Belief":
        train_Z = self._features(_points(complete, self.family.space.d))
        family = torch.tensor([trial.on_path for trial in complete])
        errors = torch.tensor([trial.values.get("error", 0.0) for trial in complete], dtype=torch.float64)

        def measured(name: str, sign: float) -> _Measured:
            costs = -sign * torch.tensor([trial.values[name] for trial in complete], dtype=torch.float64)
            shares, dense = train_Z[:, SHARE], -sign * self.dense[name]
            curve = FamilyCurve.through(shares[family], costs[family] - dense)
            speaks = self.family.expansions is not None and name in OF_EXPANSIONS
            fall = expected_fall(train_Z[:, CHANGE], curve(shares)) if speaks else None
            weights = prior_weights(fall, train_Z[:, OFF_FAMILY], gains(costs, curve(shares), dense))
            expected = _Expected(curve, *weights)
            train_Y = gains(costs, expected(train_Z), dense).unsqueeze(-1)
            variance = (errors / ((costs - dense).clamp_min(0) + EPSILON)) ** 2 if errors.any() else None
            return _Measured(fit_surrogate(train_Z, train_Y, self.family.space.d, variance), expected, dense)

        beliefs = tuple(
            _Known(self._features.column(objective.name), objective.sign * self._features.dense[objective.name])
            if objective.known
            else measured(objective.name, objective.sign)
            for objective in self.objectives
        )
        names = {objective.name for objective in self.objectives}  # their limits bound the reference point already
        limits = tuple(
            (measured(name, -1.0), limit) for name, limit in sorted(self.limits.items()) if name not in names
        )
        return _Belief(self._features, beliefs, limits, ref_point(self.objectives))


@dataclass(frozen=True)
class _Known:
    """An objective that is `scale` times a feature column, exactly."""

    column: int
    scale: float

    def mean(self, Z: Tensor) -> Tensor:
        return self.scale * Z[..., self.column]

    def above(self, Z: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """How far each of `n` points reaches into each of `k` intervals, `n x k`."""
        return (torch.minimum(self.mean(Z)[:, None], upper) - lower).clamp_min(0)


@dataclass(frozen=True)
class _Expected:
    """Log excess of the family at the points' shares, what its expansions expect, and what points away from it lose beyond that."""

    curve: FamilyCurve
    beta: float
    kappa: float

    def __call__(self, Z: Tensor) -> Tensor:
        family = self.curve(Z[..., SHARE])
        return family - self.beta * expected_fall(Z[..., CHANGE], family) + self.kappa * Z[..., OFF_FAMILY]


@dataclass(frozen=True)
class _Measured:
    """An objective whose cost (its negative) is log-normal: cost - dense + eps = exp(expected - gain), gain from a GP."""

    gp: SingleTaskGP
    expected: _Expected
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
class _Belief:
    """The fitted surrogate in the objectives' terms.

    Args:
        objectives: In the order of the objectives.
        limits: Outcome constraints: what is believed of a measured cost, and its largest allowed value.
        ref_point: For maximisation, `m`.
    """

    features: Features
    objectives: tuple[_Known | _Measured, ...]
    limits: tuple[tuple[_Measured, float], ...]
    ref_point: Tensor

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

    def log_nehvi(self, X: Tensor, X_baseline: Tensor, X_pending: Tensor) -> Tensor:
        """qLogNEHVI of each of `n` candidates together with the pending points, `n`."""
        outputs: list[Model] = [
            objective.gp if isinstance(objective, _Measured) else _deterministic(objective.mean)
            for objective in self.objectives
        ]
        constraints: list[Callable[[Tensor], Tensor]] = []
        for measured, limit in self.limits:
            # the gain that keeps a limit depends on the size: an output of its own, since constraints see outputs only
            constraints.append(partial(_shortfall, column=len(outputs)))
            outputs += [measured.gp, _deterministic(partial(measured.needed_gain, limit=limit))]
        model = ModelList(*outputs)
        Z_baseline = self.features(X_baseline)
        acq_function = logei.qLogNoisyExpectedHypervolumeImprovement(
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
            objective.from_gain(samples[..., column], X) if isinstance(objective, _Measured) else samples[..., column]
            for column, objective in enumerate(self.objectives)
        ]
        return torch.stack(columns, dim=-1)


def _deterministic(f: Callable[[Tensor], Tensor]) -> Model:
    return GenericDeterministicModel(lambda Z: f(Z).unsqueeze(-1))


def _shortfall(samples: Tensor, column: int) -> Tensor:
    """How far the gain in `column` falls short of the one needed, next to it; BoTorch calls it feasible where negative."""
    return samples[..., column + 1] - samples[..., column]


def candidate_pool(family: ThresholdFamily, front: Tensor, generator: torch.Generator, size: int = POOL_SIZE) -> Tensor:
    """Points worth a look around the front, about `size x d`, rounded but neither deduplicated nor checked.

    A quarter each: one front point's deviation from the family carried to another size, with and without a smooth change
    along depth; a smooth change of a front point; a few single levels of a front point; crossovers of two front points.
    The whole threshold family is added, and as many mixtures of it with uniform widths, which are hard to beat near the dense model.
    """
    quarter = size // 4
    levels = family.space.bounds[1]
    base = front[torch.randint(len(front), (4 * quarter,), generator=generator)]
    low, high = family.shares[0], family.shares[-1]
    deviation = base - family.profile(family.space.share(base))
    target = low + (high - low) * torch.rand(quarter, generator=generator, dtype=torch.float64)
    changed = torch.rand(quarter, 1, generator=generator) < 0.5
    carried = family.profile(target) + deviation[:quarter] + changed * smooth_changes(family.space, quarter, generator)
    smooth = base[quarter : 2 * quarter] + smooth_changes(family.space, quarter, generator)
    moves = (torch.rand(quarter, family.space.d, generator=generator) < 3 / family.space.d) * (
        2 * torch.randint(2, (quarter, family.space.d), generator=generator) - 1
    )
    single = base[2 * quarter : 3 * quarter] + moves
    mother = base[3 * quarter :]
    order = family.space.share(front).argsort()
    position = torch.searchsorted(family.space.share(front)[order], family.space.share(mother).contiguous()).clamp(
        max=len(front) - 1
    )
    neighbour = (position + 2 * torch.randint(2, (quarter,), generator=generator) - 1).clamp(0, len(front) - 1)
    father = front[order[neighbour]]
    crossed = torch.where(torch.rand(quarter, family.space.d, generator=generator) < 0.5, mother, father)
    part = torch.rand(len(family.path), 1, generator=generator, dtype=torch.float64)
    mixed = torch.lerp(family.path, uniform_widths(family.space, family.shares), part)
    pool = torch.cat([family.path, mixed, carried, smooth, single, crossed])
    return pool.round().clamp(torch.zeros_like(levels), levels)


def uniform_widths(space: SearchSpace, share: Tensor) -> Tensor:
    """Levels of the model of that share whose layers all keep their KV groups and the same number of neurons: `n` -> `n x d`."""
    L, top = space.num_layers, space.bounds[1]
    levels = torch.arange(int(top[-1]) + 1, dtype=torch.float64)
    models = torch.cat([top[:L].expand(len(levels), L), levels[:, None].expand(len(levels), L)], dim=1)
    return interpolated(space.share(models), models, share)


def smooth_changes(space: SearchSpace, n: int, generator: torch.Generator) -> Tensor:
    """Random depth profiles for attention and MLPs, `n x d` in levels, of random smoothness and size."""
    layers = space.num_layers
    depth = torch.arange(layers, dtype=torch.float64)
    scale = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)[
        torch.randint(5, (n, 1, 1), generator=generator)
    ]
    kernel = torch.exp(-((depth[:, None] - depth[None]) ** 2) / (2 * scale**2))  # n x L x L
    kernel = kernel / kernel.square().sum(-1, keepdim=True).sqrt()
    profiles = torch.randn(n, 2, layers, generator=generator, dtype=torch.float64) @ kernel.transpose(-1, -2)
    amplitude = 0.02 + 0.13 * torch.rand(n, 2, 1, generator=generator, dtype=torch.float64)  # share of a block's units
    return (profiles * amplitude).flatten(1) * space.bounds[1]


def _improve(
    value: AcquisitionValue,
    pool: Tensor,
    space: SearchSpace,
    seen: set[tuple[int, ...]],
    generator: torch.Generator,
    advised_by: dict[tuple[int, ...], Proposal],
) -> Tensor:
    """The best of the pool after local search by single steps and exchanges of a level between blocks, best first.

    What is found from an advised candidate inherits its place in `advised_by`.
    """
    best, best_values = _top(pool, value(pool))
    for _ in range(LOCAL_ROUNDS):
        base = best[:LOCAL_STARTS].repeat_interleave(LOCAL_NEIGHBOURS, 0)
        rows = torch.arange(len(base))
        step = 2 * torch.randint(2, (len(base),), generator=generator).double() - 1
        neighbours = base.clone()
        neighbours[rows, torch.randint(space.d, (len(base),), generator=generator)] += step
        other = torch.randint(space.d, (len(base),), generator=generator)
        neighbours[rows, other] -= step * (rows % 2)  # every second one is an exchange
        for parent, child in zip(base.int().tolist(), neighbours.int().tolist(), strict=True):
            if tuple(parent) in advised_by:
                advised_by.setdefault(tuple(child), advised_by[tuple(parent)])
        neighbours = _legal(neighbours, space, seen)
        known = {tuple(x) for x in best.int().tolist()}
        fresh = [tuple(x) not in known for x in neighbours.int().tolist()]
        merged, values = torch.cat([best, neighbours[fresh]]), torch.cat([best_values, value(neighbours[fresh])])
        best, best_values = _top(merged, values)
    return best


def _top(X: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    order = values.argsort(descending=True, stable=True)[:SHORTLIST]
    return X[order], values[order]


def _legal(X: Tensor, space: SearchSpace, seen: set[tuple[int, ...]]) -> Tensor:
    """Distinct legal rows that are not in `seen`, in their order."""
    fresh: dict[tuple[int, ...], int] = {}
    for row, x in enumerate(X.int().tolist()):
        fresh.setdefault(tuple(x), row)
    kept = X[[row for x, row in fresh.items() if x not in seen]] if fresh else X
    return kept[space.legal(kept)]


def _points(trials: Sequence[Trial], d: int = 0) -> Tensor:
    """`n x d` levels of trials."""
    return torch.tensor([trial.x for trial in trials], dtype=torch.float64).view(len(trials), -1 if trials else d)
