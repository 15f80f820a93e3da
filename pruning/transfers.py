"""From the host to a device: copies that a CUDA device makes while it computes, and memory that it copies from directly."""

from collections.abc import Sequence
from functools import lru_cache

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
    """Room in the host's memory that a CUDA device copies from directly, up to `most` bytes, never given back."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def keep(self, tensor: Tensor) -> Tensor | None:
        """A copy of a tensor there; None where there is no room for it."""
        size = -(-tensor.nbytes // ALIGNED) * ALIGNED
        if self._used + size > len(self._chunk):
            if size > CHUNK_BYTES or self._left < CHUNK_BYTES:
                return None
            pinned = torch.cuda.is_available()  # nothing else can, or has to be copied from
            self._chunk, self._used = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pinned), 0
            self._left -= CHUNK_BYTES
        kept = self._chunk[self._used : self._used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._used += size
        return kept.copy_(tensor)
