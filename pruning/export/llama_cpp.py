"""A folder with one GGUF file, read back by llama.cpp itself where it is installed."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGUFReader
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import ExportFailed
from pruning.export.folder import whole_folder
from pruning.export.gguf_file import check_gguf, gguf_tensors, write_gguf
from pruning.export.gguf_tokenizer import check_tokenizer
from pruning.export.hf import Pruned
from pruning.export.reader import reader
from pruning.export.rebuild import context_length
from pruning.export.verify import PROBE_LENGTH, Check, check_equal, difference, expected_logits, probe

# Logits in llama.cpp as a share of their spread. On SmolLM2 f16 differs by 0.004 and 0.03 (dense, half of all neurons gone), but
# q8_0 by 0.07 and 0.76: coarse numbers differ by as much as a mistake would. So those are checked in f16, and their weights apart.
TOLERANCE = 0.2
LOSSLESS = ("f32", "f16")
WEIGHT_TOLERANCE = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 1e-2}
SAMPLE = "Hello world, it's 2026: 12345.67!\n\n    def café(x):\n\treturn x ** 2  # «naïve» 数字 😀 ...  end"


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture) -> None:
    """Refuse early what `save_gguf` would refuse.

    Args:
        model: The dense model.
        architecture: What is to be kept of it.

    Raises:
        UnsupportedExport: GGUF or llama.cpp has no place for the architecture or the tokenizer.
    """
    check_gguf(model.config, anatomy_of(model), architecture)
    check_tokenizer(tokenizer)


def save_gguf(
    pruned: Pruned, out: Path, files: Mapping[str, str] | None = None, dtype: str = "f16", name: str = "model"
) -> Check:
    """Write `out/NAME-DTYPE.gguf`, tokenizer and chat template included.

    Args:
        out: A folder that is empty or does not exist. It appears when everything is written and checked, not before.
        files: More texts for the folder, by file name.
        dtype: f32, f16, bf16 or q8_0.

    Raises:
        UnsupportedExport: GGUF or llama.cpp has no place for the architecture, tokenizer or dtype, or `out` is taken.
        ExportFailed: What was written does not load, or computes something else. Nothing is left.
    """
    with whole_folder(out, files or {}) as folder:
        path = folder / f"{name}-{dtype}.gguf"
        write_gguf(pruned, path, dtype, name)
        if importlib.util.find_spec("llama_cpp") is None:
            return Check(
                "reading its tensors back (llama-cpp-python is not installed)", _read_back(pruned, path, dtype)
            )
        if dtype in LOSSLESS:
            return Check("llama.cpp, in a fresh process", _run(pruned, path))
        _read_back(pruned, path, dtype)
        _logits(pruned, path)  # llama.cpp loads and runs it
        twin = folder / "f16.gguf"
        write_gguf(pruned, twin, "f16", name)
        apart = _run(pruned, twin)
        twin.unlink()
        return Check("llama.cpp, in a fresh process (logits of the same model in f16)", apart)


def _run(pruned: Pruned, path: Path) -> float:
    """How far llama.cpp's logits are from those of the model in memory."""
    tokens, found = _logits(pruned, path)
    return check_equal(found, expected_logits(pruned.model, tokens), TOLERANCE)


def _logits(pruned: Pruned, path: Path) -> tuple[Tensor, Tensor]:
    """Probe tokens and what llama.cpp makes of them; the splitting of a sample text is compared on the way."""
    tokens = probe(pruned.model, min(PROBE_LENGTH, context_length(pruned.model.config)))
    text = SAMPLE.encode() if pruned.tokenizer is not None else b""
    sample = torch.tensor(list(text), dtype=torch.uint8)
    with reader("reload_gguf.py") as read:
        found = read(path, {"tokens": tokens, "text": sample})
    if pruned.tokenizer is not None:
        _check_ids(found["ids"].tolist(), pruned.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    if not found["logits"].isfinite().all():
        raise ExportFailed("llama.cpp computes infinite logits from the file, so it was deleted.")
    return tokens, found["logits"]


def _check_ids(found: list[int], expected: list[int]) -> None:
    if found != expected:
        first = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), len(found))
        raise ExportFailed(
            f"llama.cpp splits a sample text into other tokens than the model's tokenizer (from token {first} on), "
            "so the file was deleted: export --format hf."
        )


def _read_back(pruned: Pruned, path: Path, dtype: str) -> float:
    """The largest difference of a tensor in the file from the one in memory."""
    written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    apart = 0.0
    for name, values in gguf_tensors(pruned):
        tensor = written.pop(name)
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        apart = max(apart, _weights_apart(found, torch.from_numpy(values)))
    if written or apart > WEIGHT_TOLERANCE[dtype]:
        raise ExportFailed("The file holds other weights than the model, so it was deleted.")
    return apart


def _weights_apart(found: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(found, expected) else difference(found, expected)
