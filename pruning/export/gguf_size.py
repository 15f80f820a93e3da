"""How many bytes a GGUF file of a sub-network has, to the byte, by arithmetic alone: what it says, its tensors, and the padding of both."""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFWriter
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export.gguf_file import add_metadata, check_gguf
from pruning.export.gguf_tensors import shapes, stand_ins, zeros
from pruning.export.hf import Pruned
from pruning.export.quantise import Mixture, Shape, Stored, more_bits, storage
from pruning.widths import lacking_of, units_of

ROWS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_gate", "ffn_up")  # which units share equally
COLUMNS = ("attn_output", "ffn_down")
QUERIES = ("attn_q", "attn_qkv", "attn_output")  # where query heads have rows or columns
PER_LAYER = 12  # bytes that a layer takes in the three arrays of sizes
Size = tuple[int, int]  # bytes of what the file says of tensors, and of the tensors


class GgufSize:
    """Bytes of the file that `write_gguf` writes of any sub-network of one model.

    Args:
        model: The dense one, wherever its weights are: only shapes and config are looked at.
        mixture: No recipe.
        name: The model's name in the file.
        uniform: Only sub-networks with equal layers are asked of, which more families can be.

    Raises:
        UnsupportedExport: llama.cpp cannot hold the model with layers of unequal size, or its tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        mixture: Mixture,
        name: str,
        uniform: bool = False,
    ) -> None:
        self.anatomy, self.mixture = anatomy_of(model), mixture
        full = Architecture.full(self.anatomy)
        cut = full if uniform else Architecture(full.kv_groups, (0, *full.neurons[1:]))
        unequal, equal = (Pruned(model, self.anatomy, each, tokenizer) for each in (cut, full))
        self.names = [check_gguf(model.config, self.anatomy, each.architecture) for each in (unequal, equal)]
        self.dense = [shapes(equal, kind) for kind in self.names]
        self.metadata = [
            _metadata(each, kind, mixture, name) for each, kind in zip((unequal, equal), self.names, strict=True)
        ]
        self.layers: dict[tuple[int, ...], Size] = {}

    def __call__(self, kv_groups: Tensor, neurons: Tensor) -> Tensor:
        """`batch_shape x num_layers` widths -> `batch_shape` bytes, int64."""
        batch, layers = kv_groups.shape[:-1], kv_groups.shape[-1]
        groups, neurons = kv_groups.reshape(-1, layers).long(), neurons.reshape(-1, layers).long()
        kept = (groups > 0) | (neurons > 0)
        number, position = kept.sum(-1, keepdim=True), kept.cumsum(-1) - 1
        first = kept.int().argmax(-1, keepdim=True)
        whole = (groups > 0) & (neurons > 0)
        same = whole & (groups == groups.gather(1, first)) & (neurons == neurons.gather(1, first))
        equal = (same | ~kept).all(-1, keepdim=True)
        everywhere = torch.tensor([kind == "openelm" for kind in self.names])[equal.long()]
        stands_in = kept & (groups == 0) & ((position == 0) | everywhere)
        attends = (groups > 0) | stands_in
        more_values = more_bits(attends.cumsum(-1) - 1, attends.sum(-1, keepdim=True))
        digits = 1 + (position > 9).long() + (position > 99).long()
        attention, more_down = (units_of(groups), lacking_of(groups)), more_bits(position, number)
        parts = (equal.expand_as(kept), *attention, neurons, stands_in, digits, more_values, more_down)
        whole_block = self.anatomy.num_key_value_heads + 1, self.anatomy.attention.queries
        counts = (2, *whole_block, self.anatomy.intermediate_size + 1, 2, 4, 2, 2)
        codes = np.ravel_multi_index([part[kept].long().numpy() for part in parts], counts)
        kinds, where = np.unique(codes, return_inverse=True)  # few kinds of layers make up all models
        sizes = [self._layer(*map(int, row)) for row in zip(*np.unravel_index(kinds, counts), strict=True)]
        of_layers = torch.zeros(*kept.shape, 2, dtype=torch.int64)
        of_layers[kept] = torch.tensor(sizes, dtype=torch.int64)[torch.from_numpy(where)]
        outside = torch.tensor([self._outside(kind) for kind in (0, 1)])[equal.long().squeeze(-1)]
        told, held = (of_layers.sum(1) + outside).unbind(-1)
        fewer = torch.where(equal, 0, PER_LAYER * (number - layers)).squeeze(-1)
        return (_padded(told + fewer) + held).view(batch)

    def _outside(self, equal: int) -> Size:
        """Of what is no layer's, metadata included."""
        own = {name: shape for name, shape in self.dense[equal].items() if not name.startswith("blk.")}
        head = "output.weight" if "output.weight" in own else "token_embd.weight"
        told, held = _sum(self._tensor(name, shape, head=name == head) for name, shape in own.items())
        return told + self.metadata[equal], held

    def _layer(
        self,
        equal: int,
        groups: int,
        lacking: int,
        neurons: int,
        stands_in: int,
        digits: int,
        more_values: int,
        more_down: int,
    ) -> Size:
        """Of one layer, by what it keeps, how long its number is, and where a mixture has more bits for it."""
        key = (equal, groups, lacking, neurons, stands_in, digits, more_values, more_down)
        if key not in self.layers:
            found = stand_ins(self.anatomy, self.names[equal], bool(stands_in), not neurons)
            for name, shape in self.dense[equal].items():
                if name.startswith("blk.0."):
                    found |= self._kept(name.removeprefix("blk.0."), shape, groups, lacking, neurons)
            prefix = f"blk.{'0' * digits}."
            more = {True: bool(more_down), False: bool(more_values)}
            self.layers[key] = _sum(
                self._tensor(prefix + name, shape, more=more[name.startswith("ffn")]) for name, shape in found.items()
            )
        return self.layers[key]

    def _kept(self, name: str, dense: Shape, groups: int, lacking: int, neurons: int) -> dict[str, Shape]:
        """A layer's tensor where so many units are kept, if it is there at all."""
        mlp = name.startswith(("ffn", "post_ffw"))
        kept, units = (neurons, self.anatomy.intermediate_size) if mlp else (groups, self.anatomy.num_key_value_heads)
        part, missing = name.split(".")[0], lacking * kept * self.anatomy.head_dim  # rows and columns of query heads
        if part in ROWS:
            dense = (dense[0] * kept // units - missing * (part in QUERIES), *dense[1:])
        elif part in COLUMNS and len(dense) > 1:
            dense = (dense[0], dense[1] * kept // units - missing * (part in QUERIES))
        return {name: dense} if kept else {}

    def _tensor(self, name: str, shape: Shape, head: bool = False, more: bool = False) -> Size:
        wanted = self.mixture.wanted(name, shape[-1], head, more) if len(shape) > 1 else Type.F32
        return _told_and_held(name, Stored.of(wanted, shape))


def file_size(pruned: Pruned, mixture: Mixture, name: str) -> int:
    """Bytes of the file that `write_gguf` writes of one model, recipes included.

    Raises:
        UnsupportedExport: As `write_gguf`.
    """
    architecture = check_gguf(pruned.model.config, pruned.anatomy, pruned.architecture)
    held = shapes(pruned, architecture) | {name: values.shape for name, values in zeros(pruned, architecture)}
    told, tensors = _sum(_told_and_held(*tensor) for tensor in storage(held, mixture).items())
    return int(_padded(told + _metadata(pruned, architecture, mixture, name)) + tensors)


def _told_and_held(name: str, stored: Stored) -> Size:
    return 8 + len(name.encode()) + 4 + 8 * len(stored.shape) + 4 + 8, stored.padded


def _sum(sizes: Iterable[Size]) -> Size:
    told, held = zip(*sizes, strict=True)
    return sum(told), sum(held)


def _padded(size: Any) -> Any:
    return -(-size // GGUF_DEFAULT_ALIGNMENT) * GGUF_DEFAULT_ALIGNMENT


def _metadata(pruned: Pruned, architecture: str, mixture: Mixture, name: str) -> int:
    """Bytes of the header and all that is said beside tensors; they are written, once."""
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder, "metadata"), architecture)
        try:
            add_metadata(writer, pruned, mixture, name)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
        finally:
            writer.close()
        return Path(folder, "metadata").stat().st_size
