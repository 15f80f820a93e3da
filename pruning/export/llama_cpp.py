"""A folder with one GGUF file, read back by llama.cpp itself where it is installed."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
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
from pruning.export.gguf_file import check_gguf, gguf_architecture, gguf_tensors, write_gguf
from pruning.export.gguf_tensors import with_matrices
from pruning.export.gguf_tokenizer import check_tokenizer
from pruning.export.hf import Pruned
from pruning.export.quantise import Mixture, told
from pruning.export.reader import reader
from pruning.export.rebuild import context_length
from pruning.export.searched import searched
from pruning.export.verify import PROBE_LENGTH, Check, check_equal, difference, expected_logits, probe

# Logits in llama.cpp as a share of their spread. On SmolLM2 f16 differs by 0.004 and 0.03 (dense, half of all neurons gone), which its
# 16-bit sums explain. Of coarser matrices it rounds the inputs to eight bits, too: by 0.07 dense and 0.3 pruned without repair, where
# another model's logits differ by 1.4. So those are compared twice, the other time with the very weights of the file in f16.
TOLERANCE = 0.2
COARSE = 0.7
LOSSLESS = ("f32", "f16")
# Of weights, as a share of their spread. Blocks with one large value among small ones lose most.
WEIGHT_TOLERANCE = {"F32": 0.0, "F16": 1e-3, "BF16": 4e-3, "Q8": 1e-2, "Q6": 0.05, "Q5": 0.15, "Q4": 0.3}
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
    pruned: Pruned,
    out: Path,
    files: Mapping[str, str] | None = None,
    dtype: str = "f16",
    name: str = "model",
    windows: Tensor | None = None,
    title: str = "",
    on_layer: Callable[[int], None] = lambda done: None,
) -> Check:
    """Write `out/NAME-DTYPE.gguf`, tokenizer and chat template included.

    Args:
        out: A folder that is empty or does not exist. It appears when everything is written and checked, not before.
        files: More texts for the folder, by file name.
        dtype: A file type of llama.cpp, one of `FILE_TYPES`, `recipe:FILE` or `searched:BYTES` (see `Mixture.of`).
        windows: As in `write_gguf`; `searched:` fits to all of it.
        title: The model's name in the file, by default `name`.
        on_layer: As in `searched`.

    Raises:
        UnsupportedExport: GGUF or llama.cpp has no place for the architecture, tokenizer or dtype, or `out` is taken.
        ExportFailed: What was written does not load, or computes something else. Nothing is left.
    """
    mixture = Mixture.of(dtype)
    with whole_folder(out, files or {}) as folder:
        path = folder / f"{name}-{mixture.name}.gguf"
        notes: tuple[str, ...] = ()
        if mixture.size:
            assert windows is not None  # costs cannot be told without text
            pruned, mixture, note = searched(pruned, mixture.size, windows, title or name, on_layer)
            notes = (note,)
        notes += told(write_gguf(pruned, path, mixture, title or name, windows))
        if importlib.util.find_spec("llama_cpp") is None:
            how = "reading its tensors back (llama-cpp-python is not installed)"
            return Check(how, _read_back(pruned, path), notes)
        if mixture.name in LOSSLESS:
            return Check("llama.cpp, in a fresh process", _run(pruned, path, TOLERANCE), notes)
        _read_back(pruned, path)
        same = replace(pruned, model=with_weights_of(pruned, path))
        _run(same, path, COARSE)
        twin = folder / "f16.gguf"
        write_gguf(same, twin, Mixture.of("f16"), name)
        apart = _run(same, twin, TOLERANCE)
        twin.unlink()
        return Check("llama.cpp, in a fresh process (logits of the file's own weights in f16)", apart, notes)


def with_weights_of(pruned: Pruned, path: Path) -> PreTrainedModel:
    """A copy of the model in float32 that computes with the weights of a GGUF file of it."""
    held = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    return with_matrices(
        pruned,
        gguf_architecture(pruned.anatomy.family.model_type, pruned.architecture),
        lambda name: gguf.quants.dequantize(held[name].data, held[name].tensor_type).copy(),
    )


def _run(pruned: Pruned, path: Path, tolerance: float) -> float:
    """How far llama.cpp's logits are from those of the model in memory."""
    tokens, found = _logits(pruned, path)
    return check_equal(found, expected_logits(pruned.model, tokens), tolerance)


def _logits(pruned: Pruned, path: Path) -> tuple[Tensor, Tensor]:
    """Probe tokens and what llama.cpp makes of them; the splitting of a sample text is compared on the way."""
    tokens = probe(pruned.model, min(PROBE_LENGTH, context_length(pruned.model.config)))
    text = SAMPLE.encode() if pruned.tokenizer is not None else b""
    sample = torch.tensor(list(text), dtype=torch.uint8)
    with reader("reload_gguf.py") as read:
        found = read(path, {"tokens": tokens, "text": sample})()
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


def _read_back(pruned: Pruned, path: Path) -> float:
    """The largest difference of a tensor in the file from the one in memory."""
    written = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    largest = 0.0
    for name, values in gguf_tensors(pruned):
        tensor = written.pop(name)
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        apart = _weights_apart(found, torch.from_numpy(values))
        if not apart <= WEIGHT_TOLERANCE[tensor.tensor_type.name.split("_")[0]]:
            raise ExportFailed("The file holds other weights than the model, so it was deleted.")
        largest = max(largest, apart)
    if written:
        raise ExportFailed("The file holds more tensors than the model, so it was deleted.")
    return largest


def _weights_apart(found: Tensor, expected: Tensor) -> float:
    return 0.0 if torch.equal(found, expected) else difference(found, expected)
