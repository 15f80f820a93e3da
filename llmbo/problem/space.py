"""Integer vector <-> architecture.

A point x holds one grid level per block: first the attention of layers 0..L-1, then the neurons of layers 0..L-1. Attention's levels are
numbers of KV groups, between which there may be groups that lack query heads: see `attention_ladder`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pkgutil import resolve_name

import torch
from torch import Tensor

from llmbo.config import RunConfig
from llmbo.config.formats import engines_of
from llmbo.config.objectives import OBJECTIVES, known_limits
from llmbo.errors import ConfigError
from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS, Block, BlockKind
from pruning.cost import Serving
from pruning.widths import attention_width, lacking_of, width_text

NEURON_LEVELS = 12
HARDWARE_MULTIPLE = 32  # widths that are no multiple of this waste lanes of vector units and tensor cores

UNITS = {"attention": "KV groups", "mlp": "neurons"}

CostFunction = Callable[[Tensor, Tensor], Tensor]  # attention, neurons (`batch_shape x L` widths) -> `batch_shape`


@dataclass(frozen=True)
class SearchSpace:
    """All sub-networks on a grid, down to a smallest size and within limits.

    Args:
        anatomy: The dense model's sizes.
        min_share: Smallest share of the decoder blocks' parameters that a candidate may keep.
        neuron_step: Neurons per grid level; by default about a twelfth of `intermediate_size`.
        neuron_multiple: What the default step is a multiple of, where a twelfth is as much.
        serving: What FLOPs and bytes are counted for.
        limits: Largest legal value of known costs, by name.
        extra_costs: Known costs beyond those that are counted, e.g. latency from a table, by name.
        priced_by: Known costs that count equally in `weight`, each as a part of the dense model's.
        attention: Widths that a layer with attention may keep (`pruning.widths`), increasing, the dense one last; empty for any number of
            KV groups with all their query heads.

    Raises:
        ConfigError: `min_share` outside (0, 1), or a step that leaves no choice.
    """

    anatomy: Anatomy
    min_share: float = 0.4
    neuron_step: int = 0
    serving: Serving = field(default_factory=Serving)
    limits: Mapping[str, float] = field(default_factory=dict)
    extra_costs: Mapping[str, CostFunction] = field(default_factory=dict)
    priced_by: tuple[str, ...] = ("params_share",)
    neuron_multiple: int = RunConfig.neuron_multiple
    attention: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.min_share < 1:
            raise ConfigError(f"--min-share must lie between 0 and 1, got {self.min_share}.")
        if self.neuron_step == 0:
            object.__setattr__(self, "neuron_step", _default_step(self.anatomy.intermediate_size, self.neuron_multiple))
        if not 1 <= self.neuron_step <= self.anatomy.intermediate_size:
            raise ConfigError(
                f"--neuron-step must lie between 1 and {self.anatomy.intermediate_size}, got {self.neuron_step}."
            )

    @cached_property
    def widths(self) -> dict[BlockKind, list[int]]:
        """Width at each grid level; level 0 drops the block, the last keeps all of it."""
        neurons = self.anatomy.intermediate_size
        return {
            "attention": [0, *(self.attention or range(1, self.anatomy.num_key_value_heads + 1))],
            "mlp": [*range(0, neurons, self.neuron_step), neurons],
        }

    @cached_property
    def query_heads(self) -> bool:
        """Whether some levels lack query heads."""
        return any(map(lacking_of, self.widths["attention"]))

    @property
    def num_layers(self) -> int:
        return self.anatomy.num_hidden_layers

    @property
    def d(self) -> int:
        """Number of dimensions."""
        return 2 * self.num_layers

    @cached_property
    def max_levels(self) -> tuple[int, ...]:
        """The dense model's point."""
        return tuple(len(self.widths[kind]) - 1 for kind in BLOCK_KINDS for _ in range(self.num_layers))

    @cached_property
    def bounds(self) -> Tensor:
        """Lowest and highest level of every dimension, `2 x d`."""
        return torch.tensor([(0,) * self.d, self.max_levels], dtype=torch.float64)

    @property
    def names(self) -> Iterator[str]:
        """One name per dimension."""
        for part in ("kv_groups", "neurons"):
            for layer in range(self.num_layers):
                yield f"layer_{layer:02d}.{part}"

    def decode(self, x: tuple[int, ...]) -> Architecture:
        attention, neurons = self.units(torch.tensor(x))
        return Architecture.of(attention.tolist(), neurons.tolist())

    def units(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Widths of attention and MLPs, `... x d` levels -> `... x num_layers` each."""
        groups, neurons = (torch.tensor(self.widths[kind]) for kind in BLOCK_KINDS)
        attention, mlp = levels.long().split(self.num_layers, dim=-1)
        return groups[attention], neurons[mlp]

    def neighbouring_widths(self, x: tuple[int, ...], steps: Sequence[int]) -> dict[BlockKind, Tensor]:
        """Widths of every block `steps` levels from its own, as far as there are so many: `num_layers x steps` by kind."""
        levels = torch.tensor(x)[:, None] + torch.tensor(steps)
        groups, neurons = self.units(levels.clamp_min(0).minimum(torch.tensor(self.max_levels)[:, None]).T)
        return {"attention": groups.T, "mlp": neurons.T}

    def encode(self, architecture: Architecture) -> tuple[int, ...]:
        """The point of an architecture on the grid.

        Raises:
            ConfigError: A layer's KV groups or neurons lie between two grid levels.
        """
        found: list[int] = []
        for kind in BLOCK_KINDS:
            levels = {width: level for level, width in enumerate(self.widths[kind])}
            for layer, units in enumerate(architecture.units(kind)):
                if units not in levels:
                    known = ", ".join(width_text(w, UNITS[kind]) if lacking_of(w) else str(w) for w in levels)
                    raise ConfigError(
                        f"Layer {layer} keeps {width_text(units, UNITS[kind])}, which is none of the search's levels ({known})."
                    )
                found.append(levels[units])
        return tuple(found)

    @cached_property
    def costs(self) -> dict[str, CostFunction]:
        """Everything that is known of an architecture without measuring it, by name."""
        counted = {
            name: partial(resolve_name(kind.function), self.anatomy, serving=self.serving)
            for name, kind in OBJECTIVES.items()
            if kind.function
        }
        return {**counted, **self.extra_costs}

    def cost(self, name: str, X: Tensor) -> Tensor:
        """A known cost, `batch_shape x d` levels -> `batch_shape`, float64."""
        return self.costs[name](*self.units(X.round())).double()

    def share(self, X: Tensor) -> Tensor:
        """Kept share of the decoder blocks' parameters, `batch_shape x d` levels -> `batch_shape`, float64."""
        return self.cost("params_share", X)

    def weight(self, X: Tensor) -> Tensor:
        """What models of equal quality should have little of: `batch_shape x d` levels -> `batch_shape`, 1 for the dense model."""
        parts = [self.cost(name, X) / self.cost(name, self.bounds[1]) for name in self.priced_by]
        return torch.stack(parts).mean(0)

    def increasing(self, X: Tensor) -> Tensor:
        """Points by increasing share, of equal ones the first: `n x d` levels -> at most `n x d`."""
        shares = self.share(X)
        order = shares.argsort(stable=True)
        return X[order][shares[order].diff(prepend=torch.tensor([-1.0], dtype=torch.float64)) > 0]

    def legal(self, X: Tensor) -> Tensor:
        """Which points may be evaluated: inside the bounds, big enough, within the limits, with attention somewhere.

        `n x d` -> `n` booleans.
        """
        inside = ((X >= self.bounds[0]) & (X <= self.bounds[1])).all(-1)
        clamped = X.clamp(self.bounds[0], self.bounds[1])
        attends = (clamped[..., : self.num_layers] > 0).any(-1)
        return inside & attends & (self.share(clamped) >= self.min_share) & self.within_limits(clamped)

    def what_forbids(self, x: Sequence[int]) -> str:
        """Why a point inside the bounds is not legal."""
        point = torch.tensor([tuple(x)], dtype=torch.float64)
        share = float(self.share(point)[0])
        if share < self.min_share:
            return f"its share {share:.3f} is below {self.min_share:g}"
        costs = {name: float(self.cost(name, point)[0]) for name in self.limits}
        broken = [
            f"its {name} {costs[name]:.4g} is above {most:g}"
            for name, most in self.limits.items()
            if costs[name] > most
        ]
        return ", ".join(broken) or "no layer keeps attention"

    def within_limits(self, X: Tensor) -> Tensor:
        """Which points inside the bounds keep all limits, `n x d` -> `n` booleans."""
        kept = torch.ones(X.shape[:-1], dtype=torch.bool)
        for name, limit in self.limits.items():
            kept &= self.cost(name, X) <= limit
        return kept


def _default_step(intermediate_size: int, multiple: int) -> int:
    step = intermediate_size / NEURON_LEVELS
    for tile in (multiple, HARDWARE_MULTIPLE):
        if step >= tile:
            return round(step / tile) * tile
    return max(1, round(step))


def space_of(config: RunConfig, anatomy: Anatomy) -> SearchSpace:
    """What a run searches, without costs that have to be measured."""
    serving, limits = Serving(config.context, config.serve_batch), known_limits(config.limits)
    return SearchSpace(
        anatomy, config.min_share, config.neuron_step, serving, limits, attention=attention_levels(config, anatomy),
        neuron_multiple=config.neuron_multiple,
    )  # fmt: skip


def attention_levels(config: RunConfig, anatomy: Anatomy) -> tuple[int, ...]:
    """Widths that a layer with attention may keep where all engines named are to run it; empty for any number of KV groups.

    Stock configs of some families want the number of heads to divide the hidden size.

    Raises:
        ConfigError: Query heads are asked for where none can go alone.
    """
    engines, block = engines_of(config.deploy), anatomy.attention
    whole = [engine.name for engine in engines if engine.needs_all_heads(anatomy.family.model_type)]
    if config.query_heads and (whole or block.queries == 1):
        why = f"{whole[0]} runs all heads of a layer or none" if whole else "no query head of this model can go alone"
        raise ConfigError(f"--query-heads leaves nothing to search, since {why}: leave it out.")
    if whole:
        return (block.units,)
    alone = block.units == 1 if config.query_heads is None else config.query_heads
    ladder = attention_ladder(block) if alone else tuple(range(1, block.units + 1))
    if any(engine.equal_layers for engine in engines):
        fits = {width: anatomy.hidden_size % (block.columns_at(width) // anatomy.head_dim) == 0 for width in ladder}
        return tuple(width for width in ladder if fits[width] or width == block.units)
    return ladder if alone else ()


def attention_ladder(block: Block) -> tuple[int, ...]:
    """Numbers of KV groups, and between two of them the larger with fewer query heads in each, as far as it holds more than the smaller.

    So parameters, FLOPs and KV cache never fall from a level to the next. What is left out, groups with so few query heads that a smaller
    number of whole ones has as many parameters, has fewer query heads than these and more KV cache; on SmolLM2 it does worse, after its
    refit, in 18 and 26 of 30 layers.
    """
    return tuple(
        attention_width(groups, lacking)
        for groups in range(1, block.units + 1)
        for lacking in reversed(range(block.queries))
        if groups * (block.queries - lacking + 1) > (groups - 1) * (block.queries + 1)  # query and KV heads
    )
