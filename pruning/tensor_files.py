"""Named sets of tensors that are computed once: a safetensors file each, or memory where the disk does not take them."""

import contextlib
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pruning.errors import DamagedTensors

Tensors = Mapping[str, Tensor]
Fetch = Callable[
    [str, int, Path], bool
]  # a set's name, the most bytes that it may take, where to; whether it was there
SUFFIX, UNFINISHED = ".safetensors", ".partial"
HEADER = 4096, 512  # bytes that a file may take beside its tensors: in all, and for each of them
STALE = 3600.0  # seconds without a write after which whoever was writing a file is gone


class TensorFiles:
    """Sets of tensors by name, below a folder. A file is whole or not there; one that cannot be read counts as not there.

    Memory: what the disk did not take. What it did is mapped, so the kernel may drop it.

    Args:
        folder: Made when the first set is kept, and anew should it be removed; None keeps all in memory.
        tell: Is told once, in a line, that the disk takes no more.
        begin: Called with the folder whenever it has been made.
        checked: Read every tensor against the checksum that it was written with.
        fetch: Is asked for a set that is not there whole, and brings its file from elsewhere.
    """

    def __init__(
        self,
        folder: Path | None,
        tell: Callable[[str], None] = lambda line: None,
        begin: Callable[[Path], object] = lambda folder: None,
        checked: bool = False,
        fetch: Fetch | None = None,
    ) -> None:
        self._checked = checked
        self._fetch = fetch
        self.folder = folder
        self._tell = tell
        self._begin = begin
        self._memory: dict[str, Tensors] = {}
        self._open: dict[str, Tensors] = {}

    def get(self, name: str, like: Tensors | None = None, finite: bool = False) -> Tensors | None:
        """A set on the CPU, read when its tensors are asked for; None if there is none.

        Args:
            like: Tensors (on the meta device will do) with the names, shapes and dtypes that the set must have to count as there.
            finite: It must hold no NaN or infinite number either, for which it is read.

        Raises:
            DamagedTensors: What was fetched is another set.
        """
        found = self._found(name)
        if like is not None and (found is None or _described(found) != _described(like)):
            found = self._fetched(name, like)
        if found is None:
            return None
        return None if finite and not all(bool(part.isfinite().all()) for part in found.values()) else found

    def _found(self, name: str) -> Tensors | None:
        if name in self._memory:
            return self._memory[name]
        if name not in self._open:
            if self.folder is None:
                return None
            try:
                self._open[name] = _Mapped(self.path(name), self._checked)
            except (OSError, SafetensorError):
                return None
        return self._open[name]

    @property
    def read(self) -> list[str]:
        """The sets that were taken from files or put into some."""
        return sorted(self._open)

    def path(self, name: str) -> Path:
        """The file of a set."""
        assert self.folder is not None
        return self.folder / f"{name}{SUFFIX}"

    def _fetched(self, name: str, like: Tensors) -> Tensors | None:
        """A set that is brought from elsewhere; asked only with what it must be like, which says how large it may be."""
        if self._fetch is None or self.folder is None:
            return None
        most = HEADER[0] + sum(HEADER[1] + tensor.nbytes for tensor in like.values())
        try:
            with self._new(name) as temporary:
                if not self._fetch(name, most, temporary):
                    return None
                try:
                    if _described(_Mapped(temporary, False)) != _described(like):
                        raise DamagedTensors(f"What was fetched as '{name}' holds other tensors than are needed here.")
                except SafetensorError as error:
                    raise DamagedTensors(f"What was fetched as '{name}' is no safetensors file.") from error
                os.replace(temporary, self.path(name))
        except OSError as error:
            self._full(error)
            return None
        self._open.pop(name, None)
        return self._found(name)

    def put(self, name: str, tensors: Tensors) -> Tensors:
        """Keep a set, in place of an older one; as `get` will give it."""
        tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self._open.pop(name, None)
        if self.folder is not None:
            try:
                self._write(name, tensors)
            except (OSError, SafetensorError) as error:
                self._full(error)
            else:
                self._memory.pop(name, None)
                found = self.get(name)
                if found is not None:
                    return found
        self._memory[name] = tensors
        return tensors

    def once(self, name: str, compute: Callable[[], Tensors], like: Tensors | None = None) -> Tensors:
        """The set that is there, see `get`, or what `compute` gives, which is kept."""
        found = self.get(name, like, finite=True)
        return self.put(name, compute()) if found is None else found

    def hand_on(self, folder: Path, names: Iterable[str]) -> None:
        """Put sets into another folder, too: as links to the same files where the file system can, as copies where not.

        Raises:
            OSError, SafetensorError: The folder cannot take them.
        """
        folder.mkdir(parents=True, exist_ok=True)
        there = TensorFiles(folder)
        for name in names:
            found = self.get(name)
            if found is None or there.get(name) is not None:
                continue
            if name in self._open and self.folder is not None:
                with contextlib.suppress(OSError):
                    os.link(self.path(name), there.path(name))
                    continue
            there._write(name, found)

    def _full(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        self._tell(f"Cannot keep what is prepared in '{self.folder}' ({reason}): the run goes on without.")
        self.folder = None

    def _write(self, name: str, tensors: Tensors) -> None:
        with self._new(name) as temporary:
            save_file(dict(tensors), temporary, {key: _checksum(tensor) for key, tensor in tensors.items()})
            os.replace(temporary, self.path(name))

    @contextmanager
    def _new(self, name: str) -> Iterator[Path]:
        """A file beside the set's, to be written and moved in its place; else it is removed."""
        path = self.path(name)
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._begin(path.parent)
        _remove_leftovers(path.parent)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{name}.", suffix=UNFINISHED, delete=False) as file:
            temporary = Path(file.name)
        try:
            temporary.chmod(0o644)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """What killed processes have left. Should one live after all, it finds its file gone and keeps the set in memory."""
    for path in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


def _described(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    look = tensors.mapped if isinstance(tensors, _Mapped) else tensors.__getitem__
    return {name: (tensor.shape, tensor.dtype) for name, tensor in ((name, look(name)) for name in tensors)}


def _checksum(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data):08x}"


class _Mapped(Mapping[str, Tensor]):
    """A safetensors file as a mapping whose values are views of the mapped file."""

    def __init__(self, path: Path, checked: bool) -> None:
        self._path = path
        self._file = safe_open(path, "pt")
        self._names = list(self._file.keys())
        self._sums = self._file.metadata() if checked else None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self.mapped(name)
        if self._sums is not None and self._sums.get(name) != _checksum(tensor):
            raise DamagedTensors(f"The file '{self._path}' is damaged: remove it, and it is made anew.")
        return tensor

    def mapped(self, name: str) -> Tensor:
        """The tensor, whose values nobody has read yet."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
