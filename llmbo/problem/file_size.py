"""The size of what a candidate would be exported as, by arithmetic."""

import copy
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config import RunConfig
from llmbo.config.formats import FORMATS, Format, title
from llmbo.models.loading import LoadedModel
from llmbo.models.placement import DTYPES
from llmbo.problem.space import CostFunction
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export.folder_size import LARGEST, FolderSize
from pruning.export.gguf_size import GgufSize, file_size
from pruning.export.hf import Pruned
from pruning.export.quantise import Mixture
from pruning.shrinking import shrink_to


def file_costs(config: RunConfig, loaded: LoadedModel) -> dict[str, CostFunction]:
    """`file_bytes`, if anybody wants to know."""
    if not (kind := config.counted_type):
        return {}
    format = FORMATS[config.counted_format]
    dtype, uniform = kind if format.quantised else loaded.dtype, config.strategy == "uniform"
    return {"file_bytes": size_as(format, dtype, loaded.model, loaded.tokenizer, loaded.name, uniform)}


def size_as(
    format: Format,
    dtype: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    uniform: bool,
    max_shard_size: int = LARGEST,
) -> CostFunction:
    """Bytes of the weights' files that an export of any sub-network has, to the byte: widths -> `batch_shape`, int64.

    Args:
        dtype: One of `format.dtypes` or `format.quantised`, or of a GGUF file `recipe:FILE`.
        model: The dense one, wherever its weights are: only shapes and config are looked at.
        name: The base model's, which files tell.
        uniform: Only sub-networks with equal layers are asked of.
        max_shard_size: Bytes of the largest file, of formats that have several.

    Raises:
        UnsupportedExport: The format cannot hold the model, or the recipe cannot be used.
    """
    if format.quantised:
        mixture = Mixture.of(dtype)
        if not mixture.patterns:
            return GgufSize(model, tokenizer, mixture, title(name), uniform)
        anatomy, config = anatomy_of(model), copy.deepcopy(model.config)
        make: Any = type(model)
        with torch.device("meta"):
            empty = make(config)
        return _one_by_one(
            lambda each: file_size(Pruned(shrink_to(empty, each), anatomy, each, tokenizer), mixture, title(name))
        )
    held = {"held": resolve_name(format.held)} if format.held else {}
    size = FolderSize(model, DTYPES[dtype], max_shard_size=max_shard_size, **held)
    if not format.widened:
        return size
    widened = resolve_name(format.widened)
    return _one_by_one(lambda each: int(size(*_widths(widened(model, each)))))


def _widths(architecture: Architecture) -> tuple[Tensor, Tensor]:
    return torch.tensor(architecture.units("attention")), torch.tensor(architecture.units("mlp"))


def _one_by_one(size: Callable[[Architecture], int]) -> CostFunction:
    def sizes(attention: Tensor, neurons: Tensor) -> Tensor:
        layers = attention.shape[-1]
        rows = zip(attention.reshape(-1, layers).tolist(), neurons.reshape(-1, layers).tolist(), strict=True)
        return torch.tensor([size(Architecture.of(*row)) for row in rows]).view(attention.shape[:-1])

    return sizes
