"""The composition root: checked config -> finished parts. The only place where a name becomes an object."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llmbo.advisor.assemble import AdvisorInputs, build_advised, check_advisor
from llmbo.advisor.context import Setting
from llmbo.advisor.store import FILE, AdviceStore
from llmbo.config import RunConfig, restated
from llmbo.errors import ConfigError, DamagedError, StorageError
from llmbo.evaluation.items import Exam, read_item_files
from llmbo.models.loading import Found, LoadedModel, find_prunable, load_model, load_tokenizer
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.stored import anatomy_of_config, model_of_config
from llmbo.problem.elastic import adapted, adapter_of, check_unseen, heard
from llmbo.problem.engines import check_engines
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.kept import forget, own_files
from llmbo.problem.method import DEFAULT, Method
from llmbo.problem.objectives import Objective, build_objectives
from llmbo.problem.preparation import Problem, prepared
from llmbo.problem.recipe import RECIPES, AllocationRecipe
from llmbo.problem.residence import placed
from llmbo.problem.sequence import check_refits, least_tokens
from llmbo.problem.shared import Shared, check_artifacts
from llmbo.problem.texts import keep_written, load_elsewhere, load_windows
from llmbo.report.files import RUNS, read_report
from llmbo.run.database import delete_run, find_storage, network_of, open_storage, url_of
from llmbo.run.facts import changed_facts, differences, facts_of, importance_parts, items_digest
from llmbo.run.lease import Pulse, leased, wait_until_free
from llmbo.run.lock import locked
from llmbo.run.patience import Patience
from llmbo.run.recipes import recipe_named
from llmbo.run.store import TrialStore
from llmbo.run.stored import as_started, stored_run
from llmbo.run.team import forget_team
from llmbo.run.tokens import settled
from llmbo.search.racing import RacingEvaluator
from llmbo.search.soundness import on_sound_path
from llmbo.search.strategies import strategy_of
from llmbo.types import Evaluator, Phases, Proposer
from pruning.anatomy import Anatomy, anatomy_of
from pruning.calibration import TokenWindows
from pruning.errors import NotEnoughText
from pruning.items import ItemFile
from pruning.tensor_files import TensorFiles
from pruning.text import check_chat, read_mix, read_text


@dataclass(frozen=True)
class RunParts:
    """The parts of one run, ready for `execute`.

    Args:
        elsewhere: Windows of another domain to judge the front on as well.
        items: The files of items that the settings name.
        exams: Those that the finished front is judged on as a whole: none where the search counts accuracy, on half of them.
    """

    config: RunConfig
    folder: Path
    problem: Problem
    objectives: tuple[Objective, ...]
    proposer: Proposer
    evaluator: Evaluator
    store: TrialStore
    advice: AdviceStore
    elsewhere: TokenWindows | None
    loaded: LoadedModel
    items: Sequence[ItemFile]
    exams: Sequence[Exam]


def build_proposer(
    strategy: str, problem: Problem, objectives: tuple[Objective, ...], tell: Callable[[str], None] = lambda line: None
) -> Proposer:
    """The proposer behind a strategy's name, without advice."""
    return strategy_of(strategy).build(problem, objectives, {}, tell)


def evaluator_of(
    config: RunConfig, problem: Problem, objectives: tuple[Objective, ...], store: TrialStore
) -> Evaluator:
    """The proxy, as it is or with races against the trials in `store`."""
    return RacingEvaluator(problem.proxy, objectives, store.trials) if config.racing else problem.proxy


def proposer_of(
    config: RunConfig,
    problem: Problem,
    objectives: tuple[Objective, ...],
    loaded: LoadedModel,
    advice: AdviceStore,
    tell: Callable[[str], None],
) -> Proposer:
    """The strategy's proposer, with the advisor that the settings name."""
    if config.advisor == "none":
        return build_proposer(config.strategy, problem, objectives, tell)
    inputs = advisor_inputs(config, problem, objectives, problem.dense, loaded, tell)

    def build(family: ThresholdFamily) -> Proposer:
        return build_advised(config, replace(inputs, setting=replace(inputs.setting, family=family)), advice)

    return on_sound_path(problem.family, problem.threshold_family, objectives, problem.dense, build, tell)


def advisor_inputs(
    config: RunConfig,
    problem: Problem,
    objectives: tuple[Objective, ...],
    dense: Mapping[str, float],
    loaded: LoadedModel,
    tell: Callable[[str], None],
) -> AdvisorInputs:
    """What an advisor of a run is made from; `dense` holds the dense model's values as the run has them."""
    setting = Setting(
        problem.family,
        objectives,
        dense,
        problem.statistics,
        config.advisor_context,
        problem.limits,
    )
    return AdvisorInputs(setting, loaded, lambda: problem.marginals(setting.quality.name), tell)


@contextmanager
def assemble(config: RunConfig, fresh: bool, phases: Phases, given: LoadedModel | None = None) -> Iterator[RunParts]:
    """Everything a run needs, checked in the order of what is cheapest to refuse. Writes nothing before all input is good.

    Args:
        given: The model, where the caller has loaded it; `config` then holds its dtype and device.

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    folder = RUNS / config.name
    own_file, url = None if config.storage else folder / "study.db", url_of(folder, config.storage)
    if kind := network_of(url):
        phases.note(f"The run's database is on a network file system ({kind}): no worker may join it, see --storage.")
    before = None
    if not fresh:
        config = as_started(config, url)
        before = _continued(config, url)
    check_advisor(config, folder)
    strategy_of(config.strategy)  # a plug-in may be broken
    check_artifacts(config.artifacts)
    with phases.phase("model files"):  # an alias is converted on first use
        base = given or find_prunable(config.model)
        check_window(config, base.model.config if isinstance(base, LoadedModel) else base.config)
        if config.chat:
            check_chat(base.tokenizer if isinstance(base, LoadedModel) else load_tokenizer(base))
    if config.text != "self":
        read_mix(config.text)
    # A stored run has its numbers, whatever became of the file or run that they are from.
    named = None if before else recipe_named(config.recipe)
    if named and config.recipe not in RECIPES:
        phases.note(f"Recipe {named[1]}.")
    if config.heldout_text != "none":
        read_text(config.heldout_text)
    open_ended, anchors_open = not config.calibration_tokens, config.refit_anchors is None
    anatomy = anatomy_of(base.model) if isinstance(base, LoadedModel) else anatomy_of_config(base)
    engines = check_engines(config, *_parts(base)) if config.deploy else ""
    if named:
        named[0].bonus(anatomy.num_hidden_layers)  # before anything is measured
    config = _settled(config, base, anatomy)
    check_refits(config, anatomy)
    items = item_files(config)
    adapter = adapter_of(config)
    pulse: Pulse | None = None
    with locked(folder):
        with suppress(DamagedError) if fresh and own_file else nullcontext():
            storage = find_storage(url)
            if storage is not None:
                pulse = Pulse(storage, config.name, folder)  # kept: what it has seen counts when the run is taken over
                wait_until_free(pulse, phases)
        stored = None if fresh else _continued(config, url)  # again: the process before us may just have ended
        with phases.phase("model"):
            dtype, device = (stored["dtype"], stored["device"]) if stored else (config.dtype, config.device)
            loaded = (
                base
                if isinstance(base, LoadedModel)
                else load_model(config.model, *placed(config, base, dtype, device))
            )
            for note in (*loaded.notes, engines or check_engines(config, loaded.model, loaded.tokenizer)):
                phases.note(note)
            judged_by = () if "accuracy" in config.objectives else items
            exams = [Exam.of(file, loaded.model, loaded.tokenizer) for file in judged_by]
            shared = (
                Shared.of((stored or {}).get("shared"), phases.note, config.artifacts) if config.artifacts else None
            )
            own = own_files(folder, shared=shared) if stored else None
            config, windows = _windows(config, loaded, open_ended, own, phases)
            if anchors_open and config.calibration_tokens < least_tokens(anatomy):  # of a short text there may be fewer
                config = replace(config, refit_anchors=0)
            check_refits(config, anatomy)
        data = facts_of(loaded, windows)["data"]
        elsewhere = load_elsewhere(config, loaded, data)
        if adapter:
            check_unseen(config, adapter, data, elsewhere)
            loaded = adapted(adapter, loaded, *heard(windows, elsewhere))
        facts = {**facts_of(loaded, windows), "items": items_digest(config)}
        if stored:
            digests = ({"items": found.get("items")} for found in (stored, facts))
            if changes := changed_facts(stored, facts) + differences(*digests):
                raise StorageError(_refusal(config, changes))
        method = Method.of(stored.get("recipe")) if stored else _new_method(config, named)
        with prepared(config, loaded, windows, phases, (stored or {}).get("profiles"), method, shared) as problem:
            if problem.family.at(0.0) == problem.space.max_levels:
                raise ConfigError(
                    f"--min-share {config.min_share} leaves no model smaller than the dense one: lower it."
                )
            objectives = build_objectives(
                config.objectives, problem.dense, problem.smallest, config.reference_point, config.limits
            )
            facts |= {
                "dense": dict(problem.dense),
                "importance": importance_parts(problem.layers),
                "recipe": problem.method.recipe,
                "profiles": problem.target.to_dict() if problem.target else None,
            }
            if fresh and own_file:
                delete_run(url, config.name, own_file)
                pulse = None
            pulse = pulse or Pulse(open_storage(url), config.name, folder)
            with leased(pulse, phases, folder) as lease:
                if fresh:
                    delete_run(url, config.name)
                    forget_team(pulse.storage, config.name)
                    (folder / FILE).unlink(missing_ok=True)
                elif _continued(config, url) != stored:
                    raise StorageError(
                        f"Another process has worked on the run '{config.name}' while this one started: run the same command again."
                    )
                if not stored:  # what another run of this name has kept is not its own
                    forget(folder)
                keep_written(config, windows, own_files(folder, phases.note))
                store = TrialStore.create(
                    pulse.storage, config.name, problem.space, objectives, config.settings(), facts, lease,
                    Patience(url, phases.note),
                )  # fmt: skip
                advice = AdviceStore(store, folder / FILE)
                proposer = proposer_of(config, problem, objectives, loaded, advice, phases.note)
                evaluator = evaluator_of(config, problem, objectives, store)
                yield RunParts(
                    config, folder, problem, objectives, proposer, evaluator, store, advice, elsewhere, loaded, items, exams
                )  # fmt: skip


def _parts(base: Found | LoadedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, without its weights where it is not loaded, and its tokenizer."""
    if isinstance(base, LoadedModel):
        return base.model, base.tokenizer
    return model_of_config(base), load_tokenizer(base)


def _new_method(config: RunConfig, named: tuple[AllocationRecipe, str] | None) -> Method:
    """Of a run that begins: today's, with the recipe that the settings name, if it was not looked up before."""
    recipe, _ = named or recipe_named(config.recipe)
    return replace(DEFAULT, allocation=recipe)


def _settled(config: RunConfig, base: Found | LoadedModel, anatomy: Anatomy) -> RunConfig:
    """With a number of calibration tokens, and of members with refits of their own."""
    if config.calibration_tokens and config.refit_anchors is not None:  # nothing to measure
        return config
    if isinstance(base, LoadedModel):
        return settled(config, anatomy, base.dtype, base.device)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, base.config.get_text_config())
    return settled(config, anatomy, dtype, device)


def _windows(
    config: RunConfig, loaded: LoadedModel, open_ended: bool, own: TensorFiles | None, phases: Phases
) -> tuple[RunConfig, TokenWindows]:
    """The run's windows, with fewer calibration tokens where the text is short and nobody asked for so many."""
    while True:
        try:
            return config, load_windows(config, loaded, own, phases)
        except NotEnoughText:
            if not open_ended or config.calibration_tokens < 2 * config.window:
                raise
            config = replace(config, calibration_tokens=config.calibration_tokens // 2)


def _continued(config: RunConfig, url: str) -> dict[str, Any] | None:
    """Facts of the stored run that this command continues, or None."""
    found = stored_run(url, config.name)
    if found is None:
        return None
    settings, facts, finished = found
    if changes := differences(restated(settings), config.settings()):
        raise StorageError(_refusal(config, changes))
    last = facts.get("run", {})  # of the last report
    reported = last.get("status") == "complete" and last["settings"]["budget"] >= finished and _readable(config)
    refitted = reported and last["settings"].get("refit_front", 0) >= config.refit_front
    if finished >= config.budget and refitted:
        raise ConfigError(
            f"The run '{config.name}' has already spent its budget: {finished} of {config.budget} trials are done. "
            "Raise --budget or --refit-front to go on, choose another --name, or start over with --fresh."
        )
    return facts


def item_files(config: RunConfig) -> tuple[ItemFile, ...]:
    """Those that the settings name; raises ConfigError for what they cannot be asked for."""
    files = read_item_files(config.item_files)
    if files and "accuracy" in config.objectives:
        for file in files:
            if file.kind != "multiple_choice":
                raise ConfigError(
                    f"--items {file.source} has last words, which no objective counts: leave it out, or accuracy out of --objectives "
                    "to judge the finished front on it."
                )
        if sum(len(file.items) for file in files) < 2:
            raise ConfigError(
                f"--items {files[0].source} holds one item, at least two are needed: half of them are held out."
            )
    return files


def _readable(config: RunConfig) -> bool:
    """Whether the run's report is there and whole: otherwise there is something left to do."""
    with suppress(StorageError):
        return bool(read_report(RUNS / config.name))
    return False


def check_window(config: RunConfig, model: PretrainedConfig) -> None:
    """Raise ConfigError if the model cannot take a whole window."""
    positions = getattr(model, "max_position_embeddings", config.window)
    if config.window > positions:
        raise ConfigError(
            f"--window {config.window} is longer than the {positions} positions that '{config.model}' knows."
        )


def _refusal(config: RunConfig, changes: list[str]) -> str:
    listed = "; ".join(changes)
    return f"The run '{config.name}' was started with other settings ({listed}): choose another --name, or start over with --fresh."
