"""How much goes through each column of each projection: what an error of a weight there counts."""

from functools import partial

import torch
from torch import Tensor, nn

from pruning.export.gguf_tensors import Array
from pruning.export.hf import Pruned

# llama.cpp's names of what reads a block's input, and of what reads its units.
READERS = {
    "attention": (("attn_q", "attn_k", "attn_v", "attn_qkv"), ("attn_output",)),
    "mlp": (("ffn_gate", "ffn_up"), ("ffn_down",)),
}
FLOOR = 1e-6  # of the mean: columns that no token used are not free to be anything


@torch.no_grad()
def column_energies(pruned: Pruned, windows: Tensor) -> dict[str, Array]:
    """Mean square of every column of the projections' inputs, by GGUF's names of the weights; as llama.cpp's importance matrices.

    Args:
        windows: `num_windows x length` token ids.
    """
    found: dict[str, Tensor] = {}

    def add(names: tuple[str, ...], module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        energy = inputs[0].float().square().flatten(0, -2).sum(0)
        for name in names:
            found[name] = found.get(name, 0.0) + energy

    handles = []
    widths = [
        pair for pair in zip(pruned.architecture.kv_groups, pruned.architecture.neurons, strict=True) if any(pair)
    ]
    for index, (layer, units) in enumerate(zip(pruned.anatomy.layers_of(pruned.model), widths, strict=True)):
        for block, kept in zip(pruned.anatomy.blocks, units, strict=True):
            if not kept:
                continue
            projections = next(block.inputs_of(layer))[0], block.output_of(layer)
            for projection, names in zip(projections, READERS[block.kind], strict=True):
                full = tuple(f"blk.{index}.{name}.weight" for name in names)
                handles.append(projection.register_forward_pre_hook(partial(add, full)))
    try:
        for window in windows:
            pruned.model(window[None].to(pruned.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    energies = {name: energy.cpu() / windows.numel() for name, energy in found.items()}
    return {name: energy.clamp_min(float(FLOOR * energy.mean()) or 1.0).numpy() for name, energy in energies.items()}
