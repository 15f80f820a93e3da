"""What to export, where and how: refused here if it can be refused without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmbo.config.formats import Format, title
from llmbo.config.numbers import MOST, Within, bytes_of
from llmbo.deploy.disk import check_disk
from llmbo.deploy.fit import best_within, parse_budgets
from llmbo.deploy.target import Base, Target
from llmbo.errors import ConfigError
from llmbo.report.files import find_run
from llmbo.report.schema import Report, TrialPart
from llmbo.run.rebuild import architecture_of, find_trial, read_run, refit_of
from pruning.architecture import Architecture
from pruning.export.folder import check_out
from pruning.export.quantise import SEARCHED, Mixture
from pruning.export.reader import Read

ENERGY_TOKENS = 8192  # that tell K-quants how much goes through each column


@dataclass(frozen=True)
class ExportRequest:
    """A trial of a run and what to write it as. Make one by `of`, which checks it.

    Args:
        folder: The run's.
        out: Folder to make.
        refit: As `llmbo.run.rebuild.refit_of` names it.
    """

    report: Report
    folder: Path
    trial: TrialPart
    target: Target
    out: Path
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
        base: Base = None,
    ) -> "ExportRequest":
        """Check a request against the stored run, the format and the disk. Writes nothing.

        Args:
            run: Folder of a run, or its name below `runs/`.
            trial: A finished one; None to choose by `fit`.
            format, dtype, max_shard_size, quantize: As for `Target.of`.
            refit: "sequential" or "table"; empty takes sequential where the run has measured the trial so.
            fit: Budgets such as `params<=1e8`, of which the best model of the front keeps all.
            base: As for `Target.sizes`.

        Raises:
            ConfigError, ModelError, StorageError, PruningError: One line for the user.
        """
        budgets = parse_budgets(fit)
        if (trial is None) == (not budgets):
            raise ConfigError("Which model? Give either --trial, or --fit to choose by budget.")
        if trial is not None:
            Within(0, MOST).check("--trial", trial, whole=True)
        bytes_of("--max-shard-size", max_shard_size)  # before the run is looked for, like all that was typed
        report, folder = read_run(run), find_run(run)
        target = Target.of(report, format, dtype, quantize, max_shard_size)
        chosen = best_within(report, budgets, target, base).trial if trial is None else trial
        assert chosen is not None  # a point of the front
        found = find_trial(report, chosen)
        request = cls(report, folder, found, target, out, refit_of(report, found, refit))
        target.check(report, request.architecture)
        check_out(out)
        check_disk(out, request.bytes_needed)
        return request

    @property
    def format(self) -> Format:
        return self.target.format

    @property
    def dtype(self) -> str:
        return self.target.dtype

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.trial)

    @property
    def name(self) -> str:
        """Of the model, for formats that keep one."""
        return f"{self.report.run.name}-trial-{self.trial.number}"

    def options(self, read: Read | None, windows: Tensor, on_layer: Callable[[int], None]) -> dict[str, Any]:
        """For the format's `save`.

        Args:
            windows: The run's calibration text, `num_windows x length` token ids.
            on_layer: Told of steps, of which there are `steps`.
        """
        known = {"dtype": self.dtype, "name": self.name, "max_shard_size": self.target.max_shard_size, "read": read}
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
