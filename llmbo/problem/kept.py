"""What preparations leave on disk for later ones, each in a folder named after all that it was made from."""

import contextlib
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from llmbo.errors import first_line
from llmbo.models.aliases import cache_dir
from llmbo.models.loading import LoadedModel
from llmbo.problem.shared import Shared
from llmbo.version import __version__
from pruning.block import BlockKind
from pruning.compensation import Ridge
from pruning.refits import Order
from pruning.tensor_files import TensorFiles

MADE_FROM = "made_from.json"
OWN = "prepared"  # in the run's folder


def prepared_dir() -> Path:
    """Where preparations are kept: `LLMBO_PREPARED`, or the folder `prepared` of the model cache."""
    return Path(os.environ.get("LLMBO_PREPARED") or cache_dir() / "prepared").expanduser()


def files_of(
    loaded: LoadedModel,
    windows: torch.Tensor,
    widths: Mapping[BlockKind, Sequence[int]] | None,
    ridge: Ridge,
    order: Order,
    scored: int,
    tell: Callable[[str], None],
    shared: Shared | None = None,
) -> TensorFiles:
    """The files of the preparation of a model on `num_windows x length` token ids, as `pruning.refits.fit` is asked for it.

    Args:
        shared: The run's, which is taken from where it is the same.

    Raises:
        ModelError: It is not.
    """
    made_from: Mapping[str, Any] = {
        "model": loaded.fingerprint,
        "weights": _checksum(loaded.model),
        "text": hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16],
        "windows": list(windows.shape),
        "scored": scored,
        "widths": {kind: list(units) for kind, units in (widths or {}).items()},
        "ridge": asdict(ridge),
        "order": order,
        "dtype": loaded.dtype,
        "device": torch.device(loaded.device).type,
        "versions": {"llmbo": __version__, **{package: version(package) for package in ("torch", "transformers")}},
    }
    if shared is not None:
        made_from = shared.same(made_from)
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = prepared_dir() / key

    def begin(folder: Path) -> None:
        own = (
            folder / f".{MADE_FROM}.{os.getpid()}"
        )  # others may read it meanwhile, on a folder that several machines share
        own.write_text(json.dumps({"name": loaded.name, **made_from}, indent=1))
        own.replace(folder / MADE_FROM)

    with contextlib.suppress(OSError):  # whoever writes the tensors will say so
        folder.mkdir(parents=True, exist_ok=True)
        begin(folder)
        os.utime(folder)
    return TensorFiles(folder, tell, begin, fetch=shared.fetch if shared else None)


def made_from(files: TensorFiles) -> dict[str, Any]:
    """What a preparation was made from; nothing where its files are not on disk."""
    if files.folder is None:
        return {}
    found: dict[str, Any] = json.loads((files.folder / MADE_FROM).read_bytes())
    del found["name"]
    return found


def _checksum(model: PreTrainedModel) -> str:
    """Of all weights, about a second per gigabyte: a fingerprint takes samples, and a model may be changed in place."""
    total = 0
    for weight in model.state_dict().values():
        total = zlib.crc32(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def own_files(run: Path, tell: Callable[[str], None] = lambda line: None, shared: Shared | None = None) -> TensorFiles:
    """What a run has kept of its preparation. Nothing is measured of what is cut from it, so it is read with care.

    Args:
        shared: Where the run has put it for other machines; what is not here is taken from there.
    """
    return TensorFiles(run / OWN, tell, checked=True, fetch=shared.fetch if shared else None)


def hand_on(files: TensorFiles, run: Path, names: Iterable[str], tell: Callable[[str], None]) -> None:
    """Give a run's folder its ranking and refits, so that its trials can be cut without preparing anything again.

    They are the same files wherever the file system can link them, so they take no more room until the cache is cleared.
    """
    try:
        files.hand_on(run / OWN, names)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        tell(f"Cannot keep the refits in '{run / OWN}' ({reason}): an export will prepare them again.")


def forget(run: Path) -> None:
    """Remove what a run has kept of its preparation."""
    shutil.rmtree(run / OWN, ignore_errors=True)


def digest(*parts: Any) -> str:
    """A name for a stage of a preparation, by what it depends on beside the preparation itself."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Kept:
    """A preparation on disk. `used` is when it was last begun or taken up, in seconds since 1970."""

    folder: Path
    model: str
    dtype: str
    tokens: int
    bytes: int
    used: float

    @property
    def days(self) -> float:
        return (time.time() - self.used) / 86400


def kept() -> list[Kept]:
    """All preparations, the latest used first."""
    found = []
    for folder in prepared_dir().glob("*/"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            made_from = json.loads((folder / MADE_FROM).read_bytes())
            tokens = int(made_from["windows"][0]) * int(made_from["windows"][1])
            size = _size(folder)
            found.append(
                Kept(folder, str(made_from["name"]), str(made_from["dtype"]), tokens, size, folder.stat().st_mtime)
            )
    return sorted(found, key=lambda one: -one.used)


def clear() -> int:
    """Remove all preparations, whole or not; the bytes that were freed. Runs keep what they have of them."""
    freed = 0
    for folder in prepared_dir().glob("*/"):
        if (folder / MADE_FROM).exists():
            freed += _size(folder)
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.cleared")))  # a run may be writing into it
    return freed


def _size(folder: Path) -> int:
    size = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a run is writing into it
            size += path.stat().st_size
    return size
