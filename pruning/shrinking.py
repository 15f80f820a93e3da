"""The physically smaller model, as an ordinary module that shares nothing with the dense one."""

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.block import Block, expand_units
from pruning.compensation import Refits
from pruning.errors import InvalidMask
from pruning.masks import PruningMask
from pruning.projection import matrix_of, resize
from pruning.supernet import absent
from pruning.walk import device_of


def shrink(model: PreTrainedModel, mask: PruningMask, compensation: Refits | None = None) -> PreTrainedModel:
    """Copy what `mask` keeps of `model` into a smaller model, where that computes; the dense model is left as it was.

    The config counts the layers that are left; widths of unequal layers show in the modules only. Attention layers are
    numbered anew, because a KV cache is addressed by `layer_idx`.

    Memory: the result, and one dense layer at a time.

    Raises:
        InvalidMask: The mask has the wrong shape, or does not keep what the compensation table ranks highest.
    """
    anatomy = anatomy_of(model)
    mask.check(anatomy)
    architecture = mask.architecture
    compensation = compensation and compensation.serving(architecture)
    dense_layers = anatomy.layers_of(model)
    try:
        anatomy.set_layers(model, nn.ModuleList())
        small = copy.deepcopy(model)
    finally:
        anatomy.set_layers(model, dense_layers)
    kept = [index for index in range(len(dense_layers)) if architecture.keeps_layer(index)]
    layers = nn.ModuleList()
    for index in kept:
        layer = copy.deepcopy(dense_layers[index], {id(model.config): small.config})
        for block in anatomy.blocks:
            width = architecture.units(block.kind)[index]
            _cut(layer, index, block, width, mask.kept(block.kind, index), mask.kept_heads(block, index), compensation)
        layers.append(layer.to(device_of(model)))  # it was cut where the dense one waits
    anatomy.set_layers(small, layers)
    small.config.num_hidden_layers = len(kept)
    attending = [position for position, index in enumerate(kept) if architecture.kv_groups[index]]
    for name in anatomy.family.per_layer:
        values = getattr(small.config, name)
        setattr(small.config, name, [values[index] for index in kept])
    types = getattr(small.config, "layer_types", None)
    if types is not None:
        types = [types[index] for index in kept]
        # A layer without attention may carry any type. One that has been seen before keeps Hugging Face, which asks the
        # first cache layer of a type for the mask, from asking one that never gets a key.
        small.config.layer_types = [types[p] if p in attending else types[attending[0]] for p in range(len(kept))]
    for position in attending:  # cache layers are made by position and type; the first one tells the length
        anatomy.attention.module_of(layers[position]).layer_idx = 0 if position == attending[0] else position  # type: ignore[assignment]
    return small


def shrink_to(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """As `shrink`, keeping the first units and query heads of every layer: for speed and memory, which depend on their number alone."""
    return shrink(model, PruningMask.first_units(anatomy_of(model), architecture))


def _cut(
    layer: nn.Module, index: int, block: Block, width: int, units: Tensor, heads: Tensor, compensation: Refits | None
) -> None:
    """Keep units and query heads (ascending indices) of one block of a copied layer."""
    if not width:
        for name, module in absent(block).items():
            setattr(layer, name, module)
        return
    if width == block.units:
        return
    for projection, rows in block.inputs_of(layer):
        kept = rows.of(units, heads).to(projection.weight.device)
        own = projection.bias
        resize(projection, matrix_of(projection).detach()[kept], None if own is None else own.detach()[kept])
    output = block.output_of(layer)
    columns = expand_units(heads, block.columns_per_unit // block.queries).to(output.weight.device)
    bias = None if output.bias is None else output.bias.detach()
    dense = matrix_of(output).detach()[:, columns]
    weight, refitted = (dense, None) if compensation is None else _refitted(index, block, width, heads, compensation)
    resize(output, weight.to(output.weight), bias if refitted is None else refitted.to(output.weight))
    for name, value in block.attributes_at(layer, width).items():
        setattr(block.module_of(layer), name, value)


def _refitted(
    index: int, block: Block, width: int, heads: Tensor, compensation: Refits
) -> tuple[Tensor, Tensor | None]:
    """The repaired output weight with its columns in the order of `heads`, and the bias that goes with it."""
    ranked = compensation.ranking.kept(index, block, width)[1]
    ascending = ranked.argsort()
    if not torch.equal(ranked[ascending], heads):
        raise InvalidMask(
            f"Layer {index}: the mask keeps other {block.kind} units than the ranking of the compensation table."
        )
    weight = compensation.weight(index, block, width)
    columns = expand_units(ascending, block.columns_per_unit // block.queries)
    return weight[:, columns.to(weight.device)], compensation.bias(index, block, width)
