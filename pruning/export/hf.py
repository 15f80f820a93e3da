"""Hugging Face folders: with per-layer widths, or zero-padded to a uniform shape. Both are read back before they appear."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.block import expand_units
from pruning.errors import UnsupportedExport
from pruning.export.folder import whole_folder
from pruning.export.reader import Read, reader
from pruning.export.rebuild import cast, class_for, is_uniform, local_class, rebuilt, stock_config
from pruning.export.verify import PROBE_LENGTH, Check, check_equal, expected_logits, probe
from pruning.projection import matrix_of
from pruning.widths import attention_width, lacking_of, units_of, width_text

# Float32 logits of the same weights in two processes, as a share of their spread: the order of sums may differ, no more.
TOLERANCE = 1e-4
MAX_SHARD_SIZE = "5GB"


@dataclass(frozen=True)
class Pruned:
    """What is exported.

    Args:
        model: The result of `shrink`, in the dtype to be saved.
        anatomy: Of the dense model.
        architecture: What `model` keeps of it.
        tokenizer: Saved along, if given.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    architecture: Architecture
    tokenizer: PreTrainedTokenizerBase | None = None


def check_hf(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, architecture: Architecture) -> None:
    """Refuse early what `save_hf` would refuse of the dense `model` cut to `architecture`.

    Raises:
        UnsupportedExport: No class can hold it.
    """
    class_for(model, anatomy_of(model), architecture)


def check_stock(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, architecture: Architecture) -> None:
    """Refuse what needs the modelling file.

    Raises:
        UnsupportedExport: No stock config can tell the sizes.
    """
    _, config = class_for(model, anatomy_of(model), architecture)
    if config is None:
        kept = f"equal layers with {width_text(max(architecture.units('attention')), 'KV groups')}"
        what = kept if is_uniform(architecture) else "layers of unequal size"
        raise UnsupportedExport(f"A stock '{model.config.model_type}' config cannot tell {what}: export --format hf.")


def check_padded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, architecture: Architecture) -> None:
    """Refuse early what `save_padded` would refuse of the dense `model` cut to `architecture`.

    Raises:
        UnsupportedExport: No stock config can tell the sizes.
    """
    _stock_sizes(model, anatomy_of(model), architecture)


def save_hf(
    pruned: Pruned,
    out: Path,
    files: Mapping[str, str] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    read: Read | None = None,
) -> Check:
    """Write a folder that `from_pretrained` loads; layers of unequal size need `trust_remote_code=True`.

    Args:
        out: A folder that is empty or does not exist. It appears when everything is written and checked, not before.
        files: More texts for the folder, by file name.
        read: Of a `reader` of "reload_hf.py" that has been started already, which saves seconds.

    Raises:
        UnsupportedExport: `out` is taken.
        ExportFailed: What was written does not load, or computes something else. Nothing is left.
    """
    model = rebuilt(pruned.model, pruned.anatomy, pruned.architecture)
    return save_model(pruned, model, out, files or {}, max_shard_size, read)


def save_padded(
    pruned: Pruned,
    out: Path,
    files: Mapping[str, str] | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    read: Read | None = None,
) -> Check:
    """Write a stock folder with every layer padded by zeros to the widest, as `save_hf`. Same logits; it saves little or nothing."""
    return save_model(pruned, padded(pruned), out, files or {}, max_shard_size, read)


def load_pruned(folder: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a folder written by `save_hf`, `save_padded` or `save_vllm`, without running code from it."""
    loader: Any = local_class(Path(folder)) or AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=dtype or "auto", trust_remote_code=False).eval()


def padded(pruned: Pruned) -> PreTrainedModel:
    """A model of the stock class whose layers all have the widest kept layer's size; what is missing is zero."""
    stock: Any = type(pruned.model)
    *_, config = _stock_sizes(pruned.model, pruned.anatomy, pruned.architecture)
    model: PreTrainedModel = stock(config)
    cast(model, pruned.model.dtype)
    weights = pruned.model.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            source = weights.get(name)  # an absent block has no weights, and all its zeros add nothing
            target.copy_(source) if source is not None and source.shape == target.shape else target.zero_()
        for index, units in enumerate(_units(pruned)):
            _pad_layer(pruned, model, index, units)
    model.generation_config = pruned.model.generation_config
    return model.eval()


def _units(pruned: Pruned) -> list[tuple[int, int]]:
    """Widths of every kept layer."""
    pairs = zip(pruned.architecture.units("attention"), pruned.architecture.neurons, strict=True)
    return [pair for pair in pairs if any(pair)]


def _pad_layer(pruned: Pruned, model: PreTrainedModel, index: int, units: tuple[int, int]) -> None:
    """Put the units of one layer, and the query heads of each, first in every part of the wider projections."""
    anatomy, wide = pruned.anatomy, anatomy_of(model)
    small, target = (anatomy.layers_of(each)[index] for each in (pruned.model, model))
    for block, wide_block, kept in zip(anatomy.blocks, wide.blocks, units, strict=True):
        if not kept:
            continue
        first, queries = torch.arange(units_of(kept)), block.queries - lacking_of(kept)
        heads = (first[:, None] * wide_block.queries + torch.arange(queries)).flatten()
        for (source, _), (projection, rows) in zip(block.inputs_of(small), wide_block.inputs_of(target), strict=True):
            matrix_of(projection)[rows.of(first, heads)] = matrix_of(source)
            if projection.bias is not None:
                projection.bias[rows.of(first, heads)] = source.bias
        columns = expand_units(heads, wide_block.columns_per_unit // wide_block.queries)
        matrix_of(wide_block.output_of(target))[:, columns] = matrix_of(block.output_of(small))


def widest(model: PreTrainedModel, architecture: Architecture) -> Architecture:
    """What a padded folder is as large as: every kept layer as wide as the widest, with as few heads as the family can tell.

    Args:
        model: The dense one; its weights are not looked at.

    Raises:
        UnsupportedExport: No stock config can tell the sizes.
    """
    attention, neurons, _ = _stock_sizes(model, anatomy_of(model), architecture)
    layers = range(len(architecture.neurons))
    kept = [(attention, neurons) if architecture.keeps_layer(layer) else (0, 0) for layer in layers]
    return Architecture.of(*zip(*kept, strict=True))


def _stock_sizes(
    model: PreTrainedModel, anatomy: Anatomy, architecture: Architecture
) -> tuple[int, int, PreTrainedConfig]:
    """Widths of attention and MLP, and the config that tells them."""
    neurons = max(architecture.neurons) or 1
    widths = [width for width in architecture.units("attention") if width]
    for lacking in range(min(map(lacking_of, widths)), -1, -1):
        for groups in range(max(map(units_of, widths)), anatomy.num_key_value_heads + 1):
            attention = attention_width(groups, lacking)
            config = stock_config(model, anatomy, attention, neurons)
            if config is not None:
                return attention, neurons, config
    raise UnsupportedExport(
        f"A stock '{anatomy.family.model_type}' config cannot hold the dense model's own head count: export --format hf."
    )


def save_model(
    pruned: Pruned,
    model: PreTrainedModel,
    out: Path,
    files: Mapping[str, str],
    max_shard_size: int | str,
    read: Read | None,
) -> Check:
    """Save `model`, which is to compute what `pruned` does, and read it back; as `save_hf`."""
    tokens = probe(model, min(PROBE_LENGTH, getattr(model.config, "max_position_embeddings", PROBE_LENGTH)))
    with whole_folder(out, files) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if pruned.tokenizer is not None:
            pruned.tokenizer.save_pretrained(folder)
        with nullcontext(read) if read else reader("reload_hf.py") as ask:
            answer = ask(folder, {"tokens": tokens})
            expected = expected_logits(pruned.model, tokens)  # while the other process reads
            difference = check_equal(answer()["logits"], expected, TOLERANCE)
    return Check("transformers, in a fresh process", difference)
