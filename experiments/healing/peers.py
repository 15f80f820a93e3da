"""Models cut by the units that other methods keep, to the same share of the blocks, as published: nothing is refitted.

2SSP (Sandri et al., arXiv:2501.17771): as many neurons in every layer, those of the largest activations, then whole attention blocks, one
by one that whose loss costs the least perplexity. FLAP (An et al., arXiv:2312.11983): KV groups and neurons by how their inputs fluctuate
around the mean, compared across all layers; what goes is replaced by its mean, as a bias. Written from the papers and the authors'
published code.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experiments.studies import Cut
from pruning.anatomy import Anatomy, anatomy_of
from pruning.block import Block
from pruning.cost import dense_block_parameters
from pruning.likelihood import last_hidden, quality
from pruning.masks import PruningMask
from pruning.modeling_pruned import AbsentAttention, AbsentMLP
from pruning.projection import matrix_of
from pruning.shrinking import shrink
from pruning.statistics import BlockStatistics, collect_statistics
from pruning.supernet import absent

ALPHA = 1.5  # between the stages of 2SSP, its default
SAMPLE = 2048  # tokens of the perplexity that chooses attention blocks, its default


@torch.no_grad()
def two_stage(model: PreTrainedModel, share: float, windows: Tensor) -> Cut:
    """2SSP.

    Args:
        share: Of the blocks' parameters to keep.
        windows: `num_windows x length` token ids.
    """
    anatomy = anatomy_of(model)
    layers, (attention, mlp) = anatomy.num_hidden_layers, anatomy.blocks
    own = [block.units * block.parameters_per_unit for block in anatomy.blocks]
    gone = round(layers * (1 - share) ** (own[1] / own[0] / ALPHA))  # its equation 5
    attending = (layers - gone) * (own[0] + attention.fixed_parameters)
    left = share * dense_block_parameters(anatomy) - layers * (anatomy.shared_parameters + mlp.fixed_parameters)
    width = round((left - attending) / (layers * mlp.parameters_per_unit))
    if not 0 < width <= mlp.units or gone >= layers:
        raise SystemExit(f"2SSP cannot keep {share:g} of this model's blocks: it would take {width} neurons a layer.")
    neurons = torch.zeros(layers, mlp.units, dtype=torch.bool)
    neurons.scatter_(1, _norms(model, anatomy, windows).topk(width).indices.cpu(), True)
    groups = torch.ones(layers, attention.units, dtype=torch.bool)
    narrow = shrink(model, PruningMask(groups, neurons))
    sample = windows[: max(1, SAMPLE // windows.shape[1])]
    with ExitStack() as stack:
        for _ in range(gone):
            losses = {}
            for index, layer in enumerate(anatomy.layers_of(narrow)):
                if groups[index].any():
                    with _without(layer, attention):
                        losses[index] = quality(narrow, sample).loss
            least = min(losses, key=lambda index: losses[index])
            groups[least] = False
            stack.enter_context(_without(anatomy.layers_of(narrow)[least], attention))
    mask = PruningMask(groups, neurons)
    return shrink(model, mask), mask.architecture


def _norms(model: PreTrainedModel, anatomy: Anatomy, windows: Tensor) -> Tensor:
    """Of each neuron's activations over a window, a mean over windows: `L x neurons`."""
    found = torch.zeros(anatomy.num_hidden_layers, anatomy.mlp.units, device=model.device)

    def listener(index: int) -> Callable[..., None]:
        def listen(module: nn.Module, args: tuple[Tensor]) -> None:
            z = args[0].reshape(-1, windows.shape[1], anatomy.mlp.columns)
            found[index] += z.float().norm(dim=1).sum(0) / len(windows)

        return listen

    with ExitStack() as stack:
        for index, layer in enumerate(anatomy.layers_of(model)):
            output = anatomy.mlp.output_of(layer)
            stack.callback(output.register_forward_pre_hook(listener(index)).remove)
        for batch in windows.split(4):
            last_hidden(model, batch.to(model.device))
    return found


@contextmanager
def _without(layer: nn.Module, block: Block) -> Iterator[None]:
    """A layer without one of its blocks."""
    own = {name: getattr(layer, name) for name in absent(block)}
    for name, module in absent(block).items():
        setattr(layer, name, module)
    try:
        yield
    finally:
        for name, module in own.items():
            setattr(layer, name, module)


@torch.no_grad()
def flap(model: PreTrainedModel, share: float, windows: Tensor) -> Cut:
    """FLAP, its metric WIFV in its structure AL-AM; a KV group with its query heads stands for a head.

    Args:
        share, windows: As for `two_stage`. Biases are not counted.
    """
    anatomy = anatomy_of(model)
    sums = collect_statistics(model, windows, scored=0, grams=lambda layer: False).blocks
    scores = [_scores(sums[block.kind], block, windows.numel()) for block in anatomy.blocks]
    sizes = [
        torch.full_like(each, block.parameters_per_unit) for each, block in zip(scores, anatomy.blocks, strict=True)
    ]
    order = torch.cat([each.flatten() for each in scores]).argsort(descending=True, stable=True)
    size = torch.cat([each.flatten() for each in sizes]).double()
    budget = dense_block_parameters(anatomy) * share - dense_block_parameters(anatomy) + size.sum()
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[order[: 1 + int((size[order].cumsum(0) - budget).abs().argmin())].cpu()] = True
    groups, neurons = (
        part.view(each.shape) for part, each in zip(kept.split([each.numel() for each in scores]), scores, strict=True)
    )
    mask = PruningMask(groups, neurons)
    small = shrink(model, mask)
    dense, layers = anatomy.layers_of(model), iter(anatomy.layers_of(small))
    for index in mask.layers.nonzero().flatten().tolist():
        layer = next(layers)
        for block in anatomy.blocks:
            bias = _lost(sums[block.kind], block, index, dense[index], mask, windows.numel())
            if not mask.of(block.kind)[index].any():
                for name, module in absent(block).items():
                    if isinstance(module, AbsentAttention | AbsentMLP):
                        setattr(layer, name, BiasAlone(module, bias))
            elif not mask.of(block.kind)[index].all():
                block.output_of(layer).bias = nn.Parameter(bias, requires_grad=False)
    return small, mask.architecture


def _scores(sums: BlockStatistics, block: Block, tokens: int) -> Tensor:
    """Of units, comparable across layers: `L x units`."""
    variance = (sums.square / tokens - (sums.total / tokens) ** 2).clamp_min(0)
    scores = variance * sums.column_norms
    if block.kind == "attention":  # as in the authors' code
        scores = scores**2
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)
    return block.per_unit(scores) / block.columns_per_unit


def _lost(sums: BlockStatistics, block: Block, index: int, layer: nn.Module, mask: PruningMask, tokens: int) -> Tensor:
    """What the units that go give to the residual stream on average, and the bias that was there: `hidden_size`."""
    output = block.output_of(layer)
    mean = sums.total[index] / tokens
    mean[block.columns_of(mask.kept(block.kind, index)).to(mean.device)] = 0
    lost = matrix_of(output).float() @ mean
    return (lost if output.bias is None else lost + output.bias).to(output.weight.dtype)


class BiasAlone(nn.Module):
    """A block of which nothing is left but what it gives on average."""

    def __init__(self, stand_in: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.stand_in, self.bias = stand_in, nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden_states: Tensor, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        nothing = self.stand_in(hidden_states, **kwargs)
        return (nothing[0] + self.bias, None) if isinstance(nothing, tuple) else nothing + self.bias


PEERS: dict[str, Callable[[PreTrainedModel, float, Tensor], Cut]] = {"2ssp": two_stage, "flap": flap}
