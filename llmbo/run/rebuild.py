"""A stored run -> the models of its trials, cut again as the run cut them, or refused."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedModel

from llmbo.config import RunConfig
from llmbo.errors import ConfigError, ModelError, StorageError, first_fault
from llmbo.models.loading import LoadedModel, load_model
from llmbo.problem.kept import OWN, hand_on, own_files
from llmbo.problem.preparation import Method, fitted
from llmbo.problem.space import space_of
from llmbo.problem.texts import load_windows
from llmbo.report.files import find_run, read_report
from llmbo.report.schema import Report, TrialPart
from llmbo.run.facts import changed_facts, facts_of
from llmbo.types import Phases
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows
from pruning.compensation import Refits
from pruning.export.rebuild import rebuilt
from pruning.likelihood import quality
from pruning.masks import PruningMask, Ranking
from pruning.refits import STATISTICS
from pruning.shrinking import shrink
from pruning.statistics import steps

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


def config_of(report: Report) -> RunConfig:
    """The settings that the run was started with, but for who proposed: a plug-in that did may be gone."""
    return RunConfig.from_settings(report.run.settings, name=report.run.name, strategy="qnehvi", advisor="none")


def load_base(
    report: Report, phases: Phases, model: str | LoadedModel | None = None, device: str | None = None
) -> tuple[LoadedModel, TokenWindows]:
    """The run's base model and windows.

    Args:
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
            loaded = load_model(model or config.model, report.run.dtype, device or report.run.device)
        if loaded.dtype != report.run.dtype:
            raise ModelError(
                f"The run '{report.run.name}' had its model in {report.run.dtype}, the given one is in {loaded.dtype}: "
                f"load it in {report.run.dtype}."
            )
        windows = load_windows(config, loaded)
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
class RebuildInputs:
    """What every trial of a run is cut from: the base model, its units ranked and its repairs worked out."""

    report: Report
    loaded: LoadedModel
    windows: TokenWindows
    ranking: Ranking
    refits: Refits | None

    @classmethod
    def of(
        cls, report: Report, folder: Path, loaded: LoadedModel, windows: TokenWindows, phases: Phases
    ) -> "RebuildInputs":
        """What the run has kept of its ranking and refits; worked out again as it did where that is gone, and then kept."""
        config, space = config_of(report), space_of(config_of(report), anatomy_of(loaded.model))
        own = own_files(folder)
        with phases.phase("importance and refits", steps(space.num_layers)) as advance:
            found, files = fitted(
                loaded,
                windows.calibration,
                space,
                own if own.get(STATISTICS) else None,
                Method.of(report.run.recipe),
                config.compensation,
                phases.note,
                advance,
            )
        if files is not own:
            hand_on(files, folder, space.anatomy, phases.note)
        return cls(report, loaded, windows, found.ranking, found.refits)

    def cut(self, trial: TrialPart) -> tuple[PreTrainedModel, PruningMask]:
        """The trial's model, in the run's dtype.

        Raises:
            ModelError: It does not measure what the run measured.
        """
        mask = PruningMask.from_architecture(architecture_of(trial), self.ranking)
        small = shrink(self.loaded.model, mask, self.refits)
        measured = quality(small, self.windows.proxy).loss
        assert trial.objectives is not None  # only finished trials are found
        expected = trial.objectives.loss
        if not abs(measured - expected) <= LOSS_TOLERANCE:
            raise ModelError(
                f"The rebuilt model's proxy loss is {measured:.3f} where the run measured {expected:.3f}: other versions of "
                f"the libraries or another device than the run's ({self.report.run.device}) rank units differently, or what the run's "
                f"folder '{OWN}' keeps is damaged, and made anew once that folder is removed."
            )
        return small, mask

    def model(self, trial: TrialPart) -> PreTrainedModel:
        """The trial's model with its own config, where the base model is: `generate` and `save_pretrained` work.

        It shares nothing with the base model, which stays as it is.
        """
        small, _ = self.cut(trial)
        return rebuilt(small, anatomy_of(self.loaded.model), architecture_of(trial))
