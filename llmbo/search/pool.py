"""Candidates around the front that the acquisition function chooses from, and what may be chosen at all."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from llmbo.problem.depth import gaussian_kernel
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.interpolation import interpolated
from llmbo.problem.recipe import BOUNDS, AllocationRecipe, bounds
from llmbo.problem.space import SearchSpace
from llmbo.types import Proposal, Trial

POOL_SIZE = 1024
NUM_RECIPES = 48
SHARES_PER_RECIPE = 12
STEP = 0.12  # standard deviation of a recipe's changes, in shares of a number's range
PRUNED_MEMBERS = list(BOUNDS).index("pruned_members")
CHANGED = 0.3  # share of the numbers that a change changes


def candidate_pool(family: ThresholdFamily, front: Tensor, generator: torch.Generator, size: int = POOL_SIZE) -> Tensor:
    """Points worth a look: `around` the front, about `size x d`, rounded but neither deduplicated nor checked.

    The whole threshold family is added, and as many mixtures of it with uniform widths, which are hard to beat near the dense model.
    """
    changed = around(family, front, generator, size)
    part = torch.rand(len(family.path), 1, generator=generator, dtype=torch.float64)
    mixed = torch.lerp(family.path, uniform_widths(family.space, family.shares), part)
    return torch.cat([_rounded(family.space, torch.cat([family.path, mixed])), changed])


def around(family: ThresholdFamily, front: Tensor, generator: torch.Generator, size: int = POOL_SIZE) -> Tensor:
    """Changes of front points, about `size x d`, rounded but neither deduplicated nor checked.

    A quarter each: one front point's deviation from the family carried to another size, with and without a smooth change
    along depth; a smooth change of a front point; a few single levels of a front point; crossovers of two front points.
    """
    quarter = size // 4
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
    return _rounded(family.space, torch.cat([carried, smooth, single, crossed]))


def _rounded(space: SearchSpace, X: Tensor) -> Tensor:
    return X.round().clamp(torch.zeros_like(space.bounds[1]), space.bounds[1])


def recipe_members(family: ThresholdFamily, trials: Sequence[Trial], generator: torch.Generator) -> list[Proposal]:
    """Members of new recipes' paths, each at random sizes: nothing where the family knows no prices.

    A third each: the family's own recipe with some numbers changed and any weight of what was measured at pruned members; a recipe that a
    trial on the front stems from, changed likewise; and crossovers of two such. Profiles go with the recipe that is changed.

    Args:
        trials: On the front.
    """
    if family.prices is None:
        return []
    low, high = bounds()
    known = known_recipes(family, trials)
    thetas = torch.stack([recipe.theta for recipe in known])
    profiles = torch.stack([recipe.bonus(family.space.num_layers) for recipe in known])

    def drawn() -> Tensor:
        return torch.randint(len(known), (NUM_RECIPES // 3,), generator=generator)

    def coin(n: int, probability: float) -> Tensor:
        return torch.rand(n, len(low), generator=generator) < probability

    own, changed = torch.zeros(NUM_RECIPES // 3, dtype=torch.long), drawn()
    informed = thetas[own]
    informed[:, PRUNED_MEMBERS] = torch.rand(len(informed), generator=generator, dtype=torch.float64)
    heads, mother, father = coin(NUM_RECIPES // 3, 0.5), drawn(), drawn()
    base = torch.cat([informed, thetas[changed], torch.where(heads, thetas[mother], thetas[father])])
    bonus = profiles[torch.cat([own, changed, mother])]
    change = STEP * (high - low) * torch.randn(base.shape, generator=generator, dtype=torch.float64)
    theta = (base + torch.where(coin(len(base), CHANGED), change, 0.0)).maximum(low).minimum(high)
    smallest = family.shares[0]
    share = smallest + (1 - smallest) * torch.rand(SHARES_PER_RECIPE, generator=generator, dtype=torch.float64)
    members = family.prices.members(theta, share, bonus).int().tolist()
    recipes = [AllocationRecipe.clamped(*row).to_dict() for row in zip(theta, bonus, strict=True)]
    return [Proposal(tuple(x), "recipe", recipe=r) for r, rows in zip(recipes, members, strict=True) for x in rows]


def known_recipes(family: ThresholdFamily, trials: Sequence[Trial]) -> list[AllocationRecipe]:
    """The family's own and those that trials stem from."""
    return [family.recipe, *(AllocationRecipe.of(trial.recipe) for trial in trials if trial.recipe)]


def uniform_widths(space: SearchSpace, share: Tensor) -> Tensor:
    """Levels of the model of that share whose layers all keep their KV groups and the same number of neurons: `n` -> `n x d`."""
    L, top = space.num_layers, space.bounds[1]
    levels = torch.arange(int(top[-1]) + 1, dtype=torch.float64)
    models = torch.cat([top[:L].expand(len(levels), L), levels[:, None].expand(len(levels), L)], dim=1)
    return interpolated(space.share(models), models, share)


def smooth_changes(space: SearchSpace, n: int, generator: torch.Generator) -> Tensor:
    """Random depth profiles for attention and MLPs, `n x d` in levels, of random smoothness and size."""
    layers = space.num_layers
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0], dtype=torch.float64)
    kernel = gaussian_kernel(layers, scales[torch.randint(5, (n, 1, 1), generator=generator)])  # n x L x L
    kernel = kernel / kernel.square().sum(-1, keepdim=True).sqrt()  # every layer's change has variance 1
    profiles = torch.randn(n, 2, layers, generator=generator, dtype=torch.float64) @ kernel.transpose(-1, -2)
    amplitude = 0.02 + 0.13 * torch.rand(n, 2, 1, generator=generator, dtype=torch.float64)  # share of a block's units
    return (profiles * amplitude).flatten(1) * space.bounds[1]


def eligible(X: Tensor, space: SearchSpace, seen: Collection[tuple[int, ...]]) -> Tensor:
    """Distinct legal rows that are not in `seen`, in their order."""
    fresh: dict[tuple[int, ...], int] = {}
    for row, x in enumerate(X.int().tolist()):
        fresh.setdefault(tuple(x), row)
    kept = X[[row for x, row in fresh.items() if x not in seen]] if fresh else X
    return kept[space.legal(kept)]


def levels_of(trials: Sequence[Trial], d: int) -> Tensor:
    """`n x d` levels of trials."""
    return torch.tensor([trial.x for trial in trials], dtype=torch.float64).view(len(trials), d)
