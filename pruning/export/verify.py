"""Read a result back in a fresh process and compare what it computes with the model in memory."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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
    """

    by: str
    difference: float


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


def reloaded(program: str, path: Path, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `program`, a file beside this one, computes from `path` and `given` in a process of its own.

    Raises:
        ExportFailed: The program failed; its last words are told.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, found = Path(scratch, "asked"), Path(scratch, "found")
        save_file(dict(given), asked)
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,  # the modelling file is compiled here, not in the user's cache
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        command = [sys.executable, "-I", str(Path(__file__).with_name(program)), str(path), str(asked), str(found)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise ExportFailed(f"The result could not be loaded in a fresh process and was deleted: {said}")
        return load_file(found)


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
