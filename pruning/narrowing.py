"""What narrowing one block to each width costs *after* its refit: allocation scores for a compensated model.

Scores of single units (`importance.fisher`) overstate the cost of removing what the refit can rebuild from its neighbours. Here
the refitted block itself is judged. With z the inputs of an output projection W, z_K those of the best-ranked units, V the
refitted weight of that width and g_t the gradient of a token's loss with respect to the block's output y = W z + b,

    cost(width) = E_t [ (g_t . (V z_K + b - y))^2 ] / 2        nats per token

the second-order KL divergence from the dense model, token by token (as in `importance.fisher`, Theis et al. 2018,
arXiv:1801.05787; its first-order term vanishes at the dense model). A block that is dropped loses b too. Tokens drawn from the
model's own predictions give the true Fisher metric, which allocates better than the text's own tokens (Kunstner et al. 2019,
arXiv:1905.12558, on why they differ).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from pruning.anatomy import Block, BlockKind
from pruning.importance import frozen
from pruning.likelihood import loss_gradient
from pruning.supernet import Supernet

Widths = Mapping[BlockKind, Sequence[int]]


def narrowing_costs(
    supernet: Supernet,
    windows: Tensor,
    widths: Widths,
    generator: torch.Generator | None = None,
    batch_size: int = 2,
    on_window: Callable[[int], None] | None = None,
) -> dict[BlockKind, Tensor]:
    """Cost of every block alone at each of `widths`, all others dense: `num_layers x len(widths)` by kind, float32.

    One forward and backward pass without weight gradients, and one product with the refitted weight for each width.

    Memory: activations of `batch_size` windows. The refitted weights come from the compensation table's cache; where that
    cannot hold all widths they are solved anew for each batch, so a large model wants a large batch.

    Args:
        supernet: Open.
        windows: `num_windows x length` token ids. Costs do not depend on `batch_size`.
        generator: Draws the tokens whose loss is taken, on the model's device; without it the text's own are taken.
        on_window: Called with the number of windows done.
    """
    model, anatomy = supernet.model, supernet.anatomy
    costs: dict[BlockKind, Tensor] = {
        block.kind: torch.zeros(anatomy.num_hidden_layers, len(widths[block.kind]), device=model.device)
        for block in anatomy.blocks
    }
    embeddings = model.get_input_embeddings()
    done = 0
    with frozen(model), _listening(supernet, widths, costs), torch.enable_grad():
        for batch in windows.split(batch_size):
            batch = batch.to(model.device)
            inputs = embeddings(batch).detach().requires_grad_()
            hidden = model.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
            hidden.backward(loss_gradient(hidden, model.get_output_embeddings(), batch, generator))
            done += len(batch)
            if on_window:
                on_window(done)
    return {kind: cost / (2 * windows.numel()) for kind, cost in costs.items()}


@contextmanager
def _listening(supernet: Supernet, widths: Widths, costs: Mapping[BlockKind, Tensor]) -> Iterator[None]:
    """Add to `costs` from hooks while the model runs backward; nothing waits for the device."""
    with ExitStack() as stack:
        for index, layer in enumerate(supernet.anatomy.layers_of(supernet.model)):
            for block in supernet.anatomy.blocks:
                listener = _listener(supernet, index, block, widths[block.kind], costs[block.kind][index])
                stack.callback(block.output_of(layer).register_forward_hook(listener).remove)
        yield


def _listener(
    supernet: Supernet, index: int, block: Block, widths: Sequence[int], costs: Tensor
) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
    def listen(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        z, y = args[0].detach().flatten(0, 1), output.detach().flatten(0, 1)  # tokens x C, tokens x hidden_size
        bias = module.bias.detach() if isinstance(module.bias, Tensor) else None
        predicted = output.shape[1] - 1

        def on_gradient(grad: Tensor) -> None:
            g = grad.flatten(0, 1) * predicted  # of the token's own loss, not of the window's mean
            lost = (g * y).float().sum(-1)
            for column, units in enumerate(widths):
                kept = torch.zeros_like(lost)
                if units:
                    weight = supernet.output_weight(index, block, units)
                    kept = ((g @ weight) * z[:, : units * block.columns_per_unit]).float().sum(-1)
                    kept = kept if bias is None else kept + (g @ bias).float()
                costs[column] += (kept - lost).square().sum()

        output.register_hook(on_gradient)

    return listen
