"""The Python face: `optimize` searches, `load_run` opens what a search has stored, a `Run` hands out its models."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config import RunConfig
from llmbo.deploy.export import export
from llmbo.deploy.request import ExportRequest
from llmbo.display.progress import Show, build_display
from llmbo.errors import ConfigError
from llmbo.models.loading import LoadedModel, adopt_model, libraries_silenced
from llmbo.report.files import find_run
from llmbo.report.notebook import run_html
from llmbo.report.schema import Report, TrialPart, Values
from llmbo.run.assemble import assemble
from llmbo.run.execute import execute
from llmbo.run.rebuild import RebuildInputs, find_trial, load_base, read_run
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
    """

    trial: int | None
    architecture: Architecture
    objectives: Mapping[str, float]
    heldout: Mapping[str, float] | None
    origin: str = ""
    gain: float | None = None
    why: str = ""


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
        return Point(None, architecture, _measured(dense.objectives), _judged(dense.heldout))

    @property
    def page(self) -> Path:
        """The report as a page for people."""
        return self.folder / "report.html"

    def to_dataframe(self) -> "DataFrame":
        """Every measured trial as a row of a pandas table: `trial` (the index), `origin`, `on_front`, `gain`, the quantities, the
        held-out ones with `heldout_` before their names, and the widths kept by each layer.

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
                **point.architecture.to_dict(),
            }
            for point in self.trials
        ]
        return DataFrame(rows).set_index("trial")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's, which is that of every trial."""
        return self._rebuilt().loaded.tokenizer

    def model(self, trial: int) -> PreTrainedModel:
        """The model of a trial, cut for real: an ordinary module in the run's dtype, on the run's device, with `generate`.

        Takes as long as the run's own ranking and refitting the first time, and seconds after that.

        Raises:
            ConfigError: There is no such trial, or it was not measured.
            ModelError: The base model or the text is not the one that the run had.
        """
        found = find_trial(self.report, trial)
        return self._rebuilt().model(found)

    def _rebuilt(self) -> RebuildInputs:
        if self._inputs is None:
            with libraries_silenced(), build_display(self._show, 0, self.name) as display:
                loaded, windows = load_base(self.report, display, self._base)
                self._inputs = RebuildInputs.of(self.report, loaded, windows, display)
        return self._inputs

    def export(
        self, trial: int, out: str | Path, format: str = "hf", dtype: str = "", max_shard_size: str = "5GB"
    ) -> Check:
        """Write a trial's model as a folder that loads where people deploy, as `llmbo export` does.

        Args:
            out: Folder to make; it must be empty or not exist.
            format: hf, gguf or padded.
            dtype: By default the run's own, and f16 in a GGUF file.

        Returns:
            How what was written was checked before the folder appeared, and how far its logits were off.

        Raises:
            LlmboError, PruningError: One line for the user; nothing is left in `out`.
        """
        request = ExportRequest.of(str(self.folder), trial, format, Path(out), dtype, max_shard_size)
        command = _call(
            "export", {"trial": trial, "format": format, "out": str(out)}, f"llmbo.load_run({str(self.folder)!r})"
        )
        with libraries_silenced(), build_display(self._show, 0, self.name) as display:
            return export(request, command, display, self._base)

    def _point(self, trial: TrialPart) -> Point:
        assert trial.objectives is not None
        return Point(
            trial.number,
            Architecture.from_dict(trial.architecture.model_dump()),
            _measured(trial.objectives),
            _judged(self.report.heldout_of(trial.number)),
            trial.origin,
            trial.gain,
            trial.why,
        )

    def __repr__(self) -> str:
        counts = f"{len(self.report.front)} points on the front of {len(self.report.trials)} trials"
        return f"<Run '{self.name}' of {self.report.model.name}: {counts}, hypervolume {self.hypervolume:.4f}, in {self.folder}>"

    def _repr_html_(self) -> str:
        return run_html(str(self.folder), self.report)


def optimize(
    model: str | PreTrainedModel,
    budget: int = RunConfig.budget,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch: int = RunConfig.batch,
    seed: int = RunConfig.seed,
    strategy: str = RunConfig.strategy,
    objectives: Sequence[str] = RunConfig.objectives,
    reference_point: Sequence[float] | None = None,
    maximum: Mapping[str, float] | Sequence[str] = (),
    context: int = RunConfig.context,
    serve_batch: int = RunConfig.serve_batch,
    latency_target: str = RunConfig.latency_target,
    items: str = RunConfig.items,
    racing: bool = RunConfig.racing,
    compensation: bool = RunConfig.compensation,
    text: str = RunConfig.text,
    min_share: float = RunConfig.min_share,
    neuron_step: int = RunConfig.neuron_step,
    calibration_tokens: int = RunConfig.calibration_tokens,
    proxy_tokens: int = RunConfig.proxy_tokens,
    heldout_tokens: int = RunConfig.heldout_tokens,
    window: int = RunConfig.window,
    dtype: str = RunConfig.dtype,
    device: str = RunConfig.device,
    name: str = RunConfig.name,
    storage: str | None = None,
    advisor: str = RunConfig.advisor,
    advisor_hooks: Sequence[str] = RunConfig.advisor_hooks,
    advisor_share: float = RunConfig.advisor_share,
    advisor_context: str = RunConfig.advisor_context,
    advisor_every: int = RunConfig.advisor_every,
    advisor_max_calls: int = RunConfig.advisor_max_calls,
    advisor_max_tokens: int = RunConfig.advisor_max_tokens,
    advisor_reply_tokens: int = RunConfig.advisor_reply_tokens,
    advisor_max_cost: float | None = None,
    advisor_max_seconds: float = RunConfig.advisor_max_seconds,
    advisor_deadline: float = RunConfig.advisor_deadline,
    advisor_price: Sequence[float] | None = None,
    fresh: bool = False,
    show: Show = "auto",
    command: str = "",
) -> Run:
    """Search for smaller models, judge the front on held-out windows, and write `runs/NAME`. As `llmbo optimize`, keyword by keyword.

    The same call continues a run that was stopped, whatever stopped it; a larger `budget` extends a finished one.

    Args:
        model: Alias, local folder or hub name; or a loaded causal language model, which is left as it was.
        budget: Candidates to evaluate.
        tokenizer: Of a loaded model.
        maximum: Limits by objective, e.g. `{"params_share": 0.6}`, or as `NAME=VALUE`.
        fresh: Forget what this run has stored and start over.
        show: "auto" suits a terminal, a notebook or a file; "json" writes events to stderr; "nothing" is silent.
        command: What the report says the run was started with; by default this call.
        batch, seed, strategy, objectives, reference_point, context, serve_batch, latency_target, items, racing, compensation,
            text, min_share, neuron_step, calibration_tokens, proxy_tokens, heldout_tokens, window, dtype, device, name, storage,
            advisor, advisor_hooks, advisor_share, advisor_context, advisor_every, advisor_max_calls, advisor_max_tokens,
            advisor_reply_tokens, advisor_max_cost, advisor_max_seconds, advisor_deadline, advisor_price: See `llmbo.config.RunConfig`.

    Returns:
        The finished run.

    Raises:
        LlmboError, PruningError: One line that names the value, what was expected and the remedy.
        KeyboardInterrupt: After what was measured has been stored and reported.
    """
    typed = locals()  # the arguments, while nothing else is here
    settings = {item.name: typed[item.name] for item in fields(RunConfig)}
    command = command or _call("optimize", settings | ({"fresh": True} if fresh else {}))
    given = None
    if not isinstance(model, str):
        given = adopt_model(model, tokenizer)
        _check_placed(given, dtype, device)
        settings |= {"model": given.name, "dtype": given.dtype, "device": given.device}
    elif tokenizer is not None:
        raise ConfigError(f"tokenizer= belongs to a loaded model: '{model}' brings its own, so leave it out.")
    if isinstance(maximum, Mapping):
        settings["maximum"] = tuple(f"{key}={value}" for key, value in maximum.items())
    config = RunConfig.from_settings({key: _stored(value) for key, value in settings.items()})
    with (
        _evaluating(given),
        libraries_silenced(),
        build_display(show, config.budget, config.name) as display,
        assemble(config, fresh, display, given) as parts,
    ):
        execute(parts, display, command)
    return Run(parts.folder, read_run(str(parts.folder)), given, show)


def load_run(
    run: str | Path,
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    show: Show = "auto",
) -> Run:
    """Open a stored run.

    Args:
        run: Its folder, or its name below `runs/`.
        model: Where the base model is now, if it has moved, or the loaded model itself.
        tokenizer: Of a loaded model.

    Raises:
        StorageError: There is no such run or no report yet, or it cannot be read.
    """
    folder = find_run(str(run))
    base = model if isinstance(model, str) or model is None else adopt_model(model, tokenizer)
    return Run(folder, read_run(str(folder)), base, show)


def _measured(values: Values) -> dict[str, float]:
    return values.model_dump(exclude_none=True)


def _judged(values: Values | None) -> dict[str, float] | None:
    return None if values is None else _measured(values)


def _stored(value: Any) -> Any:
    """Sequences as settings hold them."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_placed(given: LoadedModel, dtype: str, device: str) -> None:
    for setting, wanted, found in (("dtype", dtype, given.dtype), ("device", device, given.device)):
        if wanted not in ("auto", found):
            raise ConfigError(
                f"{setting}='{wanted}', but the loaded model is in {found}: leave {setting} out, or move the model."
            )


@contextmanager
def _evaluating(given: LoadedModel | None) -> Iterator[None]:
    """A loaded model without dropout, and afterwards as it was."""
    training = [module for module in given.model.modules() if module.training] if given else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _call(function: str, arguments: Mapping[str, Any], on: str = "llmbo") -> str:
    """A call as it might have been typed; what has its default is left out."""
    defaults: dict[str, Any] = {item.name: item.default for item in fields(RunConfig)}
    words = [
        f"{key}={value!r}" if isinstance(value, _PLAIN) else f"{key}=<{type(value).__name__}>"
        for key, value in arguments.items()
        if key not in defaults or value != defaults[key]
    ]
    return f"{on}.{function}({', '.join(words)})"


_PLAIN = (str, int, float, tuple, list, dict, type(None))
