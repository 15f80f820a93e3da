"""From the host to a device: copies that a CUDA device makes while it computes, and memory that it copies from directly."""

from collections.abc import Sequence
from functools import lru_cache

import psutil
import torch
from torch import Tensor

CHUNK_BYTES = 1 << 30  # of page-locked memory that is taken at once: torch rounds each piece up to a power of two
ALIGNED = 512  # bytes: where pieces of a chunk begin


class Coming:
    """Tensors on their way to a device; those that are there already are views.

    The room is taken in the order of the stream that computes, and the copy waits for what that stream has been given so far. So room
    that is freed is used again at once, and what is begun before a layer is computed comes beside it.
    """

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        self._arrived: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensors = [None if each is None else each.to(device, non_blocking=True) for each in tensors]
            return
        self._tensors = [None if each is None else torch.empty_like(each, device=device) for each in tensors]
        computing, copying = torch.cuda.current_stream(device), _copying(device)
        copying.wait_stream(computing)
        with torch.cuda.stream(copying):
            for there, each in zip(self._tensors, tensors, strict=True):
                if there is not None and each is not None:
                    there.copy_(each, non_blocking=True)
            self._arrived = copying.record_event()

    def here(self) -> list[Tensor | None]:
        """The tensors on the device: whatever is computed from now on waits for them, the host does not."""
        if self._arrived is not None:
            self._arrived.wait()
            self._arrived = None
        return self._tensors


@lru_cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class PinnedMemory:
    """Room in the host's memory that a CUDA device copies from directly, never given back.

    Args:
        most: Bytes that it may take.
        spare: Bytes that stay free on the host whoever takes the others: several processes may fill memory of their own at once.
    """

    def __init__(self, most: int, spare: int = 0) -> None:
        self._left, self._spare = most, spare
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor | None:
        """A copy of a tensor there; None where there is no room for it."""
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        if self._used + size > len(self._chunk) and (size > CHUNK_BYTES or not self._more()):
            return None
        kept = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += size
        return kept.copy_(tensor)

    def _more(self) -> bool:
        """Whether there is another chunk. A host may refuse to lock what it has free: then what is there has to do."""
        if self._left < CHUNK_BYTES or psutil.virtual_memory().available - CHUNK_BYTES < self._spare:
            return False
        pinned = torch.cuda.is_available()  # nothing else can, or has to be copied from
        try:
            self._chunk, self._used = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned), 0
        except RuntimeError:
            self._left = 0
            return False
        self._left -= CHUNK_BYTES
        return True
