"""The order of a block's units under refit: what is missed least goes first, and what is left makes up for it (optimal brain surgeon).

With M = G + D, W and K as in `pruning.compensation`, A = M_KK^-1 and V the refit to the units that are left, leaving out columns S of
one more unit and fitting the rest anew raises the refit's objective, error and ridge together, by exactly

    tr V_S A_SS^-1 V_S^T        and then    V <- V - V_S A_SS^-1 A_S,    A <- A - A_S^T A_SS^-1 A_S

(OBC, arXiv:2208.11580; whole columns in SparseGPT, arXiv:2301.00774). Of two units that say the same one goes early, however strong
both are; by activation energy both would stay. Units go `1 / AT_ONCE` of those left at a time, and one at a time at the end: on SmolLM2
single ones throughout give the same quality. So that no two go together of which one would do, twice as many are looked at, the least
missed first, and each costs at least what it costs after all before it: with A_SS = L L^T of all, its rows of L^-1 V_S^T, squared.

A fitted bias belongs to an input that is 1 everywhere and always kept: eliminating it leaves the covariance, G - E[z] E[z]^T, for G.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.block import Block
from pruning.compensation import RIDGE, Ridge
from pruning.masks import Ranking
from pruning.projection import Projection, matrix_of
from pruning.statistics import Statistics

AT_ONCE = 32


def surgeon_ranking(model: PreTrainedModel, statistics: Statistics, ridge: Ridge = RIDGE) -> Ranking:
    """The order of all units under refits with this ridge, which `statistics` keeps its Gram matrices for.

    Args:
        model: The dense model the statistics were collected on, its units in their original order.
    """
    orders, tokens = [], statistics.num_tokens
    for block in statistics.anatomy.blocks:
        sums, rows = statistics.blocks[block.kind], []
        for index, layer in enumerate(statistics.anatomy.layers_of(model)):
            gram, mean = sums.gram[index] / tokens, sums.total[index] / tokens
            rows.append(surgeon_order(gram, mean, block.output_of(layer), block, ridge, tokens).cpu())
        orders.append(torch.stack(rows))
    return Ranking(*orders)


def surgeon_order(gram: Tensor, mean: Tensor, output: Projection, block: Block, ridge: Ridge, tokens: int) -> Tensor:
    """Units from the last that would go to the first, so that every width keeps a prefix: `units` indices.

    Of units that are missed equally the first in the layer stays longest.

    Memory: two `C x C` and two `C x hidden_size` values in float32, beside `gram`. Time: 5/3 C^3 + C^2 hidden_size operations. The
    device is waited for once.

    Args:
        gram: `C x C`, G.
        mean: `C`, E[z].
        tokens: Over which the moments were taken.

    Raises:
        torch.linalg.LinAlgError: The moments are not finite.
    """
    width = block.columns_per_unit
    inverse = gram.clone()
    inverse.diagonal().add_(ridge.of(gram, tokens))
    if output.bias is not None and ridge.biases:
        inverse.addr_(mean, mean, alpha=-1)
    inverse = torch.linalg.cholesky(inverse)  # by the same name, so that no more than two of them are there at a time
    torch.cholesky_inverse(inverse, out=inverse)  # a GPU takes one copy to work in, and without `out` another one
    weight = matrix_of(output).detach().T.to(gram).contiguous()  # C x hidden_size, V^T
    units = torch.arange(block.units, device=gram.device)
    gone: list[Tensor] = []
    while (left := len(units)) > 1:
        batch = max(1, left // AT_ONCE)
        missed = _missed(inverse, weight, width)
        least = missed.argsort(descending=True, stable=True)[-2 * batch :].flip(0)
        cost = torch.maximum(missed[least], _missed_in_turn(inverse, weight, block.columns_of(least), width))
        removed = least[cost.argsort(stable=True)[:batch]]
        kept = torch.zeros_like(units).index_fill_(0, removed, 1).argsort(stable=True)[: left - batch]
        gone.append(units[removed.flip(0)])
        units = units[kept]
        keep, drop = block.columns_of(kept), block.columns_of(removed)
        rows = inverse[drop]
        # With the ridge whatever is finite can be factored, and that it is has just been found out: no need to wait for the device.
        lower = torch.linalg.cholesky_ex(rows[:, drop]).L
        cross = torch.linalg.solve_triangular(lower, rows[:, keep], upper=False)
        update = torch.linalg.solve_triangular(lower, weight[drop], upper=False)
        inverse = inverse.index_select(0, keep)
        inverse = inverse.index_select(1, keep).addmm_(cross.T, cross, alpha=-1)
        weight = weight[keep].addmm_(cross.T, update, alpha=-1)
    return torch.cat([units, *reversed(gone)])


def _missed(inverse: Tensor, weight: Tensor, width: int) -> Tensor:
    """What leaving out each unit of so many columns adds to the objective, from `C x C` A and `C x hidden_size` V^T."""
    if width == 1:
        return torch.linalg.vector_norm(weight, dim=1).square_().div_(inverse.diagonal())
    units = len(weight) // width
    own = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    lower = torch.linalg.cholesky_ex(own).L
    return torch.linalg.solve_triangular(lower, weight.view(units, width, -1), upper=False).square_().sum((1, 2))


def _missed_in_turn(inverse: Tensor, weight: Tensor, columns: Tensor, width: int) -> Tensor:
    """The same for the units with these columns, each left out after those before it."""
    lower = torch.linalg.cholesky_ex(inverse[columns[:, None], columns]).L
    rows = torch.linalg.solve_triangular(lower, weight[columns], upper=False)
    return rows.square_().sum(1).view(-1, width).sum(1)
