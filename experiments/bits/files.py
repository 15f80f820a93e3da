"""One file and what its weights are worth: bytes, and KL of a model in torch that has the file's own weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruning.cost import cost_of
from pruning.export import Pruned
from pruning.export.gguf_file import write_gguf
from pruning.export.llama_cpp import with_weights_of
from pruning.export.quantise import Mixture
from pruning.export.reader import reader
from pruning.export.verify import expected_logits
from pruning.likelihood import DenseDistribution, window_qualities


@dataclass(frozen=True)
class Row:
    """One file.

    Args:
        share: Of the decoder blocks' parameters.
        size: Bytes of the file.
        kls: Of its weights from the dense model, nats per token, window by window.
    """

    share: float
    kind: str
    size: int
    kls: tuple[float, ...]

    @property
    def kl(self) -> float:
        return fmean(self.kls)

    def __str__(self) -> str:
        return f"{self.share:8.3f}  {self.kind:24} {self.size / 1e6:6.1f}  {self.kl:6.4f}"


def measured(
    pruned: Pruned, path: Path, mixture: Mixture, windows: Tensor, dense: DenseDistribution, calibration: Tensor
) -> Row:
    """The file of one mixture of types, written to `path`, and what its weights compute.

    Args:
        windows: To judge on, `num_windows x length`; `dense` was taken on them.
        calibration: For K-quants.
    """
    write_gguf(pruned, path, mixture, "bits", calibration)
    found = window_qualities(with_weights_of(pruned, path), windows, dense).kl
    assert found is not None  # there is a dense model to compare with
    share = cost_of(pruned.anatomy, pruned.architecture).share
    return Row(share, mixture.name, path.stat().st_size, tuple(found.tolist()))


def better(rows: Sequence[Row]) -> list[Row]:
    """Those that no other beats in both, by size."""
    return sorted(
        (row for row in rows if not any(other.size <= row.size and other.kl < row.kl for other in rows)),
        key=lambda row: row.size,
    )


def in_both(pruned: Pruned, path: Path, windows: Tensor, dense: PreTrainedModel) -> tuple[float, float]:
    """KL over the whole vocabulary of what torch and llama.cpp compute from a file, nats per token."""
    with reader("reload_gguf.py") as read:
        found = read(path, {"tokens": windows, "text": torch.zeros(0, dtype=torch.uint8)})()["logits"]
    own, expected = (expected_logits(model, windows) for model in (with_weights_of(pruned, path), dense))
    first, second = (
        nn.functional.kl_div(
            logits[:, :-1].log_softmax(-1), expected[:, :-1].log_softmax(-1), reduction="sum", log_target=True
        )
        for logits in (own, found)
    )
    tokens = windows[:, 1:].numel()
    return float(first) / tokens, float(second) / tokens
