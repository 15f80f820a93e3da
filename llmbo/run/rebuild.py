"""A stored run -> the models of its trials, cut again as the run cut them, or refused."""

from dataclasses import dataclass, fields
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedModel

from llmbo.config import RunConfig
from llmbo.errors import ConfigError, ModelError, StorageError, first_fault, unknown
from llmbo.models.loading import LoadedModel, find_prunable, load_model
from llmbo.problem.anchors import anchored, kept_at, names_at
from llmbo.problem.elastic import adapted, adapter_of
from llmbo.problem.kept import OWN, hand_on, own_files
from llmbo.problem.method import Method
from llmbo.problem.preparation import fitted
from llmbo.problem.proxy import with_perplexity
from llmbo.problem.residence import placed_to_cut
from llmbo.problem.sequence import PHASE, check_enough, kept_refits, sequential
from llmbo.problem.space import space_of
from llmbo.problem.texts import load_windows
from llmbo.report.files import find_run, read_report
from llmbo.report.schema import Refitted, Report, TrialPart
from llmbo.run.facts import changed_facts, facts_of
from llmbo.types import FITTING, Phases
from pruning.anatomy import Sizes, anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows
from pruning.compensation import Refits
from pruning.export.rebuild import rebuilt
from pruning.likelihood import quality
from pruning.masks import PruningMask, Ranking
from pruning.refits import STATISTICS, names_of
from pruning.sequential import SequentialRefits
from pruning.shrinking import shrink
from pruning.statistics import steps
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles

REFITS = ("sequential", "table")
LOSS_TOLERANCE = 0.02  # nats between the run's proxy loss of a trial and that of the rebuilt model


def read_run(run: str) -> Report:
    """The report of a run given by path or name.

    Raises:
        StorageError: There is no such run or no report yet, or it cannot be read.
    """
    folder = find_run(run)
    try:
        return Report.model_validate(read_report(folder))
    except ValidationError as error:
        raise StorageError(
            f"'{folder / 'report.json'}' is of another version of llmbo ({first_fault(error)}): install that version."
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


def architecture_of(trial: TrialPart) -> Architecture:
    return Architecture.from_dict(trial.architecture.model_dump())


def column_of(report: Report, trial: TrialPart, refit: str) -> Refitted | None:
    """What a finished trial measures with these refits; None where the run did not measure that."""
    point = report.point_of(trial.number)
    if refit == "sequential":
        return point.refitted if point else None
    assert trial.objectives is not None
    return Refitted(
        objectives=trial.objectives,
        heldout=point.heldout if point else None,
        elsewhere=point.elsewhere if point else None,
    )


def refit_of(report: Report, trial: TrialPart, asked: str = "") -> str:
    """Which refits a trial is cut with: a name in `REFITS`. Empty takes those in sequence where the run has them, else its table's.

    Raises:
        ConfigError: There are no such refits, or the run's text is too short for them.
    """
    if asked and asked not in REFITS:
        raise ConfigError(unknown("--refit", asked, REFITS))
    there = column_of(report, trial, "sequential") is not None
    if asked == "sequential" and not there:
        sizes = Sizes(**{part.name: getattr(report.model, part.name) for part in fields(Sizes)})
        remedy = "Take --refit table, or search with --calibration-tokens {enough}."
        check_enough("--refit sequential", report.data.calibration.tokens, report.data.window, sizes, remedy)
    return asked or ("sequential" if there else "table")


def config_of(report: Report) -> RunConfig:
    """The settings that the run was started with, but for who proposed: a plug-in that did may be gone."""
    return RunConfig.from_settings(report.run.settings, name=report.run.name, strategy="qnehvi", advisor="none")


def load_base(
    report: Report, folder: Path, phases: Phases, model: str | LoadedModel | None = None, device: str | None = None
) -> tuple[LoadedModel, TokenWindows]:
    """The run's base model and windows.

    Args:
        folder: The run's.
        model: The base model, or where it is now; by default where the run had it.
        device: Where to load it; by default where the run did. A model that is loaded stays where it is.

    Raises:
        ModelError: It is another model or in another dtype, or its text is another.
    """
    config = config_of(report)
    with phases.phase("model"):
        if isinstance(model, LoadedModel):
            loaded = model
        else:
            base = find_prunable(model or config.model)
            loaded = load_model(base.name, *placed_to_cut(config, base, report.run.dtype, device or report.run.device))
            for note in loaded.notes:
                phases.note(note)
        if loaded.dtype != report.run.dtype:
            raise ModelError(
                f"The run '{report.run.name}' had its model in {report.run.dtype}, the given one is in {loaded.dtype}: "
                f"load it in {report.run.dtype}."
            )
        windows = load_windows(config, loaded, own_files(folder, phases.note), phases)
        loaded = adapted(adapter_of(config), loaded, windows.proxy)
    stored = {"model": report.model.model_dump(), "data": report.data.model_dump()}
    found = facts_of(loaded, windows)
    for facts in (stored, found):
        facts["model"] |= {"name": ""}  # it may have moved
    if changes := changed_facts(stored, found):
        raise ModelError(
            f"The run '{report.run.name}' had another model or text ({'; '.join(changes)}): "
            "bring them back (--model says where the base model is)."
        )
    return loaded, windows


@dataclass(frozen=True)
class Cut:
    """A trial's model in the run's dtype, which of the dense model's units it keeps, and what it measures, by name of its refits."""

    model: PreTrainedModel
    mask: PruningMask
    refit: str
    measured: Refitted


@dataclass(frozen=True)
class RebuildInputs:
    """What every trial of a run is cut from: the base model, its units ranked and its repairs worked out.

    Args:
        files: What the run has kept.
        kept: Ranking and refits are from there.
    """

    report: Report
    loaded: LoadedModel
    windows: TokenWindows
    ranking: Ranking
    refits: Refits | None
    files: TensorFiles
    kept: bool

    @classmethod
    def of(
        cls, report: Report, folder: Path, loaded: LoadedModel, windows: TokenWindows, phases: Phases
    ) -> "RebuildInputs":
        """What the run has kept of its ranking and refits; worked out again as it did where that is gone, and then kept."""
        config, space = config_of(report), space_of(config_of(report), anatomy_of(loaded.model))
        method, calibration = Method.of(report.run.recipe), windows.calibration
        own = own_files(folder, phases.note)
        anchors = method.refit_members or ()
        names = [*names_of(space.anatomy), *names_at(anchors, calibration)] if config.compensation else [STATISTICS]
        kept = all(own.get(name) is not None for name in names)
        with phases.phase(FITTING, steps(space.num_layers)) as advance:
            found, files = fitted(
                loaded,
                calibration,
                space,
                own if own.get(STATISTICS) else None,
                method,
                config.compensation,
                phases.note,
                advance,
            )
        if kept:
            refits: Refits | None = kept_at(space.anatomy, found.refits, anchors, calibration)
        else:
            with Supernet(loaded.model, found.ranking, found.refits, loaded.resident) as supernet:
                refits = anchored(supernet, anchors, calibration, space.widths, files, phases).compensation
        if files is not own:
            hand_on(files, folder, names, phases.note)
        return cls(report, loaded, windows, found.ranking, refits, own, kept)

    def cut(self, trial: TrialPart, phases: Phases, refit: str = "table") -> Cut:
        """The trial's model with these refits.

        Raises:
            ModelError: It does not measure what the run measured. Not looked at where all it is cut from was kept.
        """
        refits, ranking, column, kept = self.refits, self.ranking, column_of(self.report, trial, "table"), self.kept
        if refit == "sequential":
            refits, column, kept = self._in_sequence(trial, phases)
            ranking = refits.ranking
        assert column is not None  # only finished trials are found
        mask = PruningMask.from_architecture(architecture_of(trial), ranking)
        with phases.phase("cutting"):
            small = shrink(self.loaded.model, mask, refits)
            measured = expected = column.objectives.loss
            if not kept:
                measured = quality(small, self.windows.proxy).loss
            if not abs(measured - expected) <= LOSS_TOLERANCE:
                raise ModelError(
                    f"The rebuilt model's proxy loss is {measured:.3f} where the run measured {expected:.3f}: other versions of "
                    f"the libraries or another device than the run's ({self.report.run.device}) rank units differently, or what the run's "
                    f"folder '{OWN}' keeps is damaged, and made anew once that folder is removed."
                )
        return Cut(small, mask, refit, column)

    def _in_sequence(self, trial: TrialPart, phases: Phases) -> tuple[SequentialRefits, Refitted, bool]:
        """The trial's refits in sequence, what it measures with them, and whether that need not be looked at again."""
        column, architecture = column_of(self.report, trial, "sequential"), architecture_of(trial)
        found = kept_refits(self.files, trial.number, architecture, self.loaded.model.device)
        if found and column:
            return found, column, True
        with Supernet(self.loaded.model, self.ranking, None, self.loaded.resident, self.loaded.known) as supernet:
            with phases.phase(PHASE, supernet.anatomy.num_hidden_layers) as advance:
                refits = sequential(self.files, trial.number, supernet, architecture, self.windows.calibration, advance)
            if column:
                return refits, column, False
            proxy = self.windows.proxy
            own = supernet.using(refits).quality(architecture, proxy, supernet.distribution(proxy))
        assert trial.objectives is not None
        unmeasured = dict.fromkeys(("accuracy", "error", "tokens"))
        changed = {**with_perplexity({"kl": own.kl or 0.0, "loss": own.loss}), **unmeasured}
        return refits, Refitted(objectives=trial.objectives.model_copy(update=changed)), True

    def model(self, trial: TrialPart, phases: Phases, refit: str = "table") -> PreTrainedModel:
        """The trial's model with its own config, where the base model is: `generate` and `save_pretrained` work.

        It shares nothing with the base model, which stays as it is.
        """
        cut = self.cut(trial, phases, refit)
        return rebuilt(cut.model, anatomy_of(self.loaded.model), architecture_of(trial))
