"""What is known of a checkpoint without reading its weights: how it is built, and how much it takes where it is stored."""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmbo.errors import ModelError
from llmbo.models.loading import Found, told
from pruning.anatomy import Anatomy, anatomy_of
from pruning.errors import UnsupportedModel

WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")  # beside them a hub's folder may hold the same in other forms


@dataclass(frozen=True)
class StoredWeights:
    """Safetensors files of a checkpoint.

    Args:
        here: All of them are on this machine.
    """

    bytes: int
    files: int
    here: bool


def anatomy_of_config(found: Found) -> Anatomy:
    """Of the model that this config makes; as `model_of_config`."""
    return anatomy_of(model_of_config(found))


def model_of_config(found: Found, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that this config makes; nothing is allocated.

    Args:
        dtype: That it would be loaded in; by default what the config says.

    Raises:
        ModelError: It cannot be built, or pruned.
    """
    with told(found.name, found.source):
        try:
            with torch.device("meta"):
                kind = {"dtype": dtype} if dtype else {}
                model: PreTrainedModel = AutoModelForCausalLM.from_config(found.config, trust_remote_code=False, **kind)
            anatomy_of(model)
        except UnsupportedModel as error:
            raise ModelError(f"Cannot prune '{found.name}'. {error}") from error
    return model


def stored_weights(source: str) -> StoredWeights | None:
    """Sizes of files in a folder, of a hub name in the cache or as the hub tells them; None where nothing can be told.

    Args:
        source: A folder or a hub name.
    """
    folder = Path(source)
    if not folder.is_dir():
        cached = try_to_load_from_cache(source, "config.json")
        found = _in_folder(Path(cached).parent) if isinstance(cached, str) else None
        return found if found and found.here else _on_hub(source) or found
    return _in_folder(folder)


def _in_folder(folder: Path) -> StoredWeights | None:
    """The index says how much there should be, files how much there is."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return StoredWeights(single.stat().st_size, 1, True)
    with suppress(
        OSError, ValueError, LookupError, TypeError, AttributeError
    ):  # loading will say what is wrong with it
        parts = json.loads(index.read_bytes())
        files = {folder / name for name in parts["weight_map"].values()}
        here = all(file.is_file() for file in files)
        size = sum(file.stat().st_size for file in files) if here else int(parts["metadata"]["total_size"])
        return StoredWeights(size, len(files), here)
    return None


def _on_hub(name: str) -> StoredWeights | None:
    with suppress(Exception):  # out of reach, or a name that it does not have: the config alone must do
        siblings = HfApi().model_info(name, files_metadata=True, timeout=10).siblings or []
        sizes = [file.size or 0 for file in siblings if WEIGHTS.fullmatch(file.rfilename)]
        return StoredWeights(sum(sizes), len(sizes), False) if sizes else None
    return None
