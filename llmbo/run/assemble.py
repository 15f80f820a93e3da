"""The composition root: checked config -> finished parts. The only place where a name becomes an object."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PretrainedConfig, PreTrainedModel

from llmbo.advisor.assemble import Material, build_advised, check_advisor
from llmbo.advisor.context import LayerStatistics, Marginals, Setting
from llmbo.advisor.ledger import FILE, Ledger
from llmbo.config import RunConfig
from llmbo.errors import ConfigError, StorageError
from llmbo.models.loading import LoadedModel, load_config, load_model, max_positions
from llmbo.problem.expansion import ONE_LEVEL, STEPS, best_moves, expansions, moved_family
from llmbo.problem.family import ThresholdFamily, geometric_mean, narrowing_steps, unit_steps
from llmbo.problem.hardware import KIND_OF, Target, build_target, num_measurements, target_model
from llmbo.problem.marginals import measure_marginals
from llmbo.problem.objectives import Objective, build_objectives, known_limits, measured_limits
from llmbo.problem.proxy import ProxyEvaluator, known_values
from llmbo.problem.space import SearchSpace
from llmbo.report import DataPart, ImportancePart, ModelPart, SplitPart
from llmbo.report.files import RUNS
from llmbo.run.heartbeat import LOCK, LOOKING
from llmbo.run.store import TrialStore, delete_run, differences, stored_run
from llmbo.search.racing import RacingEvaluator
from llmbo.search.strategies import strategy_of
from llmbo.types import Evaluator, Phases, Proposer
from pruning.anatomy import Anatomy, BlockKind, anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows, cut_windows, read_text, sample_windows
from pruning.choices import Choices, read_items
from pruning.compensation import CompensationTable
from pruning.cost import Serving, cost_of
from pruning.importance import Statistics, activation, collect_statistics, fisher, layer_scores, taylor
from pruning.latency import Workload
from pruning.likelihood import dense_distribution
from pruning.masks import Ranking
from pruning.moves import move_costs
from pruning.narrowing import narrowing_costs
from pruning.supernet import Supernet

SCORED_TOKENS = 8192  # of the calibration windows score units; all of them enter the refits, which need more
ALLOCATION_TOKENS = 2048  # of them, at most a quarter, price the family's steps; four times as many do it no better
# Where the family is corrected, as parts of the way from its smallest member to the dense model: beyond these nothing is gained.
MOVED = (0.07, 0.23, 0.4)
SECOND_ORDER = 1.5  # more than 1 allows for what several moves cost together


@dataclass(frozen=True)
class Problem:
    """A prepared model: everything that search strategies share and none of what tells them apart.

    Args:
        family: The best allocation known without search; the other three are baselines.
        threshold_family: The same before widths were moved between blocks.
        limits: Largest allowed values of what is measured; `space` knows the others.
        importance: Scores per layer, as the report shows them (fields of `ImportancePart`).
        heldout_choices: Multiple-choice items that the search never saw; None when nothing asks for accuracy.
        target: Where the model will run; None when nothing asks for what depends on it.
    """

    space: SearchSpace
    family: ThresholdFamily
    threshold_family: ThresholdFamily
    fisher_family: ThresholdFamily
    taylor_family: ThresholdFamily
    supernet: Supernet
    proxy: ProxyEvaluator
    windows: TokenWindows
    dense: Mapping[str, float]
    limits: Mapping[str, float]
    statistics: LayerStatistics
    importance: Sequence[Mapping[str, Any]]
    target: Target | None
    heldout_choices: Choices | None

    @property
    def smallest(self) -> dict[str, float]:
        """What is known of the smallest legal model that the family has."""
        return known_values(self.space, self.family.at(0.0))

    def heldout(self) -> ProxyEvaluator:
        """An evaluator on windows that ranking, compensation and search never saw."""
        return ProxyEvaluator.on(self.windows.heldout, self.space, self.supernet, self.heldout_choices)

    def deployed(self, x: tuple[int, ...]) -> dict[str, float]:
        """Latency, energy and peak memory of the model cut for real, if they were asked for."""
        return self.target.measure(self.space.decode(x)) if self.target else {}

    def marginals(self, quality: str) -> Marginals:
        """What one level less costs in each block, measured on two windows that ranking saw."""
        windows = self.windows.calibration[:: max(1, len(self.windows.calibration) // 2)][:2]
        evaluators = [ProxyEvaluator.on(window[None], self.space, self.supernet) for window in windows]
        return measure_marginals(self.family, evaluators, quality, len(windows) / len(self.windows.proxy))


@dataclass(frozen=True)
class Run:
    """The parts of one run, ready for `run_search`."""

    config: RunConfig
    folder: Path
    problem: Problem
    objectives: tuple[Objective, ...]
    proposer: Proposer
    evaluator: Evaluator
    store: TrialStore
    ledger: Ledger


def build_proposer(strategy: str, problem: Problem, objectives: tuple[Objective, ...]) -> Proposer:
    """The proposer behind a strategy's name, without advice."""
    return strategy_of(strategy).build(strategy, problem, objectives, {})


def evaluator_of(
    config: RunConfig, problem: Problem, objectives: tuple[Objective, ...], store: TrialStore
) -> Evaluator:
    """The proxy, as it is or with races against the trials in `store`."""
    return RacingEvaluator(problem.proxy, objectives, store.trials) if config.racing else problem.proxy


def proposer_of(
    config: RunConfig, problem: Problem, objectives: tuple[Objective, ...], loaded: LoadedModel, ledger: Ledger
) -> Proposer:
    """The strategy's proposer, with the advisor that the settings name."""
    if config.advisor == "none":
        return build_proposer(config.strategy, problem, objectives)
    return build_advised(config, advice_material(config, problem, objectives, problem.dense, loaded), ledger)


def advice_material(
    config: RunConfig,
    problem: Problem,
    objectives: tuple[Objective, ...],
    dense: Mapping[str, float],
    loaded: LoadedModel,
) -> Material:
    """What an advisor of a run is made from; `dense` holds the dense model's values as the run has them."""
    setting = Setting(
        problem.family,
        objectives,
        dense,
        problem.statistics,
        config.advisor_context,
        config.budget,
        problem.limits,
    )
    return Material(setting, loaded, lambda: problem.marginals(setting.quality.name))


def load_windows(config: RunConfig, loaded: LoadedModel) -> TokenWindows:
    """The run's three sets of windows."""
    if config.text == "self":
        return sample_windows(loaded.model, loaded.tokenizer, config.windows, config.window, config.seed)
    return cut_windows(read_text(config.text), loaded.tokenizer, config.windows, config.window, config.seed)


def ranked(
    model: PreTrainedModel, windows: TokenWindows, on_window: Callable[[int], None] | None = None
) -> tuple[Statistics, Ranking]:
    """What one pass over the calibration windows tells, and which units of each layer stay first."""
    scored = max(1, SCORED_TOKENS // windows.calibration.shape[1])
    statistics = collect_statistics(model, windows.calibration, on_window=on_window, scored=scored)
    return statistics, activation(model, statistics).ranking()


@contextmanager
def prepared(
    config: RunConfig,
    loaded: LoadedModel,
    windows: TokenWindows,
    phases: Phases,
    profiles: Mapping[str, Any] | None = None,
) -> Iterator[Problem]:
    """Measure importance, build the compensation table and open the supernet, for as long as the context lasts.

    Args:
        profiles: Tables of the run that is continued, measured on the device where the model will run.
    """
    model = loaded.model
    serving = Serving(config.context, config.serve_batch)
    space = SearchSpace(anatomy_of(model), config.min_share, config.neuron_step, serving, known_limits(config.limits))
    target = _target(config, loaded, space, phases, profiles)
    if target is not None:
        space = replace(space, extra_costs=target.costs())
    choices, heldout_choices = _choices(config, loaded)
    with phases.phase("importance", len(windows.calibration)) as advance:
        statistics, ranking = ranked(model, windows, advance)
        importance = fisher(model, statistics)
        taylor_family = ThresholdFamily.from_importance(space, taylor(model, statistics))
        layers = layer_scores(model, statistics)
    with phases.phase("compensation"):
        table = CompensationTable(model, statistics, ranking) if config.compensation else None
        if table is not None:
            table.fill({kind: widths[1:-1] for kind, widths in space.widths.items()})
    del statistics
    with Supernet(model, ranking, table) as supernet:
        priced = min(ALLOCATION_TOKENS // windows.calibration.shape[1], len(windows.calibration) // 4)
        some = windows.calibration[: max(1, priced)]
        with phases.phase("allocation", len(some)) as advance:
            generator = torch.Generator(model.device).manual_seed(config.seed)
            costs = narrowing_costs(supernet, some, space.widths, generator, on_window=advance)
            steps = geometric_mean(unit_steps(space, importance), narrowing_steps(space, costs))
        threshold_family = ThresholdFamily.from_steps(space, steps, importance)
        with phases.phase("moves", len(MOVED) * len(some)) as advance:
            family = with_moves(threshold_family, supernet, some, costs, generator, advance)
        with phases.phase("dense model"):
            proxy = ProxyEvaluator.on(windows.proxy, space, supernet, choices)
            dense = proxy.evaluate(space.max_levels)
        families = {
            "family": family,
            "threshold_family": threshold_family,
            "fisher_family": ThresholdFamily.from_importance(space, importance),
            "taylor_family": taylor_family,
        }
        yield Problem(
            space,
            supernet=supernet,
            proxy=proxy,
            windows=windows,
            dense=dense,
            limits=measured_limits(config.limits),
            statistics=LayerStatistics.of(layers),
            importance=_importance_parts(layers),
            target=target,
            heldout_choices=heldout_choices,
            **families,
        )


def with_moves(
    family: ThresholdFamily,
    supernet: Supernet,
    windows: torch.Tensor,
    narrowing: Mapping[BlockKind, torch.Tensor],
    generator: torch.Generator,
    on_window: Callable[[int], None],
) -> ThresholdFamily:
    """The family corrected by what a level more or less of each block changes in some of its members, by `windows`; it keeps that."""
    space = family.space
    low = float(family.shares[0])
    anchors = list(dict.fromkeys(family.at(low + (1 - low) * part) for part in MOVED))
    anchors = [x for x in anchors if x != space.max_levels]
    dense = dense_distribution(supernet.model, windows)
    moves, measured = [], []

    def advance(before: int, done: int) -> None:
        on_window(before + done)

    for index, x in enumerate(anchors):
        costs = move_costs(
            supernet,
            space.decode(x),
            space.neighbouring_widths(x, STEPS),
            windows,
            dense,
            generator,
            on_window=partial(advance, index * len(windows)),
        )
        first, second = torch.cat([costs[block.kind] for block in space.anatomy.blocks]).unbind(-1)
        moves.append(best_moves(space, x, (first + SECOND_ORDER * second)[:, ONE_LEVEL]))
        measured.append(first + second)
    return replace(moved_family(family, anchors, moves), expansions=expansions(space, anchors, measured, narrowing))


def _target(
    config: RunConfig, loaded: LoadedModel, space: SearchSpace, phases: Phases, stored: Mapping[str, Any] | None
) -> Target | None:
    """What is known of the device where the model will run, if an objective or a limit needs it."""
    kinds = sorted({KIND_OF[name] for name in (*config.objectives, *config.limits) if name in KIND_OF})
    if not kinds:
        return None
    workload = Workload(sequences=config.serve_batch, context=config.context)
    with phases.phase(f"{' and '.join(kinds)} tables", num_measurements(space, kinds)) as advance:
        model = target_model(loaded, config.latency_target)
        return build_target(model, space, workload, kinds, stored, on_measured=advance)


def items_digest(config: RunConfig) -> str | None:
    """Of the multiple-choice items as they are now; None without any."""
    return hashlib.sha256(Path(config.items).expanduser().read_bytes()).hexdigest() if config.items else None


def _choices(config: RunConfig, loaded: LoadedModel) -> tuple[Choices | None, Choices | None]:
    """Every other multiple-choice item for the search, the rest for the finished front."""
    if not config.items:
        return None, None
    items = read_items(Path(config.items))
    search, heldout = (
        Choices.of(part, loaded.tokenizer, max_positions(loaded.model)) for part in (items[::2], items[1::2])
    )
    return search, heldout


@contextmanager
def assemble(config: RunConfig, fresh: bool, phases: Phases) -> Iterator[Run]:
    """Everything a run needs, checked in the order of what is cheapest to refuse. Writes nothing before all input is good.

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    folder = RUNS / config.name
    own_file = None if config.storage else folder / "study.db"
    url = config.storage or f"sqlite:///{own_file}"
    if not fresh:
        _continued(config, url)
    check_advisor(config, folder)
    with phases.phase("model files"):  # an alias is converted on first use
        _check_window(config, load_config(config.model))
    if config.text != "self":
        read_text(config.text)
    if config.items and len(read_items(Path(config.items))) < 2:
        raise ConfigError(f"--items {config.items} holds one item, at least two are needed: half of them are held out.")
    with _locked(folder):
        stored = None if fresh else _continued(config, url)  # again: the process before us may just have ended
        with phases.phase("model"):
            dtype, device = (stored["dtype"], stored["device"]) if stored else (config.dtype, config.device)
            loaded = load_model(config.model, dtype, device)
            windows = load_windows(config, loaded)
        facts = {**facts_of(loaded, windows), "items": items_digest(config)}
        if stored:
            items = ({"items": found.get("items")} for found in (stored, facts))
            if changes := changed_facts(stored, facts) + differences(*items):
                raise StorageError(_refusal(config, changes))
        with prepared(config, loaded, windows, phases, (stored or {}).get("profiles")) as problem:
            if problem.family.at(0.0) == problem.space.max_levels:
                raise ConfigError(
                    f"--min-share {config.min_share} leaves no model smaller than the dense one: lower it."
                )
            objectives = build_objectives(
                config.objectives, problem.dense, problem.smallest, config.reference_point, config.limits
            )
            if fresh:
                delete_run(url, config.name, own_file)
                (folder / FILE).unlink(missing_ok=True)
            store = TrialStore.create(
                url,
                config.name,
                problem.space,
                objectives,
                config.settings(),
                {
                    **facts,
                    "dense": dict(problem.dense),
                    "importance": list(problem.importance),
                    "profiles": problem.target.to_dict() if problem.target else None,
                },
            )
            ledger = Ledger(store, folder / FILE)
            proposer = proposer_of(config, problem, objectives, loaded, ledger)
            evaluator = evaluator_of(config, problem, objectives, store)
            yield Run(config, folder, problem, objectives, proposer, evaluator, store, ledger)


def _continued(config: RunConfig, url: str) -> dict[str, Any] | None:
    """Facts of the stored run that this command continues, or None."""
    found = stored_run(url, config.name)
    if found is None:
        return None
    settings, facts, finished = found
    if changes := differences(settings, config.settings()):
        raise StorageError(_refusal(config, changes))
    last = facts.get("run", {})  # of the last report
    reported = last.get("status") == "complete" and last["settings"]["budget"] >= finished
    if finished >= config.budget and reported:
        raise ConfigError(
            f"The run '{config.name}' has already spent its budget: {finished} of {config.budget} trials are done. "
            "Raise --budget to go on, choose another --name, or start over with --fresh."
        )
    return facts


def _check_window(config: RunConfig, model: PretrainedConfig) -> None:
    positions = getattr(model, "max_position_embeddings", config.window)
    if config.window > positions:
        raise ConfigError(
            f"--window {config.window} is longer than the {positions} positions that '{config.model}' knows."
        )


def facts_of(loaded: LoadedModel, windows: TokenWindows) -> dict[str, Any]:
    """What a run keeps of its model and text, so that others are noticed."""
    return {
        "dtype": loaded.dtype,
        "device": loaded.device,
        "model": _model_part(loaded, anatomy_of(loaded.model)),
        "data": _data_part(windows),
    }


def changed_facts(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Another model or text behind the same name. Where the model lies does not matter."""
    return differences({**stored["model"], "source": None}, {**found["model"], "source": None}) + differences(
        stored["data"], found["data"]
    )


def _refusal(config: RunConfig, changes: list[str]) -> str:
    listed = "; ".join(changes)
    return f"The run '{config.name}' was started with other settings ({listed}): choose another --name, or start over with --fresh."


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep a second process out of the run folder; the lock dies with the process that holds it."""
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=LOOKING)
        lock.acquire()
    except Timeout as error:
        raise StorageError(
            f"Another process is working on '{folder}': wait for it, or choose another --name."
        ) from error
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"Cannot write the run folder '{folder}' ({reason}): choose another --name or working directory."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # input that was refused leaves nothing behind
            if {path.name for path in folder.iterdir()} == {LOCK}:
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def _model_part(loaded: LoadedModel, anatomy: Anatomy) -> dict[str, Any]:
    cost = cost_of(anatomy, Architecture.full(anatomy))
    return ModelPart(
        name=loaded.name,
        source=loaded.source,
        model_type=anatomy.family.model_type,
        fingerprint=loaded.fingerprint,
        num_hidden_layers=anatomy.num_hidden_layers,
        hidden_size=anatomy.hidden_size,
        num_attention_heads=anatomy.num_attention_heads,
        num_key_value_heads=anatomy.num_key_value_heads,
        head_dim=anatomy.head_dim,
        intermediate_size=anatomy.intermediate_size,
        vocab_size=anatomy.vocab_size,
        params=cost.parameters,
        block_params=cost.block_parameters,
    ).model_dump()


def _importance_parts(layers: Mapping[str, Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Scores per layer to four digits: they are looked at, not computed with."""
    return [
        ImportancePart.model_validate(
            {"method": method, "kind": kind, "scores": [float(f"{score:.4g}") for score in scores.tolist()]}
        ).model_dump()
        for method, kinds in layers.items()
        for kind, scores in kinds.items()
    ]


def _data_part(windows: TokenWindows) -> dict[str, Any]:
    def split(part: torch.Tensor) -> SplitPart:
        return SplitPart(windows=len(part), tokens=math.prod(part.shape))

    return DataPart(
        source=windows.source,
        sha256=windows.sha256,
        available_tokens=windows.available_tokens,
        window=windows.length,
        bos=windows.bos,
        calibration=split(windows.calibration),
        proxy=split(windows.proxy),
        heldout=split(windows.heldout),
    ).model_dump()
