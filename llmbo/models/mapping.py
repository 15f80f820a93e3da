"""Weights that stay in their files: mapped into memory, not read into it, so that the kernel may drop their pages at any time.

transformers maps a checkpoint whose tensors are stored in the dtype asked for, and nothing else: what is converted on the way lies
in memory of its own. Of such a checkpoint a copy is kept that can be mapped.
"""

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.models.aliases import cache_dir, kept_folder

MADE_FROM = "made_from.json"
SHARD = 10**9  # bytes of a copy that are in memory while it is written


def is_mapped(model: PreTrainedModel) -> bool:
    """Whether all parameters lie in files. Where the system does not tell which memory does (Linux tells), it is taken for granted."""
    table = Path("/proc/self/maps")
    if not table.exists():
        return True
    lines = [line.split() for line in table.read_text(encoding="utf-8", errors="replace").splitlines()]
    files = [tuple(int(end, 16) for end in area.split("-")) for area, _, _, _, inode, *_ in lines if inode != "0"]
    return all(_within(weight, files) for weight in model.parameters())


def mapped_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, dtype: torch.dtype) -> Path:
    """A folder of the cache with this model in `dtype`, in shards that can be mapped; made on first use, and again when it is damaged.

    Memory: one shard.

    Args:
        source: The local folder or hub name that the model was loaded from.

    Raises:
        ModelError: There is no room for it.
    """
    files = [path for path in sorted(Path(source).glob("*")) if path.suffix in (".json", ".safetensors", ".bin")]
    state = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    place = str(Path(source).resolve()) if files else source
    key = json.dumps([place, getattr(model.config, "_commit_hash", None), state, str(dtype)])

    def write(folder: Path) -> None:
        _save(model, dtype, folder)
        tokenizer.save_pretrained(folder)
        (folder / MADE_FROM).write_text(json.dumps({"source": source, "dtype": str(dtype).removeprefix("torch.")}))

    return kept_folder(_copies_dir() / hashlib.sha256(key.encode()).hexdigest()[:16], write)


@dataclass(frozen=True)
class Copy:
    """A mapped copy in the cache, or what a killed process has left of one."""

    folder: Path
    source: str
    dtype: str
    bytes: int


def copies() -> list[Copy]:
    """All of them. Neither source nor dtype is known of a copy that is unfinished, or older than `made_from.json`."""
    found = []
    for folder in sorted(_copies_dir().glob("*/")):
        made_from, unfinished = {}, folder.name.startswith(".")
        with contextlib.suppress(OSError, ValueError):
            made_from = json.loads((folder / MADE_FROM).read_bytes())
        source = "unfinished" if unfinished else made_from.get("source", "unknown")
        size = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
        found.append(Copy(folder, source, made_from.get("dtype", ""), size))
    return found


def clear_copies() -> int:
    """Remove all copies but those that are being written; the bytes that were freed. Models that are loaded keep theirs mapped."""
    freed = 0
    for copy in copies():
        target = copy.folder.name.removeprefix(".").partition(".")[0]
        with contextlib.suppress(Timeout), FileLock(copy.folder.with_name(f"{target}.lock"), timeout=0):
            shutil.rmtree(copy.folder)
            freed += copy.bytes
    return freed


def _copies_dir() -> Path:
    return cache_dir() / "mapped"


def _within(weight: Tensor, areas: list[tuple[int, ...]]) -> bool:
    start = weight.data_ptr()
    return any(first <= start and start + weight.nbytes <= last for first, last in areas)


def _save(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    """As `save_pretrained`, but cast on the way. A parameter that is kept in a dtype of its own stays in it."""
    own = {name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named}  # tied ones once
    weights = {name: weight for name, weight in model.state_dict().items() if name in own}
    most = SHARD * model.dtype.itemsize // dtype.itemsize  # it is planned by what the weights are now
    plan = split_torch_state_dict_into_shards(weights, max_shard_size=most)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _cast(weights[name], model.dtype, dtype).contiguous() for name in names}
        save_file(shard, folder / file, {"format": "pt"})
        del shard
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def _cast(weight: Tensor, stored: torch.dtype, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if weight.dtype == stored else weight
