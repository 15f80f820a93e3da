"""Compare what a result computes, read back in a fresh process, with the model in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruning.errors import ExportFailed
from pruning.export.rebuild import cast

PROBE_WINDOWS, PROBE_LENGTH = 2, 32


@dataclass(frozen=True)
class Check:
    """How a result was found to be right.

    Args:
        by: Who read it back.
        difference: Of its logits (of its weights, if nobody here can run it) from the model in memory, in units of their spread.
        notes: What else a user should know of the result, a line each.
    """

    by: str
    difference: float
    notes: tuple[str, ...] = ()


def probe(model: PreTrainedModel, length: int = PROBE_LENGTH) -> Tensor:
    """Random token ids, `PROBE_WINDOWS x length`: every token is as likely as any to show a fault."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (PROBE_WINDOWS, length), generator=rng)


def difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference in units of the expected logits' own spread, 0 for equal ones."""
    expected, found = expected.cpu().double(), found.cpu().double()
    return float((found - expected).pow(2).mean().sqrt() / expected.std())


@torch.no_grad()
def expected_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the reading programs must find: computed in float32 (or better), since coarser sums differ by several percent.

    The model is widened in place and narrowed again, which changes no weight.

    Args:
        model: On the CPU, where it will be read back.
    """
    dtype = model.dtype
    cast(model, torch.promote_types(dtype, torch.float32))
    try:
        logits: Tensor = model(tokens, use_cache=False).logits.float()
        return logits
    finally:
        cast(model, dtype)


def check_equal(found: Tensor, expected: Tensor, tolerance: float) -> float:
    """The difference, if it is small enough.

    Raises:
        ExportFailed: It is not.
    """
    apart = difference(found, expected)
    if not apart <= tolerance:  # NaN is refused too
        raise ExportFailed(
            f"The result was written but computes something else (logits differ by {apart:.2g} of their spread, "
            f"{tolerance:.2g} is allowed), so it was deleted."
        )
    return apart
