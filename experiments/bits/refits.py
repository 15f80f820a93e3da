"""Output projections that are fitted after what they read was quantised, so that they make up for that error too.

With z' what goes into a block's output projection W when the block's input projections have the values a file gives back, and z what goes
into it in the dense model, V = argmin E|W z - V z'_K|^2 + |(V - W_K) D^1/2|^2: `pruning.compensation` with z' in place of z, for all
widths from one factor, the dense one included. V is then quantised itself. Families with an MLP and an attention module without output
biases, as Llama's.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import gguf
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.block import Block, BlockKind
from pruning.compensation import RIDGE, Factor, Refits, Ridge
from pruning.export.quantise import TYPES, fitting, quantised
from pruning.likelihood import frozen
from pruning.masks import Ranking
from pruning.projection import matrix_of
from pruning.statistics import add_lower, mirror_lower
from pruning.tensor_files import TensorFiles
from pruning.walk import Walk

FINE = "q8_0"  # what it changes is too little to be fitted to
Call = tuple[tuple[Any, ...], dict[str, Any]]


def stored(matrix: Tensor, kind: str) -> Tensor:
    """The values that a file gives back of a matrix."""
    given = fitting(TYPES[kind], matrix.shape[-1])
    return torch.from_numpy(gguf.quants.dequantize(quantised(matrix.float().contiguous().numpy(), given), given).copy())


class Reached(Exception):
    """The output projection, with what goes into it."""

    def __init__(self, z: Tensor) -> None:
        self.z = z


def _reach(module: nn.Module, args: tuple[Tensor]) -> None:
    raise Reached(args[0])


@torch.no_grad()
def inputs_of_output(block: Block, layer: nn.Module, calls: Sequence[Call], kind: str) -> list[Tensor]:
    """What goes into the output projection of a dense block, call by call, its input projections stored as `kind`."""
    found = []
    with ExitStack() as stack:
        for projection, _ in block.inputs_of(layer):
            stack.callback(setattr, projection.weight, "data", projection.weight.data)
            projection.weight.data = stored(projection.weight.data, kind)
        stack.callback(block.output_of(layer).register_forward_pre_hook(_reach).remove)
        for args, kwargs in calls:
            try:
                block.module_of(layer)(*args, **kwargs)
            except Reached as reached:
                found.append(reached.z)
    return found


@contextmanager
def kept_calls(block: Block, layer: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Keep how a block is called, apart from any graph."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((tuple(map(_detached, args)), {name: _detached(value) for name, value in kwargs.items()}))

    handle = block.module_of(layer).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class QuantisedRefits:
    """Output weights by width and type of what they read.

    Args:
        model: The dense one in float32.
        fine: Refits to full precision, for `FINE`.
        files: What `fit_after` has left; None where types are not fitted to.
    """

    def __init__(self, model: PreTrainedModel, fine: Refits, files: TensorFiles | None) -> None:
        self.ranking, self._fine, self._files = fine.ranking, fine, files
        self._layers = anatomy_of(model).layers_of(model)

    def weight(self, layer: int, block: Block, units: int, kind: str) -> Tensor:
        """The `hidden_size x (units * columns_per_unit)` weight, float32, columns in the ranking's order; not quantised yet."""
        columns = units * block.columns_per_unit
        if kind != FINE and self._files is not None:
            found = self._files.get(_name(layer, block, kind))
            assert found is not None  # `fit_after` has been asked for it
            return Factor(found["lower"], found["rhs"]).solve(columns)[0]
        if units < block.units:
            return self._fine.weight(layer, block, units).float()
        return matrix_of(block.output_of(self._layers[layer])).detach()[:, self.order(layer, block)]

    def order(self, layer: int, block: Block) -> Tensor:
        """All columns, best first."""
        return self.ranking.columns(layer, block)

    def in_file(self, layer: int, block: Block, units: int, kind: str) -> tuple[Tensor, Tensor]:
        """Columns in the order of the file, and the weight with the values that it gives back."""
        columns = self.order(layer, block)[: units * block.columns_per_unit]
        ascending = columns.argsort()
        return columns[ascending], stored(self.weight(layer, block, units, kind)[:, ascending], kind)


@torch.no_grad()
def fit_after(
    model: PreTrainedModel,
    windows: Tensor,
    ranking: Ranking,
    kinds: Sequence[str],
    files: TensorFiles,
    ridge: Ridge = RIDGE,
    batch_size: int = 4,
) -> None:
    """Leave in `files` what all widths of every block are solved from, type by type of its input projections.

    Args:
        model: The dense one in float32.
        windows: `num_windows x length` token ids.
    """
    anatomy = anatomy_of(model)
    names = [
        _name(i, block, kind) for i in range(anatomy.num_hidden_layers) for block in anatomy.blocks for kind in kinds
    ]
    if all(files.get(name) for name in names):
        return
    with frozen(model):
        walk = Walk(model, windows.split(batch_size))
        for index, layer in enumerate(anatomy.layers_of(model)):
            calls: dict[BlockKind, list[Call]] = {block.kind: [] for block in anatomy.blocks}
            goals: dict[BlockKind, list[Tensor]] = {block.kind: [] for block in anatomy.blocks}
            with ExitStack() as stack:
                for block in anatomy.blocks:
                    stack.enter_context(kept_calls(block, layer, calls[block.kind]))
                    keep = _keeper(goals[block.kind])
                    stack.callback(block.output_of(layer).register_forward_hook(keep).remove)
                walk.forward(index, layer)
            for block in anatomy.blocks:
                order = ranking.columns(index, block)
                for kind in kinds:
                    if not files.get(_name(index, block, kind)):
                        z = inputs_of_output(block, layer, calls[block.kind], kind)
                        found = _factored(z, goals[block.kind], matrix_of(block.output_of(layer)), order, ridge)
                        files.put(_name(index, block, kind), found)


def _keeper(into: list[Tensor]) -> Any:
    def keep(module: nn.Module, args: object, y: Tensor) -> None:
        into.append(y)

    return keep


def _factored(
    inputs: Sequence[Tensor], goals: Sequence[Tensor], dense: Tensor, order: Tensor, ridge: Ridge
) -> dict[str, Tensor]:
    columns = len(order)
    gram, cross = dense.new_zeros(columns, columns), dense.new_zeros(columns, len(dense))
    for z, y in zip(inputs, goals, strict=True):
        rows = z.flatten(0, -2)[:, order]
        add_lower(gram, rows)
        cross.addmm_(rows.T, y.flatten(0, -2))
    mirror_lower(gram)
    tokens = sum(z.shape[:-1].numel() for z in inputs)
    damping = ridge.of(gram.div_(tokens), tokens)
    gram.diagonal().add_(damping)
    lower = torch.linalg.cholesky(gram)
    right = cross.div_(tokens).addcmul_(damping[:, None], dense[:, order].T)
    return {"lower": lower, "rhs": torch.linalg.solve_triangular(lower, right, upper=False)}


def _name(layer: int, block: Block, kind: str) -> str:
    return f"{kind}_{block.kind}_{layer:03d}"
