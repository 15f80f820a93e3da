"""Architecture + ranking -> which layers, KV groups and neurons stay; and the masked model that defines what pruning means."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import BLOCK_KINDS, Anatomy, Block, BlockKind, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import InvalidArchitecture, InvalidMask


@dataclass(frozen=True)
class Ranking:
    """Units of every layer, most important first.

    Args:
        groups: `num_layers x num_key_value_heads` indices; every row is a permutation.
        neurons: `num_layers x intermediate_size` indices; every row is a permutation.
    """

    groups: Tensor
    neurons: Tensor

    def __post_init__(self) -> None:
        for name, order in (("groups", self.groups), ("neurons", self.neurons)):
            if order.ndim != 2 or not torch.equal(
                order.sort(-1).values, torch.arange(order.shape[1], device=order.device).expand_as(order)
            ):
                raise InvalidMask(f"Every row of `{name}` must be a permutation of its unit indices.")
        if len(self.groups) != len(self.neurons):
            raise InvalidMask(f"Expected one row per layer in both, got {len(self.groups)} and {len(self.neurons)}.")

    def check(self, anatomy: Anatomy) -> None:
        """Raise InvalidMask unless this ranks the units of a model with `anatomy`."""
        _check_shapes("ranking", self.of, anatomy)

    def of(self, kind: BlockKind) -> Tensor:
        """The `num_layers x units` order for blocks of this kind."""
        return self.groups if kind == "attention" else self.neurons


@dataclass(frozen=True)
class PruningMask:
    """True where something stays.

    Args:
        groups: `num_layers x num_key_value_heads` booleans, one per KV group.
        neurons: `num_layers x intermediate_size` booleans.
    """

    groups: Tensor
    neurons: Tensor

    def __post_init__(self) -> None:
        if self.groups.dtype != torch.bool or self.neurons.dtype != torch.bool:
            raise InvalidMask("`groups` and `neurons` must be boolean.")
        if self.groups.ndim != 2 or self.neurons.ndim != 2 or len(self.groups) != len(self.neurons):
            raise InvalidMask(
                f"Expected one row per layer in both, got shapes {tuple(self.groups.shape)} and {tuple(self.neurons.shape)}."
            )

    @classmethod
    def first_units(cls, anatomy: Anatomy, architecture: Architecture) -> "PruningMask":
        """Keep the first units of every layer, where only their number matters, as for speed and size.

        Raises:
            InvalidArchitecture: It does not fit the model.
        """
        architecture.check(anatomy)
        groups = torch.arange(anatomy.num_key_value_heads)[None] < torch.tensor(architecture.kv_groups)[:, None]
        neurons = torch.arange(anatomy.intermediate_size)[None] < torch.tensor(architecture.neurons)[:, None]
        return cls(groups, neurons)

    @classmethod
    def from_architecture(cls, architecture: Architecture, ranking: Ranking) -> "PruningMask":
        """Keep the best-ranked units of every layer.

        Raises:
            InvalidArchitecture: It has other layers, or keeps more units, than the ranking knows.
        """
        for kind in BLOCK_KINDS:
            layers, units = ranking.of(kind).shape
            widths = architecture.units(kind)
            if len(widths) != layers or max(widths) > units:
                raise InvalidArchitecture(
                    f"The ranking knows {layers} layers of {units} units of {kind}, cannot keep {widths}."
                )
        return cls(_best(ranking.groups, architecture.kv_groups), _best(ranking.neurons, architecture.neurons))

    @property
    def layers(self) -> Tensor:
        """`num_layers` booleans: layers that keep anything."""
        return self.groups.any(-1) | self.neurons.any(-1)

    @property
    def architecture(self) -> Architecture:
        return Architecture(tuple(self.groups.sum(-1).tolist()), tuple(self.neurons.sum(-1).tolist()))

    def of(self, kind: BlockKind) -> Tensor:
        """The `num_layers x units` mask for blocks of this kind."""
        return self.groups if kind == "attention" else self.neurons

    def kept(self, kind: BlockKind, layer: int) -> Tensor:
        """Indices of the units that stay, ascending."""
        return self.of(kind)[layer].nonzero().flatten()

    def check(self, anatomy: Anatomy) -> None:
        """Raise InvalidMask unless this masks the units of a model with `anatomy`."""
        _check_shapes("mask", self.of, anatomy)


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
                for handle in _hide(block, layer, mask.of(block.kind)[index]):
                    stack.callback(handle.remove)
        yield model


def _check_shapes(name: str, of: Callable[[BlockKind], Tensor], anatomy: Anatomy) -> None:
    for block in anatomy.blocks:
        expected, found = (anatomy.num_hidden_layers, block.units), tuple(of(block.kind).shape)
        if found != expected:
            raise InvalidMask(f"Expected a {expected} {name} for {block.kind}, got {found}.")


def _hide(block: Block, layer: nn.Module, keep: Tensor) -> list[torch.utils.hooks.RemovableHandle]:
    output = block.output_of(layer)
    columns = keep.repeat_interleave(block.columns_per_unit).to(output.weight.device, output.weight.dtype)
    handles = [output.register_forward_pre_hook(lambda module, args: (args[0] * columns,))]
    if not keep.any():  # the output bias leaves with the block
        handles.append(output.register_forward_hook(lambda module, args, result: torch.zeros_like(result)))
    return handles


def _best(order: Tensor, widths: tuple[int, ...]) -> Tensor:
    mask = torch.zeros(order.shape, dtype=torch.bool)
    for layer, width in enumerate(widths):
        mask[layer, order[layer, :width]] = True
    return mask
