"""A trial of a stored run -> a folder to deploy."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from llmbo.deploy.card import details, licence_of, model_card
from llmbo.errors import ConfigError, StorageError, first_line
from llmbo.models.loading import DTYPES, LoadedModel
from llmbo.report.schema import Report, TrialPart
from llmbo.run.rebuild import RebuildInputs, architecture_of, find_trial, load_base, read_run
from llmbo.types import Phases
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export import Pruned, save_gguf, save_hf, save_padded
from pruning.export.folder import check_out
from pruning.export.gguf_file import FILE_TYPES, check_gguf, gguf_architecture
from pruning.export.gguf_tokenizer import check_tokenizer
from pruning.export.rebuild import cast, is_stock, rebuilt
from pruning.export.verify import Check

DISK_MARGIN = 100 << 20  # tokenizer, card and file system overhead, bytes
BYTES = {"float32": 4, "f32": 4, "float16": 2, "bfloat16": 2, "f16": 2, "bf16": 2, "q8_0": 1.0625}
Saver = Callable[[Pruned, Path, Mapping[str, str], str], Check]


@dataclass(frozen=True)
class Format:
    """One way to write a model.

    Args:
        dtypes: What it can store; "auto" stands for the dtype the run measured in.
        save: Writes and checks the folder.
    """

    dtypes: tuple[str, ...]
    default: str
    save: Saver


def _folder_saver(save: Callable[..., Check], max_shard_size: str) -> Saver:
    return lambda pruned, out, files, dtype: save(pruned, out, files, max_shard_size=max_shard_size)


def _gguf_saver(name: str) -> Saver:
    return lambda pruned, out, files, dtype: save_gguf(pruned, out, files, dtype, name)


def formats(name: str, max_shard_size: str = "5GB") -> dict[str, Format]:
    """The known formats; `name` becomes the file name of a GGUF file."""
    folder_dtypes = ("auto", *DTYPES)
    return {
        "hf": Format(folder_dtypes, "auto", _folder_saver(save_hf, max_shard_size)),
        "gguf": Format(tuple(FILE_TYPES), "f16", _gguf_saver(name)),
        "padded": Format(folder_dtypes, "auto", _folder_saver(save_padded, max_shard_size)),
    }


@dataclass(frozen=True)
class Order:
    """A checked request: everything that can be refused without a model has been.

    Raises:
        ConfigError, StorageError, PruningError: One line for the user.
    """

    report: Report
    trial: TrialPart
    format: str
    dtype: str
    out: Path
    save: Saver

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.trial)


def place_order(run: str, trial: int, format: str, dtype: str, out: Path, max_shard_size: str = "5GB") -> Order:
    """Check a request against the stored run, the format and the disk. Writes nothing."""
    report = read_run(run)
    if not re.fullmatch(r"\d+([KMGT]B)?", max_shard_size):
        raise ConfigError(f"--max-shard-size must be a size such as 500MB or 5GB, got '{max_shard_size}'.")
    known = formats(f"{report.run.name}-trial-{trial}", max_shard_size)
    if format not in known:
        raise ConfigError(f"Unknown --format '{format}': expected one of {', '.join(known)}.")
    chosen = known[format]
    dtype = dtype or chosen.default
    if dtype not in chosen.dtypes:
        raise ConfigError(f"--format {format} has no --dtype '{dtype}': expected one of {', '.join(chosen.dtypes)}.")
    found = find_trial(report, trial)
    dtype = report.run.dtype if dtype == "auto" else dtype
    order = Order(report, found, format, dtype, out, chosen.save)
    if format == "gguf":
        gguf_architecture(report.model.model_type, order.architecture)
    check_out(out)
    _check_disk(order)
    return order


def _check_disk(order: Order) -> None:
    assert order.trial.objectives is not None
    params = order.report.model.params if order.format == "padded" else order.trial.objectives.params
    check = 2 * params if order.format == "gguf" else 0  # a coarse file is checked by an f16 twin
    check_disk(order.out, round(params * BYTES[order.dtype]) + check)


def check_disk(out: Path, needed: int) -> None:
    """Raise StorageError unless `needed` bytes and a margin are free where `out` will be."""
    place = next(path for path in out.absolute().parents if path.is_dir())
    free, needed = shutil.disk_usage(place).free, needed + DISK_MARGIN
    if free < needed:
        raise StorageError(
            f"Too little disk space for '{out}': {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free."
        )


def export(
    order: Order, command: str, phases: Phases, model: str | LoadedModel | None = None, device: str | None = None
) -> Check:
    """Carry an order out.

    Args:
        command: For the model card.
        model: Where the base model is now; by default where the run had it.
        device: Where to rebuild it; by default where the run did.

    Raises:
        ModelError, StorageError, PruningError: One line for the user; nothing is left.
    """
    loaded, windows = load_base(order.report, phases, model, device)
    anatomy = anatomy_of(loaded.model)
    if order.format == "gguf":
        check_gguf(loaded.model.config, anatomy, order.architecture)
        check_tokenizer(loaded.tokenizer)
    inputs = RebuildInputs.of(order.report, loaded, windows, phases)
    with phases.phase("cutting"):
        small, mask = inputs.cut(order.trial)
    nn.Module.to(small, "cpu")
    cast(small, DTYPES.get(order.dtype, torch.float32 if order.dtype == "f32" else small.dtype))
    pruned = Pruned(small, anatomy, order.architecture, loaded.tokenizer)
    files = {
        "README.md": model_card(
            order.report,
            order.trial,
            licence_of(loaded),
            order.format,
            order.dtype,
            order.format != "hf" or is_stock(rebuilt(pruned.model, pruned.anatomy, pruned.architecture)),
            str(order.out),
            command,
        ),
        "llmbo.json": details(order.report, order.trial, mask, order.format, order.dtype, command),
    }
    with phases.phase("writing and reading back"):
        try:
            return order.save(pruned, order.out, files, order.dtype)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise StorageError(f"Cannot write '{order.out}' ({reason}). Nothing was left there.") from error
