"""Seconds that the default strategy needs to propose a batch, by number of observations and size of the space.

    python -m experiments.proposal_time
    python -m experiments.proposal_time --observations 1000 --pending 64    # as with 64 workers
    python -m experiments.proposal_time --observations 400 --recipes        # with members of other recipes' paths in the pool

No model is loaded: the space is that of SmolLM2-135M (60 dimensions) and of a decoder with 80 layers (160), and a smooth function
stands for the measurements and the expansions behind the prior mean, since only their number matters here.
`kl,params_share,kv_bytes` has three objectives. CPU seconds are all threads' together.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from llmbo.problem.family import Expansions, ThresholdFamily
from llmbo.problem.objectives import build_objectives
from llmbo.problem.prices import Prices, unit_marginal_costs
from llmbo.problem.proxy import known_values
from llmbo.problem.recipe import DENSE_PRICES
from llmbo.problem.space import SearchSpace
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.pool import candidate_pool
from llmbo.types import Proposal, Source, Trial, TrialState
from pruning.anatomy import anatomy_of
from pruning.importance import Importance

SHAPES = {
    "SmolLM2-135M": LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
    ),
    "80 layers": LlamaConfig(
        hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=28672
    ),
}


def search_space(config: LlamaConfig, recipes: bool) -> tuple[SearchSpace, ThresholdFamily]:
    """A space and a family of random scores, with expansions at four members; no weight is allocated.

    Args:
        recipes: Whether the family knows prices, of which other recipes' paths are made.
    """
    with torch.device("meta"):
        anatomy = anatomy_of(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    generator = torch.Generator().manual_seed(0)

    def scores(units: int, scale: float) -> torch.Tensor:
        layer = 0.2 + torch.rand(anatomy.num_hidden_layers, 1, generator=generator)
        return scale * layer * torch.rand(anatomy.num_hidden_layers, units, generator=generator)

    per_group = anatomy.attention.parameters_per_unit / anatomy.mlp.parameters_per_unit
    groups, neurons = scores(anatomy.num_key_value_heads, per_group), scores(anatomy.intermediate_size, 1.0)
    importance = Importance(groups, neurons, groups.sum(-1) + neurons.sum(-1))
    space = SearchSpace(anatomy)
    family = ThresholdFamily.from_importance(space, importance)
    if recipes:
        costs = unit_marginal_costs(space, importance)
        noise = (0.5 + torch.rand(space.d, generator=generator)).tolist()
        prices = Prices.of(space, costs, [[n * c for c in row] for n, row in zip(noise, costs, strict=True)])
        family = replace(ThresholdFamily.along(space, prices.path(DENSE_PRICES), importance), prices=prices)
    members = torch.tensor([family.at(share) for share in (0.45, 0.55, 0.65, 1.0)], dtype=torch.float64)
    levels = torch.arange(int(space.bounds[1].max()) + 1, dtype=torch.float64)
    missing = (1 - levels / space.bounds[1][:, None]).clamp_min(0).square() * torch.rand(
        space.d, 1, generator=generator
    )
    own = missing.expand(len(members), -1, -1).gather(-1, members.long()[..., None])
    return space, replace(family, expansions=Expansions(space.share(members), 0.1 * (missing - own)))


def observed(family: ThresholdFamily, n: int) -> tuple[list[Trial], dict[str, float]]:
    """`n` trials as a search would have them, members of the family first, and the dense model's values."""
    space = family.space
    generator = torch.Generator().manual_seed(1)
    weights = 0.5 + torch.rand(space.d, generator=generator, dtype=torch.float64)
    members = family.path[torch.linspace(0, len(family.path) - 2, 12).long()]
    pool = candidate_pool(family, members, generator, 4 * n)
    pool = pool[space.legal(pool)]
    points = torch.cat([members, pool[torch.randperm(len(pool), generator=generator)]]).int().tolist()

    def values(x: Sequence[int]) -> dict[str, float]:
        missing = 1 - torch.tensor(x, dtype=torch.float64) / space.bounds[1]
        kl = float((weights * missing.square()).mean() * 3)
        return {"kl": kl, "loss": 3 + kl, **known_values(space, tuple(x))}

    distinct = list(dict.fromkeys(tuple(x) for x in points if tuple(x) != space.max_levels))[:n]
    trials = [
        Trial(i, i // 4, x, origin, TrialState.COMPLETE, values(x), 1.0, source=Source.of_origin(origin))
        for i, x in enumerate(distinct)
        for origin in ["threshold" if i < 12 else "qnehvi"]
    ]
    return trials, values(space.max_levels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="candidates proposed at a time")
    parser.add_argument("--observations", type=int, nargs="+", default=[100, 200, 300])
    parser.add_argument("--pending", type=int, default=0, help="trials that others evaluate meanwhile, on top")
    parser.add_argument("--repeats", type=int, default=3, help="proposals timed, each under a seed of its own")
    parser.add_argument("--recipes", action="store_true", help="as with --recipe-search")
    args = parser.parse_args()
    print("model         d    objectives                 observations  seconds (median)  slowest  CPU (median)")
    for model, config in SHAPES.items():
        space, family = search_space(config, args.recipes)
        for names in (("kl", "params_share"), ("kl", "params_share", "kv_bytes")):
            for n in args.observations:
                trials, dense = observed(family, n + args.pending)
                trials[n:] = [replace(trial, state=TrialState.RUNNING, values={}) for trial in trials[n:]]
                objectives = build_objectives(names, dense, known_values(space, family.at(0.0)))
                proposer = QNehviProposer(family, objectives, dense)
                seconds, cpu = [], []
                for seed in range(args.repeats):
                    start, before = time.perf_counter(), time.process_time()
                    proposals: list[Proposal] = proposer.propose(trials, args.batch, seed)
                    seconds.append(time.perf_counter() - start)
                    cpu.append(time.process_time() - before)
                    assert len(proposals) == args.batch
                print(
                    f"{model:12}  {space.d:3}  {','.join(names):25}  {n:12}  {statistics.median(seconds):16.2f}"
                    f"  {max(seconds):7.2f}  {statistics.median(cpu):12.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
