"""Architecture + ranking -> which layers, KV groups and neurons stay; and the masked model that defines what pruning means."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import BLOCK_KINDS, Block, BlockKind, expand_units
from pruning.errors import InvalidArchitecture, InvalidMask
from pruning.widths import attention_width, lacking_of, units_of


@dataclass(frozen=True)
class Ranking:
    """Units of every layer, most important first.

    Args:
        groups: `num_layers x num_key_value_heads` indices; every row is a permutation.
        neurons: `num_layers x intermediate_size` indices; every row is a permutation.
        heads: `num_layers x num_attention_heads` indices of query heads, those of the best group first, in each group the best first;
            None where groups are kept with all of them.
    """

    groups: Tensor
    neurons: Tensor
    heads: Tensor | None = None

    def __post_init__(self) -> None:
        orders = {"groups": self.groups, "neurons": self.neurons}
        if self.heads is not None:
            orders["heads"] = self.heads
        for name, order in orders.items():
            if order.ndim != 2 or not torch.equal(
                order.sort(-1).values, torch.arange(order.shape[1], device=order.device).expand_as(order)
            ):
                raise InvalidMask(f"Every row of `{name}` must be a permutation of its unit indices.")
        if len(self.groups) != len(self.neurons):
            raise InvalidMask(f"Expected one row per layer in both, got {len(self.groups)} and {len(self.neurons)}.")
        if self.heads is not None:
            queries = self.heads.shape[1] // self.groups.shape[1]
            if not torch.equal(self.heads // queries, self.groups.repeat_interleave(queries, 1)):
                raise InvalidMask("Query heads in `heads` must follow the order of their `groups`.")

    def check(self, anatomy: Anatomy) -> None:
        """Raise InvalidMask unless this ranks the units of a model with `anatomy`."""
        _check_shapes("ranking", self.of, anatomy)

    def of(self, kind: BlockKind) -> Tensor:
        """The `num_layers x units` order for blocks of this kind."""
        return self.groups if kind == "attention" else self.neurons

    def same(self, other: "Ranking") -> bool:
        """Whether both order units and query heads alike."""
        if self.heads is None or other.heads is None:
            return self.heads is other.heads and all(torch.equal(self.of(k), other.of(k)) for k in BLOCK_KINDS)
        return torch.equal(self.heads, other.heads) and torch.equal(self.neurons, other.neurons)

    def kept(self, layer: int, block: Block, width: int) -> tuple[Tensor, Tensor]:
        """The units that a layer's block keeps at a width, and their query heads (of an MLP the units again), best first.

        Raises:
            InvalidMask: The width lacks query heads, and they are not ranked.
        """
        units = self.of(block.kind)[layer][: units_of(width)]
        if block.kind == "mlp" or self.heads is None:
            if lacking_of(width):
                raise InvalidMask("The ranking orders KV groups, and not the query heads in them.")
            return units, expand_units(units, block.queries)
        heads = self.heads[layer].view(block.units, block.queries)
        return units, heads[: len(units), : block.queries - lacking_of(width)].flatten()

    def columns(self, layer: int, block: Block, lacking: int = 0) -> Tensor:
        """All columns of a layer's output projection, those first that the dense number of units keeps where each lacks so many heads."""
        kept = self.kept(layer, block, attention_width(block.units, lacking))[1]
        gone = torch.ones(block.units * block.queries, dtype=torch.bool).index_fill_(0, kept.cpu(), False)
        heads = torch.cat([kept, gone.nonzero().flatten().to(kept.device)])
        return expand_units(heads, block.columns_per_unit // block.queries)


@dataclass(frozen=True)
class PruningMask:
    """True where something stays.

    Args:
        groups: `num_layers x num_key_value_heads` booleans, one per KV group.
        neurons: `num_layers x intermediate_size` booleans.
        heads: `num_layers x num_attention_heads` booleans, one per query head, as many in each group of a layer that stays; None for all
            of these groups' heads.
    """

    groups: Tensor
    neurons: Tensor
    heads: Tensor | None = None

    def __post_init__(self) -> None:
        if self.groups.dtype != torch.bool or self.neurons.dtype != torch.bool:
            raise InvalidMask("`groups` and `neurons` must be boolean.")
        if self.groups.ndim != 2 or self.neurons.ndim != 2 or len(self.groups) != len(self.neurons):
            raise InvalidMask(
                f"Expected one row per layer in both, got shapes {tuple(self.groups.shape)} and {tuple(self.neurons.shape)}."
            )
        if self.heads is not None and not self._even:
            raise InvalidMask(
                "`heads` must be boolean and keep as many query heads in every group of a layer that stays, one or more."
            )

    @classmethod
    def first_units(cls, anatomy: Anatomy, architecture: Architecture) -> "PruningMask":
        """Keep the first units of every layer, where only their number matters, as for speed and size.

        Raises:
            InvalidArchitecture: It does not fit the model.
        """
        architecture.check(anatomy)
        layers = anatomy.num_hidden_layers
        units = (anatomy.attention.units, anatomy.mlp.units, anatomy.attention.by_query.units)
        groups, neurons, heads = (torch.arange(number).repeat(layers, 1) for number in units)
        return cls.from_architecture(architecture, Ranking(groups, neurons, heads))

    @classmethod
    def from_architecture(cls, architecture: Architecture, ranking: Ranking) -> "PruningMask":
        """Keep the best-ranked units of every layer.

        Raises:
            InvalidArchitecture: It has other layers, or keeps more units, than the ranking knows.
        """
        for kind in BLOCK_KINDS:
            layers, units = ranking.of(kind).shape
            widths = architecture.units(kind)
            if len(widths) != layers or max(map(units_of, widths)) > units:
                raise InvalidArchitecture(
                    f"The ranking knows {layers} layers of {units} units of {kind}, cannot keep {widths}."
                )
        groups = _best(ranking.groups, architecture.kv_groups)
        return cls(groups, _best(ranking.neurons, architecture.neurons), _heads(groups, ranking, architecture))

    @property
    def layers(self) -> Tensor:
        """`num_layers` booleans: layers that keep anything."""
        return self.groups.any(-1) | self.neurons.any(-1)

    @property
    def architecture(self) -> Architecture:
        fewer: tuple[int, ...] = ()
        if self.heads is not None:
            by_group = self.heads.view(*self.groups.shape, -1)
            fewer = tuple((self.groups.any(-1) * (by_group.shape[-1] - by_group.sum(-1).amax(-1))).tolist())
        return Architecture(tuple(self.groups.sum(-1).tolist()), tuple(self.neurons.sum(-1).tolist()), fewer)

    @property
    def _even(self) -> bool:
        assert self.heads is not None
        if self.heads.dtype != torch.bool or self.heads.ndim != 2 or self.heads.shape[1] % self.groups.shape[1]:
            return False
        kept = self.heads.view(*self.groups.shape, -1).sum(-1)
        return bool((kept == self.groups * kept.amax(-1, keepdim=True)).all() and (kept.bool() == self.groups).all())

    def of(self, kind: BlockKind) -> Tensor:
        """The `num_layers x units` mask for blocks of this kind."""
        return self.groups if kind == "attention" else self.neurons

    def kept(self, kind: BlockKind, layer: int) -> Tensor:
        """Indices of the units that stay, ascending."""
        return self.of(kind)[layer].nonzero().flatten()

    def kept_heads(self, block: Block, layer: int) -> Tensor:
        """Indices of the query heads that stay, of an MLP of the neurons, ascending."""
        if block.kind == "mlp" or self.heads is None:
            return expand_units(self.kept(block.kind, layer), block.queries)
        return self.heads[layer].nonzero().flatten()

    def check(self, anatomy: Anatomy) -> None:
        """Raise InvalidMask unless this masks the units of a model with `anatomy`."""
        _check_shapes("mask", self.of, anatomy)
        if self.heads is not None and self.heads.shape[1] != anatomy.attention.units * anatomy.attention.queries:
            raise InvalidMask(
                f"Expected {anatomy.num_attention_heads} query heads in a layer's mask, got {self.heads.shape[1]}."
            )


@contextmanager
def masked(model: PreTrainedModel, mask: PruningMask) -> Iterator[PreTrainedModel]:
    """Run the dense model with the removed units' activations set to zero, and removed blocks adding nothing.

    The slow, obvious definition that `shrink` and `Supernet` must agree with. Hooks only: no weight is touched,
    and they are gone afterwards even if the body raises.
    """
    anatomy = anatomy_of(model)
    mask.check(anatomy)
    with ExitStack() as stack:
        for index, layer in enumerate(anatomy.layers_of(model)):
            for block in anatomy.blocks:
                for handle in _hide(block, layer, mask.kept_heads(block, index)):
                    stack.callback(handle.remove)
        yield model


def _check_shapes(name: str, of: Callable[[BlockKind], Tensor], anatomy: Anatomy) -> None:
    for block in anatomy.blocks:
        expected, found = (anatomy.num_hidden_layers, block.units), tuple(of(block.kind).shape)
        if found != expected:
            raise InvalidMask(f"Expected a {expected} {name} for {block.kind}, got {found}.")


def _hide(block: Block, layer: nn.Module, heads: Tensor) -> list[torch.utils.hooks.RemovableHandle]:
    output = block.output_of(layer)
    columns = output.weight.new_zeros(block.columns)
    columns[expand_units(heads, block.columns_per_unit // block.queries).to(columns.device)] = 1
    handles = [output.register_forward_pre_hook(lambda module, args: (args[0] * columns,))]
    if not len(heads):  # the output bias leaves with the block
        handles.append(output.register_forward_hook(lambda module, args, result: torch.zeros_like(result)))
    return handles


def _heads(groups: Tensor, ranking: Ranking, architecture: Architecture) -> Tensor | None:
    """The best query heads of the groups that stay."""
    if not architecture.fewer_queries:
        return None
    if ranking.heads is None:
        raise InvalidArchitecture(
            "The ranking orders KV groups, and not the query heads in them: it cannot do without some."
        )
    queries = ranking.heads.shape[1] // groups.shape[1]
    places = ranking.heads.argsort(-1) % queries  # in its group
    return groups.repeat_interleave(queries, 1) & (places < queries - torch.tensor(architecture.fewer_queries)[:, None])


def _best(order: Tensor, widths: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(order.shape, dtype=torch.bool)
    for layer, width in enumerate(widths):
        mask[layer, order[layer, :width]] = True
    return mask
