"""A stored run: its front, its trials, and the models behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config import RunConfig
from llmbo.config.objectives import QUANTITIES
from llmbo.deploy.export import export
from llmbo.deploy.fit import best_within, parse_budgets, sign_of
from llmbo.deploy.reader import started
from llmbo.deploy.request import ExportRequest
from llmbo.deploy.target import Target
from llmbo.display.progress import Show, build_display
from llmbo.errors import ConfigError
from llmbo.models.loading import LoadedModel
from llmbo.models.silence import libraries_silenced
from llmbo.report.notebook import run_html
from llmbo.report.schema import FrontPoint, Report, TrialPart, Values
from llmbo.run.rebuild import RebuildInputs, find_trial, load_base, refit_of
from pruning.architecture import Architecture
from pruning.export.verify import Check

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Point:
    """A measured model: one trial of a run, or the dense model.

    Args:
        trial: Its number in the run; None for the dense model.
        objectives: Every quantity measured on the proxy windows, which the search saw, or counted, by name.
        heldout: The same on windows that nothing has seen; None where they were not measured (only the front is).
        gain: Quality saved against the allocation path at the same size; None where that is not known.
        why: An advisor's reason for it, if there was one.
        elsewhere: As `heldout`, on the text of another domain that `run.report.elsewhere` names.
        items: Scores by the name of each file of items that the front was judged on, see `llmbo.report.schema.ItemScores`.
        samples: Greedy continuations by prompt; a few points of the front have some.
        refitted: `objectives`, `heldout` and `elsewhere` with refits in sequence, for points that were refitted.
        noise: What chance of the held-out windows leaves open, as `llmbo.report.schema.NoisePart` has it: half-widths of `kl` and `loss`,
            and the smaller points of the front that this one is not surely better than. `noise_elsewhere`: on text of another domain.
    """

    trial: int | None
    architecture: Architecture
    objectives: Mapping[str, float]
    heldout: Mapping[str, float] | None
    origin: str = ""
    gain: float | None = None
    why: str = ""
    elsewhere: Mapping[str, float] | None = None
    items: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    samples: Mapping[str, str] = field(default_factory=dict)
    refitted: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    noise: Mapping[str, Any] = field(default_factory=dict)
    noise_elsewhere: Mapping[str, Any] = field(default_factory=dict)


class Run:
    """A stored run: its front, its trials, and the models behind them. In a notebook it shows the picture and the table.

    Memory: the report only. The base model, with a factor for every block's refit, is loaded at the first `model` and kept.
    """

    def __init__(
        self, folder: Path, report: Report, base: str | LoadedModel | None = None, show: Show = "auto"
    ) -> None:
        self.folder = folder
        self.report = report
        self._base = base
        self._show: Show = show
        self._inputs: RebuildInputs | None = None

    @property
    def name(self) -> str:
        return self.report.run.name

    @property
    def hypervolume(self) -> float:
        """Dominated by the front, in the product of the objectives' units."""
        return self.report.hypervolume.final

    @property
    def front(self) -> list[Point]:
        """The models that no other trial beats in every objective, smallest first."""
        return [self._point(self.report.trials[point.trial]) for point in self.report.front if point.trial is not None]

    @property
    def trials(self) -> list[Point]:
        """Every trial that was measured to its end, by number."""
        return [self._point(trial) for trial in self.report.trials if trial.objectives is not None]

    @property
    def dense(self) -> Point:
        """The model that was pruned."""
        dense = self.report.dense
        architecture = Architecture.from_dict(dense.architecture.model_dump())
        judged = _judged(dense.heldout), _judged(dense.elsewhere)
        return Point(None, architecture, _measured(dense.objectives), judged[0], elsewhere=judged[1], **_seen(dense))

    def best_within(self, budgets: Mapping[str, float], format: str = "", dtype: str = "", quantize: str = "") -> Point:
        """The best model of the front within budgets, as `llmbo export --fit` takes it: `run.best_within({"params": 1e8})`.

        Args:
            budgets: Largest values by name of any objective or cost that the report holds, and `file_bytes`; of accuracy the smallest.
            format, dtype, quantize: What it is to be exported as, see `export`: `file_bytes` is counted of that.

        Raises:
            ConfigError: No model is within all of them: the nearest is named.
            ModelError: The base model's config or tokenizer, by which `file_bytes` is counted, is not there.
            UnsupportedExport: The format cannot hold any.
        """
        target = Target.of(self.report, format, dtype, quantize)
        with libraries_silenced():
            found = best_within(self.report, parse_budgets(_words(budgets)), target, self._base).trial
        assert found is not None  # a point of the front
        return self._point(self.report.trials[found])

    @property
    def page(self) -> Path:
        """The report as a page for people."""
        return self.folder / "report.html"

    def to_dataframe(self) -> "DataFrame":
        """Every measured trial as a row of a pandas table: `trial` (the index), `origin`, `on_front`, `gain`, the quantities, the
        held-out ones with `heldout_` before their names, how sure these are with `noise_`, those on text of another domain with
        `elsewhere_` and `noise_elsewhere_`, those of refits in sequence with `refitted_objectives_`, `refitted_heldout_`,
        `refitted_noise_` and so on, scores with their file's name before theirs, and the widths kept by each layer.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError as error:
            raise ConfigError("run.to_dataframe() needs the package pandas: pip install pandas.") from error
        front = {point.trial for point in self.report.front}
        rows = [
            {
                "trial": point.trial,
                "origin": point.origin,
                "on_front": point.trial in front,
                "gain": point.gain,
                **point.objectives,
                **{f"heldout_{name}": value for name, value in (point.heldout or {}).items()},
                **{f"noise_{name}": value for name, value in point.noise.items()},
                **{f"noise_elsewhere_{name}": value for name, value in point.noise_elsewhere.items()},
                **{f"elsewhere_{name}": value for name, value in (point.elsewhere or {}).items()},
                **{
                    f"refitted_{part}_{name}": value
                    for part, values in point.refitted.items()
                    for name, value in values.items()
                    if "noise" in part or QUANTITIES[name].measured
                },
                **{f"{file}_{name}": value for file, scores in point.items.items() for name, value in scores.items()},
                **point.architecture.to_dict(),
            }
            for point in self.trials
        ]
        return DataFrame(rows).set_index("trial")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's, which is that of every trial."""
        return self._rebuilt().loaded.tokenizer

    def model(self, trial: int, refit: str = "") -> PreTrainedModel:
        """The model of a trial, cut for real: an ordinary module in the run's dtype, on the run's device, with `generate`.

        Takes seconds where the run has kept its ranking and refits.

        Args:
            refit: "table" for the run's own refits, "sequential" for those of this trial alone, which take minutes if they are not there.
                By default sequential where the run has measured that, else the table's.

        Raises:
            ConfigError: There is no such trial, or it was not measured, or the run's text is too short to refit in sequence.
            ModelError: The base model or the text is not the one that the run had.
        """
        found = find_trial(self.report, trial)
        refit = refit_of(self.report, found, refit)
        inputs = self._rebuilt()
        with libraries_silenced(), build_display(self._show, 0, self.name) as display:
            return inputs.model(found, display, refit)

    def _rebuilt(self) -> RebuildInputs:
        if self._inputs is None:
            with libraries_silenced(), build_display(self._show, 0, self.name) as display:
                loaded, windows = load_base(self.report, self.folder, display, self._base)
                self._inputs = RebuildInputs.of(self.report, self.folder, loaded, windows, display)
        return self._inputs

    def export(
        self,
        trial: int | Mapping[str, float],
        out: str | Path,
        format: str = "",
        dtype: str = "",
        max_shard_size: str = "5GB",
        refit: str = "",
        quantize: str = "",
    ) -> Check:
        """Write a trial's model as a folder that loads where people deploy, as `llmbo export` does.

        Args:
            trial: Its number, or budgets of which the best model of the front keeps all: `run.export({"file_bytes": 4e9}, "DIR",
                format="gguf", quantize="q4_k_m")`. See `best_within`.
            out: Folder to make; it must be empty or not exist.
            format: hf, gguf, vllm or padded; by default what the run counted `file_bytes` of, else what its first engine takes, else hf.
            dtype: By default what the run counted `file_bytes` of, else the run's own, and f16 in a GGUF file.
            refit: As in `model`.
            quantize: In place of `dtype`, a file type of llama.cpp, `recipe:FILE`, or `searched:SIZE`.

        Returns:
            How what was written was checked before the folder appeared, and how far its logits were off; `notes` tell what tensors are.

        Raises:
            LlmboError, PruningError: One line for the user; nothing is left in `out`.
        """
        number, fit = (None, _words(trial)) if isinstance(trial, Mapping) else (trial, [])
        with libraries_silenced():
            request = ExportRequest.of(
                str(self.folder), number, format, Path(out), dtype, max_shard_size, refit, quantize, fit, self._base
            )
        arguments: dict[str, Any] = {"trial": trial, "format": request.format.name, "out": str(out)}
        arguments |= {key: said for key, said in (("dtype", dtype), ("refit", refit), ("quantize", quantize)) if said}
        command = call_text("export", arguments, f"llmbo.load_run({str(self.folder)!r})")
        with (
            started(request.format.name) as read,
            libraries_silenced(),
            build_display(self._show, 0, self.name) as display,
        ):
            return export(request, command, display, self._base, read=read)

    def _point(self, trial: TrialPart) -> Point:
        assert trial.objectives is not None
        point = self.report.point_of(trial.number)
        return Point(
            trial.number,
            Architecture.from_dict(trial.architecture.model_dump()),
            _measured(trial.objectives),
            _judged(point.heldout if point else None),
            trial.origin,
            trial.gain,
            trial.why,
            _judged(point.elsewhere if point else None),
            **_seen(point),
        )

    def __repr__(self) -> str:
        counts = f"{len(self.report.front)} points on the front of {len(self.report.trials)} trials"
        return f"<Run '{self.name}' of {self.report.model.name}: {counts}, hypervolume {self.hypervolume:.4f}, in {self.folder}>"

    def _repr_html_(self) -> str:
        return run_html(str(self.folder), self.report)


def _words(budgets: Mapping[str, float]) -> list[str]:
    """As `--fit` takes them."""
    return [f"{name}{sign_of(name)}{value!r}" for name, value in budgets.items()]


def call_text(function: str, arguments: Mapping[str, Any], on: str = "llmbo") -> str:
    """A call as it might have been typed; what has its default is left out."""
    defaults: dict[str, Any] = {item.name: item.default for item in fields(RunConfig)}
    words = [
        f"{key}={value!r}" if isinstance(value, _PLAIN) else f"{key}=<{type(value).__name__}>"
        for key, value in arguments.items()
        if key not in defaults or value != defaults[key]
    ]
    return f"{on}.{function}({', '.join(words)})"


_PLAIN = (str, int, float, tuple, list, dict, type(None))


def _measured(values: Values) -> dict[str, float]:
    return values.model_dump(exclude_none=True)


def _judged(values: Values | None) -> dict[str, float] | None:
    return None if values is None else _measured(values)


def _seen(point: FrontPoint | None) -> dict[str, Any]:
    scores = (point.items if point else None) or {}
    items = {file: found.model_dump(exclude_none=True) for file, found in scores.items()}
    refitted = point.refitted.model_dump(exclude_none=True) if point and point.refitted else {}
    noises = {
        name: part.model_dump() if (part := getattr(point, name, None)) else {} for name in ("noise", "noise_elsewhere")
    }
    return {"items": items, "samples": (point.samples if point else None) or {}, "refitted": refitted, **noises}
