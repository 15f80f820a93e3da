"""What to export, where and how: refused here if it can be refused without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch import Tensor

from llmbo.config.formats import FORMATS, Format, title
from llmbo.config.numbers import MOST, Within, bytes_of
from llmbo.deploy.disk import check_disk
from llmbo.deploy.fit import best_within, parse_budgets
from llmbo.errors import ConfigError, unknown
from llmbo.report.files import find_run
from llmbo.report.schema import Report, TrialPart
from llmbo.run.rebuild import architecture_of, find_trial, read_run, refit_of
from pruning.architecture import Architecture
from pruning.export.folder import check_out
from pruning.export.quantise import RECIPE, SEARCHED, Mixture
from pruning.export.reader import Read

ENERGY_TOKENS = 8192  # that tell K-quants how much goes through each column


@dataclass(frozen=True)
class ExportRequest:
    """A trial of a run and what to write it as. Make one by `of`, which checks it.

    Args:
        folder: The run's.
        dtype: A key of `format.dtypes`, or what `--quantize` said.
        out: Folder to make.
        max_shard_size: Of the largest safetensors file in bytes, for formats that have some.
        refit: As `llmbo.run.rebuild.refit_of` names it.
    """

    report: Report
    folder: Path
    trial: TrialPart
    format: Format
    dtype: str
    out: Path
    max_shard_size: int
    refit: str

    @classmethod
    def of(
        cls,
        run: str,
        trial: int | None,
        format: str,
        out: Path,
        dtype: str = "",
        max_shard_size: str = "5GB",
        refit: str = "",
        quantize: str = "",
        fit: Sequence[str] = (),
    ) -> "ExportRequest":
        """Check a request against the stored run, the format and the disk. Writes nothing.

        Args:
            run: Folder of a run, or its name below `runs/`.
            trial: A finished one; None to choose by `fit`.
            format: A name in `FORMATS`.
            dtype: One of the format's choices; empty takes its default.
            max_shard_size: In bytes, or in KB, MB, GB or TB (powers of ten).
            refit: "sequential" or "table"; empty takes sequential where the run has measured the trial so.
            quantize: In place of `dtype`: one of `Format.quantised`, `recipe:FILE`, or `searched:SIZE`.
            fit: Budgets such as `params<=1e8`, of which the best model of the front keeps all.

        Raises:
            ConfigError, StorageError, PruningError: One line for the user.
        """
        budgets = parse_budgets(fit)
        if (trial is None) == (not budgets):
            raise ConfigError("Which model? Give either --trial, or --fit to choose by budget.")
        if trial is not None:
            Within(0, MOST).check("--trial", trial, whole=True)
        shard_size = bytes_of("--max-shard-size", max_shard_size)
        report, folder = read_run(run), find_run(run)
        if format not in FORMATS:
            raise ConfigError(f"Unknown --format '{format}': expected one of {', '.join(FORMATS)}.")
        row = FORMATS[format]
        if quantize.startswith(SEARCHED):
            quantize = f"{SEARCHED}{bytes_of('--quantize searched:', quantize.removeprefix(SEARCHED))}"
        if quantize:
            _check_quantize(row, quantize, dtype, report.model.hidden_size)
        dtype = quantize or dtype or row.default
        if dtype not in row.choices and not quantize:
            raise ConfigError(f"--format {format} has no --dtype '{dtype}': expected one of {', '.join(row.choices)}.")
        dtype = report.run.dtype if dtype == "auto" else dtype
        chosen = best_within(report, budgets).trial if trial is None else trial
        assert chosen is not None  # a point of the front
        found = find_trial(report, chosen)
        request = cls(report, folder, found, row, dtype, out, shard_size, refit_of(report, found, refit))
        if row.check_type:
            resolve_name(row.check_type)(report.model.model_type, request.architecture)
        if row.check_attention:
            resolve_name(row.check_attention)(report.model.num_key_value_heads, request.architecture)
        check_out(out)
        check_disk(out, request.bytes_needed)
        return request

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.trial)

    @property
    def name(self) -> str:
        """Of the model, for formats that keep one."""
        return f"{self.report.run.name}-trial-{self.trial.number}"

    @property
    def label(self) -> str:
        """What the weights are stored as, in a word."""
        return (
            self.dtype if self.dtype in (*self.format.choices, *self.format.quantised) else Mixture.of(self.dtype).name
        )

    def options(self, read: Read | None, windows: Tensor, on_layer: Callable[[int], None]) -> dict[str, Any]:
        """For the format's `save`.

        Args:
            windows: The run's calibration text, `num_windows x length` token ids.
            on_layer: Told of steps, of which there are `steps`.
        """
        known = {"dtype": self.dtype, "name": self.name, "max_shard_size": self.max_shard_size, "read": read}
        known |= {"title": title(self.report.model.name), "on_layer": on_layer}
        fits = self.dtype.startswith(SEARCHED)
        known["windows"] = windows if fits else windows[: max(1, ENERGY_TOKENS // windows.shape[1])]
        return {name: known[name] for name in self.format.options}

    @property
    def steps(self) -> int | None:
        """Of writing, where that takes minutes: each layer is priced, and refitted."""
        kept = sum(map(self.architecture.keeps_layer, range(len(self.architecture.neurons))))
        return 2 * kept if self.dtype.startswith(SEARCHED) else None

    @property
    def bytes_needed(self) -> int:
        """On the disk, until the result has been checked."""
        assert self.trial.objectives is not None  # only finished trials are found
        params = self.trial.objectives.params
        written = self.format.bytes_on_disk(self.dtype, params, self.report.model.params)
        if self.dtype.startswith(SEARCHED):
            written = min(written, Mixture.of(self.dtype).size)
        return written + round(self.format.checking * params)


def _check_quantize(format: Format, quantize: str, dtype: str, hidden_size: int) -> None:
    """Refuse what cannot be, or cannot be here.

    Raises:
        ConfigError, UnsupportedExport: One line for the user.
    """
    if not format.quantised:
        known = ", ".join(row.name for row in FORMATS.values() if row.quantised)
        raise ConfigError(f"--format {format.name} cannot be quantised (--quantize {quantize}): take --format {known}.")
    if dtype:
        raise ConfigError(f"--dtype {dtype} and --quantize {quantize} both say how weights are stored: leave one out.")
    if quantize not in format.quantised and not quantize.startswith((RECIPE, SEARCHED)):
        raise ConfigError(unknown("--quantize", quantize, [*format.quantised, f"{RECIPE}FILE", f"{SEARCHED}SIZE"]))
    Mixture.of(quantize).check_library(hidden_size)
