"""A trial of a stored run -> a folder to deploy. Everything is rebuilt as the run had it, or refused."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

from llmbo.assemble import changed_facts, facts_of, load_windows, ranked
from llmbo.card import details, licence_of, model_card
from llmbo.config import RunConfig
from llmbo.errors import ConfigError, ModelError, StorageError, first_line
from llmbo.models import DTYPES, LoadedModel, load_model
from llmbo.report.files import find_run, read_report
from llmbo.report.schema import Report, TrialPart
from llmbo.types import Phases
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows
from pruning.compensation import CompensationTable
from pruning.export import Pruned, save_gguf, save_hf, save_padded
from pruning.export.folder import check_out
from pruning.export.gguf_file import FILE_TYPES, gguf_architecture
from pruning.export.gguf_tokenizer import check_tokenizer
from pruning.export.hf import check_padding
from pruning.export.rebuild import cast, is_uniform, unequal_class
from pruning.export.verify import Check
from pruning.likelihood import quality
from pruning.masks import PruningMask
from pruning.shrink import shrink

LOSS_TOLERANCE = 0.02  # nats between the run's proxy loss of a trial and that of the rebuilt model
DISK_MARGIN = 100 << 20  # tokenizer, card and file system overhead, bytes
BYTES = {"float32": 4, "f32": 4, "float16": 2, "bfloat16": 2, "f16": 2, "bf16": 2, "q8_0": 1.0625}
Saver = Callable[[Pruned, Path, Mapping[str, str], str], Check]


@dataclass(frozen=True)
class Format:
    """One way to write a model.

    Args:
        dtypes: What it can store; "auto" stands for the dtype the run measured in.
        save: Writes and checks the folder.
        check: Refuses a model type and architecture that it cannot hold.
    """

    dtypes: tuple[str, ...]
    default: str
    save: Saver
    check: Callable[[str, Architecture], object]


def _folder_saver(save: Callable[..., Check], max_shard_size: str) -> Saver:
    return lambda pruned, out, files, dtype: save(pruned, out, files, max_shard_size=max_shard_size)


def _gguf_saver(name: str) -> Saver:
    return lambda pruned, out, files, dtype: save_gguf(pruned, out, files, dtype, name)


def _check_hf(model_type: str, architecture: Architecture) -> None:
    if not is_uniform(architecture):
        unequal_class(model_type)


def _check_padded(model_type: str, architecture: Architecture) -> None:
    check_padding(model_type)


def formats(name: str, max_shard_size: str = "5GB") -> dict[str, Format]:
    """The known formats; `name` becomes the file name of a GGUF file."""
    folder_dtypes = ("auto", *DTYPES)
    return {
        "hf": Format(folder_dtypes, "auto", _folder_saver(save_hf, max_shard_size), _check_hf),
        "gguf": Format(tuple(FILE_TYPES), "f16", _gguf_saver(name), gguf_architecture),
        "padded": Format(folder_dtypes, "auto", _folder_saver(save_padded, max_shard_size), _check_padded),
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
        return Architecture.from_dict(self.trial.architecture.model_dump())

    @property
    def is_stock(self) -> bool:
        return self.format != "hf" or is_uniform(self.architecture)


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
    chosen.check(report.model.model_type, order.architecture)
    check_out(out)
    _check_disk(order)
    return order


def read_run(run: str) -> Report:
    """The report of a run given by path or name.

    Raises:
        StorageError: There is no such run or no report yet, or it cannot be read.
    """
    folder = find_run(run)
    try:
        return Report.model_validate(read_report(folder))
    except ValidationError as error:
        reason = f"{error.error_count()} faults, the first: {error.errors()[0]['msg']}"
        raise StorageError(
            f"'{folder / 'report.json'}' is damaged or of another version of llmbo ({reason})."
        ) from error


def find_trial(report: Report, number: int) -> TrialPart:
    """A finished trial of the run.

    Raises:
        ConfigError: No such trial, or it has no measurements.
    """
    front = ", ".join(str(point.trial) for point in report.front) or "none"
    if not 0 <= number < len(report.trials):
        raise ConfigError(
            f"The run '{report.run.name}' has no trial {number}: it has 0 to {len(report.trials) - 1}; "
            f"on the front are {front}."
        )
    trial = report.trials[number]
    if trial.objectives is None:
        state = f"failed ({trial.failure})" if trial.state == "failed" else "is not finished"
        raise ConfigError(f"Trial {number} of the run '{report.run.name}' {state}: choose one of the front, {front}.")
    return trial


def _check_disk(order: Order) -> None:
    assert order.trial.objectives is not None
    params = order.report.model.params if order.format == "padded" else order.trial.objectives.params
    check = 2 * params if order.format == "gguf" else 0  # a coarse file is checked by an f16 twin
    needed = round(params * BYTES[order.dtype]) + check + DISK_MARGIN
    place = next(path for path in order.out.absolute().parents if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"Too little disk space for '{order.out}': {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free."
        )


def export(order: Order, command: str, phases: Phases, model: str | None = None, device: str | None = None) -> Check:
    """Carry an order out.

    Args:
        command: For the model card.
        model: Where the base model is now; by default where the run had it.
        device: Where to rebuild it; by default where the run did.

    Raises:
        ModelError, StorageError, PruningError: One line for the user; nothing is left.
    """
    config = RunConfig.from_settings(order.report.run.settings, name=order.report.run.name)
    with phases.phase("model"):
        loaded = load_model(model or config.model, order.report.run.dtype, device or order.report.run.device)
        windows = load_windows(config, loaded)
    _check_same(order, loaded, windows)
    if order.format == "gguf":
        check_tokenizer(loaded.tokenizer)
    pruned, mask = _rebuild(order, config, loaded, windows, phases)
    files = {
        "README.md": model_card(
            order.report,
            order.trial,
            licence_of(loaded),
            order.format,
            order.dtype,
            order.is_stock,
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


def _check_same(order: Order, loaded: LoadedModel, windows: TokenWindows) -> None:
    stored = {"model": order.report.model.model_dump(), "data": order.report.data.model_dump()}
    changes = changed_facts({**stored, "model": {**stored["model"], "name": ""}}, _nameless(facts_of(loaded, windows)))
    if changes:
        raise ModelError(
            f"The run '{order.report.run.name}' had another model or text ({'; '.join(changes)}): "
            "bring them back (--model says where the base model is)."
        )


def _nameless(facts: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    return {**facts, "model": {**facts["model"], "name": ""}}


def _rebuild(
    order: Order, config: RunConfig, loaded: LoadedModel, windows: TokenWindows, phases: Phases
) -> tuple[Pruned, PruningMask]:
    """Rank, repair and cut as the run did; the result must measure what the run measured."""
    with phases.phase("importance", len(windows.calibration)) as advance:
        statistics, ranking = ranked(loaded.model, windows, advance)
    with phases.phase("compensation"):
        table = CompensationTable(loaded.model, statistics, ranking) if config.compensation else None
    mask = PruningMask.from_architecture(order.architecture, ranking)
    with phases.phase("cutting"):
        small = shrink(loaded.model, mask, table)
        measured = quality(small, windows.proxy).loss
    assert order.trial.objectives is not None
    expected = order.trial.objectives.loss
    if not abs(measured - expected) <= LOSS_TOLERANCE:
        raise ModelError(
            f"The rebuilt model's proxy loss is {measured:.3f} where the run measured {expected:.3f}: other versions of "
            f"the libraries or another device than the run's ({order.report.run.device}) rank units differently."
        )
    anatomy = anatomy_of(loaded.model)
    stored = DTYPES.get(order.dtype, torch.float32 if order.dtype == "f32" else small.dtype)
    nn.Module.to(small, "cpu")
    cast(small, stored)
    return Pruned(small, anatomy, order.architecture, loaded.tokenizer), mask
