"""What the dense model predicts, for a student to learn: asked for every batch, or once for every window and then read from disk."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmbo.training.learner import Refitter
from pruning.distillation import distance, divergence, divergence_from, heard, next_tokens
from pruning.likelihood import Distribution, Head, dense_distribution, last_hidden
from pruning.tensor_files import TensorFiles

TOP_K = 512  # tokens kept of each distribution; the rest is one bin
PART = 32  # windows in a file
COMPARED = 4  # places of the residual stream, evenly over the layers that are left
Autocast = Callable[[], AbstractContextManager[object]]


class Teacher(Protocol):
    """What a student's loss is measured from."""

    def compared(self, student: PreTrainedModel) -> Sequence[nn.Module]:
        """The student's layers behind which its residual stream is compared; none where the teacher knows predictions alone."""
        return ()

    def loss(
        self, hidden: Tensor, head: Head, windows: Tensor, places: Tensor, streams: Sequence[Tensor] = ()
    ) -> Tensor:
        """Mean loss over the predicted tokens of a batch, nats.

        Args:
            streams: What the compared layers hand on, `B x T x hidden_size` each.
            hidden: `B x T x hidden_size`, what the student's `head` reads.
            windows: `B x T` token ids, on the same device.
            places: `B` places of the windows among those that are trained on, on the CPU.
        """
        ...


class NextTokens(Teacher):
    """The text itself."""

    def loss(
        self, hidden: Tensor, head: Head, windows: Tensor, places: Tensor, streams: Sequence[Tensor] = ()
    ) -> Tensor:
        return divergence(hidden, head, next_tokens(windows))


@dataclass(frozen=True)
class Streams:
    """Where the residual streams of a small model and its dense one are compared.

    Args:
        weight: Of their distance in the loss.
        own, dense: Layers of either, as many.
    """

    weight: float
    cut: Refitter
    own: tuple[int, ...]
    dense: tuple[int, ...]

    @classmethod
    def of(cls, cut: Refitter, weight: float) -> "Streams":
        """Evenly over the small model's layers, the last among them; each stands for the dropped ones behind it, too."""
        kept = [index for index in range(cut.anatomy.num_hidden_layers) if cut.architecture.keeps_layer(index)]
        own = sorted({-(-len(kept) * part // COMPARED) - 1 for part in range(1, COMPARED + 1)})
        ends = [*(index - 1 for index in kept[1:]), cut.anatomy.num_hidden_layers - 1]
        return cls(weight, cut, tuple(own), tuple(ends[place] for place in own))

    def layers(self, model: PreTrainedModel, places: Sequence[int]) -> Sequence[nn.Module]:
        layers = self.cut.anatomy.layers_of(model)
        return [layers[place] for place in places]


@dataclass(frozen=True)
class Live(Teacher):
    """The dense model, in memory. All that it predicts counts, and with `streams` what its layers hand on."""

    model: PreTrainedModel
    streams: Streams | None = None

    def compared(self, student: PreTrainedModel) -> Sequence[nn.Module]:
        return self.streams.layers(student, self.streams.own) if self.streams else ()

    def loss(
        self, hidden: Tensor, head: Head, windows: Tensor, places: Tensor, streams: Sequence[Tensor] = ()
    ) -> Tensor:
        compared = self.streams.layers(self.model, self.streams.dense) if self.streams else ()
        with torch.no_grad(), heard(compared) as wanted:
            dense = last_hidden(self.model, windows)
        diverged = divergence_from(hidden, head, dense, Head.of(self.model))
        return diverged + self.streams.weight * distance(streams, wanted) if self.streams else diverged


@dataclass(frozen=True)
class Kept(Teacher):
    """Distributions cut to `TOP_K` tokens, on the disk: make one by `of`.

    Disk: 4 bytes for each kept token of a position, 6 where the model knows more than 65,536. Memory: what is asked for.

    Args:
        number: `num_windows`, where each window stands in the files; -1 where it does not.
    """

    files: TensorFiles
    number: Tensor

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        windows: Tensor,
        order: Tensor,
        folder: Path,
        name: str,
        autocast: Autocast,
        on_window: Callable[[int], None] = lambda done: None,
    ) -> "Kept":
        """Ask the dense model, or take what an earlier call has left: a part that is there and whole is not made again.

        Args:
            windows: `num_windows x T` token ids.
            order: Places of those that are needed, in the order in which they will be.
            name: Of the dense model: what another one has left does not count.
        """
        number = torch.full((len(windows),), -1)
        number[order] = torch.arange(len(order))
        needed = windows[order]
        digest = hashlib.sha256(f"{name} {TOP_K} {PART}".encode() + needed.numpy().tobytes()).hexdigest()[:16]
        files, known = TensorFiles(folder / digest), model.config.get_text_config().vocab_size
        for part, own in enumerate(needed.split(PART)):
            if files.get(_part(part), _like(own, known)) is None:
                with autocast():
                    found = dense_distribution(model, own, k=TOP_K)
                top, rest = (values.to(torch.bfloat16) for values in (found.top_logprobs, found.rest_logprobs))
                files.put(_part(part), {"ids": found.top_ids.to(_ids(known)), "top": top, "rest": rest})
            on_window(min(len(needed), (part + 1) * PART))
        return cls(files, number)

    def loss(
        self, hidden: Tensor, head: Head, windows: Tensor, places: Tensor, streams: Sequence[Tensor] = ()
    ) -> Tensor:
        rows = []
        for number in self.number[places].tolist():
            part = self.files.get(_part(number // PART))
            assert part is not None and number >= 0
            rows.append([part[name][number % PART] for name in ("ids", "top", "rest")])
        ids, top, rest = (torch.stack(same) for same in zip(*rows, strict=True))
        device = hidden.device
        target = Distribution(moved(ids.int(), device), moved(top, device), moved(rest, device))
        return divergence(hidden, head, target)


def kept_bytes(windows: int, length: int, vocab_size: int) -> int:
    """What `Kept` takes on the disk."""
    return windows * (length - 1) * (min(TOP_K, vocab_size - 1) * (2 + _ids(vocab_size).itemsize) + 2)


def _ids(vocab_size: int) -> torch.dtype:
    return torch.uint16 if vocab_size <= 1 << 16 else torch.int32


def _like(windows: Tensor, vocab_size: int) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a part, on the meta device."""
    shape = len(windows), windows.shape[1] - 1
    top = *shape, min(TOP_K, vocab_size - 1)
    dtypes = {"ids": (top, _ids(vocab_size)), "top": (top, torch.bfloat16), "rest": (shape, torch.bfloat16)}
    return {name: torch.empty(size, dtype=dtype, device="meta") for name, (size, dtype) in dtypes.items()}


def _part(number: int) -> str:
    return f"part_{number:05d}"


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device, without waiting for what it does."""
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
