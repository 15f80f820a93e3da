"""Importance of layers, KV groups and neurons from one pass over calibration windows.

L: decoder layers.   U: units of a block (KV groups or neurons).   C: columns of its output projection.
z: input of the output projection, `tokens x C`; zeroing a unit's columns of z is what removing the unit means.
g: gradient of a window's mean next-token loss (nats) with respect to z.
Scores are `L x U`; larger means "hurts more if removed". Only `taylor` and `fisher` are comparable across layers.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruning.anatomy import Anatomy, Block, BlockKind, anatomy_of
from pruning.likelihood import Head, last_hidden, loss_gradient
from pruning.masks import Ranking
from pruning.projection import Projection, matrix_of

GRAM_BLOCK = 192  # columns of a Gram matrix that are added to at a time


@dataclass
class BlockStatistics:
    """Sums over calibration tokens for all blocks of one kind, float32 on the model's device.

    Args:
        total: `L x C` sum of z.
        square: `L x C` sum of z^2.
        gram: L matrices `C x C`, the sum of z zT (4 L C^2 bytes: 283 MB for SmolLM2's MLPs, 26 GB for an 8B model's).
        fisher: `L x U` sum over tokens of (z g)^2, z g summed over the unit's columns first and g scaled to one token's loss.
        taylor: `L x U` sum over windows, and over the unit's columns, of |sum over tokens of z g|.
        cosine: `L` sum over tokens of the cosine between the residual stream before and after the block.
    """

    total: Tensor
    square: Tensor
    gram: list[Tensor]
    taylor: Tensor
    fisher: Tensor
    cosine: Tensor

    @classmethod
    def empty(cls, layers: int, block: Block, device: torch.device) -> "BlockStatistics":
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, device=device)

        return cls(
            total=zeros(layers, block.columns),
            square=zeros(layers, block.columns),
            gram=[zeros(block.columns, block.columns) for _ in range(layers)],
            taylor=zeros(layers, block.units),
            fisher=zeros(layers, block.units),
            cosine=zeros(layers),
        )


@dataclass
class Statistics:
    """What one pass over the calibration windows leaves behind; every score is a function of this and the weights.

    Args:
        num_scored_windows: Windows that had a backward pass: `taylor` and `fisher` are sums over these alone.
    """

    anatomy: Anatomy
    blocks: dict[BlockKind, BlockStatistics]
    layer_cosine: Tensor
    num_windows: int = 0
    num_tokens: int = 0
    num_scored_windows: int = 0
    num_scored_tokens: int = 0


@dataclass(frozen=True)
class Importance:
    """Scores of one method: `groups` `L x num_key_value_heads`, `neurons` `L x intermediate_size`, `layers` `L`."""

    groups: Tensor
    neurons: Tensor
    layers: Tensor

    def of(self, kind: BlockKind) -> Tensor:
        return self.groups if kind == "attention" else self.neurons

    def ranking(self) -> Ranking:
        """Most important first; equal scores keep their index order, so the ranking does not depend on the machine."""
        return Ranking(
            *(scores.argsort(dim=-1, descending=True, stable=True).cpu() for scores in (self.groups, self.neurons))
        )


def collect_statistics(
    model: PreTrainedModel,
    windows: Tensor,
    batch_size: int = 2,
    on_window: Callable[[int], None] | None = None,
    scored: int | None = None,
) -> Statistics:
    """One forward and backward pass over `windows`; no weight gradients, so it costs about two forward passes.

    Args:
        windows: `num_windows x length` token ids.
        batch_size: Windows per pass. Results do not depend on it: the loss is averaged within each window only.
        scored: Only the first so many windows have a backward pass; by default all. Scores of units settle on fewer tokens
            than the Gram matrices do, which have `C^2` entries.
        on_window: Called with the number of windows done.
    """
    anatomy = anatomy_of(model)
    device = model.device
    statistics = Statistics(
        anatomy=anatomy,
        blocks={
            block.kind: BlockStatistics.empty(anatomy.num_hidden_layers, block, device) for block in anatomy.blocks
        },
        layer_cosine=torch.zeros(anatomy.num_hidden_layers, device=device),
    )
    head = Head.of(model)
    scored = len(windows) if scored is None else scored
    with frozen(model), _listening(model, statistics, windows.shape[1]):
        parts = [part.split(batch_size) for part in (windows[:scored], windows[scored:]) if len(part)]
        for batch in chain.from_iterable(parts):
            backward = statistics.num_windows < scored
            batch = batch.to(device)
            with torch.set_grad_enabled(backward):
                hidden = last_hidden(model, batch, leaf=backward)
            if backward:
                hidden.backward(loss_gradient(hidden, head, batch))
                statistics.num_scored_windows += len(batch)
                statistics.num_scored_tokens += batch.numel()
            statistics.num_windows += len(batch)
            statistics.num_tokens += batch.numel()
            if on_window:
                on_window(statistics.num_windows)
    for block in statistics.blocks.values():
        for gram in block.gram:
            _mirror_lower(gram)
    return statistics


def taylor(model: PreTrainedModel, statistics: Statistics) -> Importance:
    """First-order loss change, |dL/dgate| of every column summed over the unit, mean over windows (nats).

    Absolute before summing over columns: the signs inside a KV group cancel, which would make a group look hundreds of
    times less important per parameter than a neuron. Molchanov et al. 2019, arXiv:1906.10771; LLM-Pruner, arXiv:2305.11627.
    """
    scores = {kind: block.taylor / statistics.num_scored_windows for kind, block in statistics.blocks.items()}
    return _importance(scores)


def fisher(model: PreTrainedModel, statistics: Statistics) -> Importance:
    """Second-order KL divergence of removing a unit from the dense model, E[(dL/dgate)^2] / 2 over tokens (nats).

    The first-order term of that divergence vanishes at the dense model, and the Hessian is the Fisher information.
    Theis et al. 2018, arXiv:1801.05787. Token by token, an empirical Fisher that ignores the tokens' correlations.
    Thresholded per parameter it allocates widths better than `taylor`: see `experiments/allocation`.
    """
    scores = {kind: block.fisher / (2 * statistics.num_scored_tokens) for kind, block in statistics.blocks.items()}
    return _importance(scores)


def activation(model: PreTrainedModel, statistics: Statistics) -> Importance:
    """Mean energy a unit sends into the residual stream, E[z^2] |W column|^2: the best ranking *within* a layer under refit.

    Wanda's |W| |x| (arXiv:2306.11695) summed over structures.
    """
    return _column_scores(model, statistics, lambda block: block.square / statistics.num_tokens)


def fluctuation(model: PreTrainedModel, statistics: Statistics) -> Importance:
    """Energy around the mean, Var[z] |W column|^2: what a bias could not restore. FLAP, arXiv:2312.11983."""

    def variance(block: BlockStatistics) -> Tensor:
        mean = block.total / statistics.num_tokens
        return (block.square / statistics.num_tokens - mean**2).clamp_min(0)

    return _column_scores(model, statistics, variance)


def magnitude(model: PreTrainedModel, statistics: Statistics) -> Importance:
    """Squared norm of all weights of a unit; needs no data. Li et al. 2017, arXiv:1608.08710."""
    anatomy = statistics.anatomy
    scores = {}
    for block in anatomy.blocks:
        rows = []
        for layer in anatomy.layers_of(model):
            score = _per_unit(_column_norms(block, layer), block)
            for projection, rows_of in block.inputs_of(layer):
                norms = matrix_of(projection).detach().float().pow(2).sum(-1)
                score = score + sum(norms[part].view(block.units, -1).sum(-1) for part in rows_of.prefix(block.units))
            rows.append(score)
        scores[block.kind] = torch.stack(rows)
    return _importance(scores)


def block_influence(statistics: Statistics) -> dict[str, Tensor]:
    """How much each layer, and each of its blocks, turns the residual stream: 1 - mean cosine, `L` each.

    ShortGPT, arXiv:2403.03853.
    """
    scores: dict[str, Tensor] = {"layer": 1 - statistics.layer_cosine / statistics.num_tokens}
    for kind, block in statistics.blocks.items():
        scores[kind] = 1 - block.cosine / statistics.num_tokens
    return scores


METHODS: dict[str, Callable[[PreTrainedModel, Statistics], Importance]] = {
    "taylor": taylor,
    "fisher": fisher,
    "activation": activation,
    "fluctuation": fluctuation,
    "magnitude": magnitude,
}


def layer_scores(model: PreTrainedModel, statistics: Statistics) -> dict[str, dict[str, Tensor]]:
    """Every method's view of the layers: method -> "attention", "mlp" or "layer" -> `L` scores.

    Scores of units are summed over their block; `block_influence` scores blocks as they are.
    """
    summed: dict[str, dict[str, Tensor]] = {
        name: {kind: importance.of(kind).sum(-1) for kind in statistics.blocks}
        for name, importance in ((name, method(model, statistics)) for name, method in METHODS.items())
    }
    return {**summed, "block_influence": block_influence(statistics)}


def _importance(scores: dict[BlockKind, Tensor]) -> Importance:
    return Importance(scores["attention"], scores["mlp"], scores["attention"].sum(-1) + scores["mlp"].sum(-1))


def _column_scores(
    model: PreTrainedModel, statistics: Statistics, energy: Callable[[BlockStatistics], Tensor]
) -> Importance:
    anatomy = statistics.anatomy
    scores = {}
    for block in anatomy.blocks:
        norms = torch.stack([_column_norms(block, layer) for layer in anatomy.layers_of(model)])  # L x C
        scores[block.kind] = _per_unit(energy(statistics.blocks[block.kind]) * norms, block)
    return _importance(scores)


def _column_norms(block: Block, layer: nn.Module) -> Tensor:
    return matrix_of(block.output_of(layer)).detach().float().pow(2).sum(0)  # C


def _per_unit(columns: Tensor, block: Block) -> Tensor:
    """Sum `... x C` over the columns of each unit, giving `... x U`."""
    return columns.unflatten(-1, (block.units, block.columns_per_unit)).sum(-1)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Ask for no weight gradients inside, and restore every flag afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    model.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _listening(model: PreTrainedModel, statistics: Statistics, length: int) -> Iterator[None]:
    """Fill `statistics` from hooks while the model runs on windows of `length` tokens; nothing waits for the device."""
    anatomy = statistics.anatomy
    with ExitStack() as stack:
        for index, layer in enumerate(anatomy.layers_of(model)):
            stack.callback(
                layer.register_forward_hook(_layer_listener(statistics.layer_cosine, index), with_kwargs=True).remove
            )
            for block in anatomy.blocks:
                sums, output, update = statistics.blocks[block.kind], block.output_of(layer), block.update_of(layer)
                listen, follow = _block_listeners(sums, block, index, length, output)
                stack.callback(output.register_forward_pre_hook(listen).remove)
                if update is not output:
                    stack.callback(update.register_forward_hook(follow).remove)
                keep, compare = _residual_listeners(sums, index)
                stack.callback(block.norm_of(layer).register_forward_pre_hook(keep).remove)
                stack.callback(update.register_forward_hook(compare).remove)
        yield


def _block_listeners(
    sums: BlockStatistics, block: Block, index: int, length: int, output: Projection
) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook before the output projection that fills `sums`, and one on the norm behind it where there is one.

    A norm undoes any scaling of its input x, so the derivative by a gate on all of a block is zero and that on one of two
    KV groups half of what it should be, though removing them is not nothing. So gates act on its output y with the norm's
    own scale y/x held at the dense model's; then they add up to the gate on the block's update. Gradients that go on to
    earlier layers stay exact.
    """
    passing: list[Tensor] = []  # z on its way to the norm

    def add(z: Tensor, grad: Tensor) -> None:
        gate = (
            z * grad.reshape(z.shape)
        ).float()  # B x T x C; share of every column's dL/dgate that arises at this token
        sums.taylor[index] += _per_unit(gate.sum(1).abs().sum(0), block)
        sums.fisher[index] += (_per_unit(gate, block) * (length - 1)).pow(2).sum((0, 1))

    def listen(module: nn.Module, args: tuple[Tensor]) -> None:
        # Detached: a hook that held the live tensor would keep the whole graph in a cycle. Reshaped: OPT flattens its tokens.
        z = args[0].detach().reshape(-1, length, block.columns)  # B x T x C
        tokens = z.flatten(0, 1).float()
        sums.total[index] += tokens.sum(0)
        _add_lower(sums.gram[index], tokens)
        sums.square[index] = sums.gram[index].diagonal()
        if not args[0].requires_grad:  # a window without a backward pass
            return
        if block.places.post_norm:
            passing.append(z)
        else:
            args[0].register_hook(lambda grad: add(z, grad))

    def follow(norm: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
        if not y.requires_grad:
            return
        z, scale = passing.pop(), (y / args[0]).detach().nan_to_num(0.0, 0.0, 0.0)
        weight = matrix_of(output)
        y.register_hook(lambda grad: add(z, (grad * scale) @ weight))

    return listen, follow


def _add_lower(gram: Tensor, tokens: Tensor) -> None:
    """Add zT z to the lower half of `gram`, and to some more: nearly half the work is saved, as it is symmetric."""
    for first in range(0, len(gram), GRAM_BLOCK):
        block = slice(first, first + GRAM_BLOCK)
        gram[first:, block].addmm_(tokens[:, first:].T, tokens[:, block])


def _mirror_lower(gram: Tensor) -> None:
    gram.tril_().add_(gram.tril(-1).T)


def _layer_listener(cosine: Tensor, index: int) -> Callable[..., None]:
    def listen(
        module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor | tuple[Tensor, ...]
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output if isinstance(output, Tensor) else output[0]
        cosine[index] += _cosines(before, after)

    return listen


def _residual_listeners(sums: BlockStatistics, index: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """A hook before the block's norm that keeps the residual stream, and one on what is added to it that compares."""
    residual: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor]) -> None:
        residual.append(args[0].detach())

    def compare(module: nn.Module, args: tuple[Tensor, ...], update: Tensor) -> None:
        before = residual.pop()
        sums.cosine[index] += _cosines(before, before + update.detach())

    return keep, compare


def _cosines(before: Tensor, after: Tensor) -> Tensor:
    return F.cosine_similarity(before.detach().float(), after.detach().float(), dim=-1).sum()
