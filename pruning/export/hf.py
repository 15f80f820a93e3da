"""Hugging Face folders: with per-layer widths, or zero-padded to a uniform shape. Both are read back before they appear."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pruning.anatomy import Anatomy
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.folder import whole_folder
from pruning.export.rebuild import MODELS, cast, config_fields, described, local_class, rebuilt
from pruning.export.verify import Check, check_equal, expected_logits, probe, reloaded

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


def save_hf(
    pruned: Pruned, out: Path, files: Mapping[str, str] | None = None, max_shard_size: str = MAX_SHARD_SIZE
) -> Check:
    """Write a folder that `from_pretrained` loads; layers of unequal size need `trust_remote_code=True`.

    Args:
        out: A folder that is empty or does not exist. It appears when everything is written and checked, not before.
        files: More texts for the folder, by file name.

    Raises:
        UnsupportedExport: The family has no model class for unequal layers, or `out` is taken.
        ExportFailed: What was written does not load, or computes something else. Nothing is left.
    """
    config = described(pruned.model.config, pruned.anatomy, pruned.architecture)
    return _save(pruned, rebuilt(pruned.model, config), out, files or {}, max_shard_size)


def save_padded(
    pruned: Pruned, out: Path, files: Mapping[str, str] | None = None, max_shard_size: str = MAX_SHARD_SIZE
) -> Check:
    """Write a stock folder with every layer padded by zeros to the widest. Same logits; it saves little or nothing."""
    return _save(pruned, padded(pruned), out, files or {}, max_shard_size)


def load_pruned(folder: Path | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a folder written by `save_hf` or `save_padded`, without running code from it."""
    loader: Any = local_class(Path(folder)) or AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype=dtype or "auto").eval()


def padded(pruned: Pruned) -> PreTrainedModel:
    """A model of the stock class whose layers all have the widest kept layer's size; what is missing is zero."""
    check_padding(pruned.anatomy.family.model_type)
    stock: Any = type(pruned.model)
    model = stock(_padded_config(pruned))
    cast(model, pruned.model.dtype)
    weights = pruned.model.state_dict()
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.zero_()
            if name in weights:  # the weights of an absent block stay zero
                source = weights[name]
                target[tuple(slice(0, size) for size in source.shape)] = source
    model.generation_config = pruned.model.generation_config
    result: PreTrainedModel = model.eval()
    return result


def check_padding(model_type: str) -> None:
    """Refuse families whose fused projections zeros would split in the wrong places.

    Raises:
        UnsupportedExport: Of another family than those with a class in `rebuild.MODELS`.
    """
    if model_type not in MODELS:
        raise UnsupportedExport(f"Padding knows the families {', '.join(sorted(MODELS))}, not '{model_type}'.")


def _padded_config(pruned: Pruned) -> PreTrainedConfig:
    config, anatomy = pruned.model.config, pruned.anatomy
    stock: Any = type(config)
    neurons = max(pruned.architecture.neurons) or 1
    for groups in range(max(pruned.architecture.kv_groups), anatomy.num_key_value_heads + 1):
        try:
            return stock(
                **config_fields(config),
                head_dim=anatomy.head_dim,
                num_attention_heads=groups * anatomy.queries_per_group,
                num_key_value_heads=groups,
                intermediate_size=neurons,
            )
        except StrictDataclassClassValidationError:  # Llama wants heads that divide the hidden size
            continue
    raise UnsupportedExport(f"A stock '{config.model_type}' config cannot hold the dense model's own head count.")


def _save(pruned: Pruned, model: PreTrainedModel, out: Path, files: Mapping[str, str], max_shard_size: str) -> Check:
    tokens = probe(model)
    with whole_folder(out, files) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        if pruned.tokenizer is not None:
            pruned.tokenizer.save_pretrained(folder)
        found = reloaded("reload_hf.py", folder, {"tokens": tokens})["logits"]
        difference = check_equal(found, expected_logits(pruned.model, tokens), TOLERANCE)
    return Check("transformers, in a fresh process", difference)
