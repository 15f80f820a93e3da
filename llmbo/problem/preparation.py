"""A loaded model and its windows -> a problem to search: importance, refits, the allocation path, the dense model's values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmbo.config import RunConfig
from llmbo.config.objectives import measured_limits, priced_by
from llmbo.models.checks import check_finite, check_tokens
from llmbo.models.loading import LoadedModel, max_positions
from llmbo.problem.anchors import anchored, anchors_of, names_at
from llmbo.problem.exchanges import Measure, Tensors, empty, with_exchanges
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.file_size import file_costs
from llmbo.problem.hardware import KIND_OF, Target, build_target, num_measurements, target_model
from llmbo.problem.kept import files_of
from llmbo.problem.marginals import Marginals, measure_marginals
from llmbo.problem.method import DEFAULT, Method
from llmbo.problem.prices import Prices, block_marginal_costs, unit_marginal_costs
from llmbo.problem.proxy import ProxyEvaluator, known_values
from llmbo.problem.recipe import recipe_of
from llmbo.problem.residence import Machine, refit_cache
from llmbo.problem.shared import Shared
from llmbo.problem.space import SearchSpace, space_of
from llmbo.problem.statistics import LayerStatistics
from llmbo.types import FITTING, Phases
from pruning.anatomy import anatomy_of
from pruning.calibration import TokenWindows
from pruning.choices import Choices
from pruning.importance import fisher, layer_scores, taylor
from pruning.items import read_items
from pruning.latency import Workload
from pruning.refits import Fitted, RefitCache, fit, names_of
from pruning.sensitivity import block_sensitivity
from pruning.statistics import steps
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.walk import device_of


@dataclass(frozen=True)
class Problem:
    """A prepared model: everything that search strategies share and none of what tells them apart.

    Args:
        prices: Of which paths of all recipes are made.
        family: The best allocation known without search; the other three are baselines.
        threshold_family: The same before width exchanges.
        limits: Largest allowed values of what is measured; `space` knows the others.
        layers: Scores per layer by method and kind (`pruning.importance.layer_scores`).
        heldout_choices: Multiple-choice items that the search never saw; None when nothing asks for accuracy.
        files: What `pruning.refits.fit` has left, and more.
        target: Where the model will run; None when nothing asks for what depends on it.
    """

    space: SearchSpace
    prices: Prices
    family: ThresholdFamily
    threshold_family: ThresholdFamily
    fisher_family: ThresholdFamily
    taylor_family: ThresholdFamily
    supernet: Supernet
    proxy: ProxyEvaluator
    windows: TokenWindows
    dense: Mapping[str, float]
    limits: Mapping[str, float]
    layers: Mapping[str, Mapping[str, torch.Tensor]]
    method: Method
    files: TensorFiles
    target: Target | None
    heldout_choices: Choices | None
    _marginals: dict[str, Marginals] = field(init=False, default_factory=dict, repr=False)

    @property
    def statistics(self) -> LayerStatistics:
        """What advisors read of `layers`."""
        return LayerStatistics.of(self.layers)

    @property
    def kept(self) -> list[str]:
        """What of `files` trials are cut from."""
        return [*names_of(self.space.anatomy), *names_at(self.method.refit_members or (), self.windows.calibration)]

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
        """What one level less costs in each block, measured once on two windows that ranking saw."""
        if quality in self._marginals:
            return self._marginals[quality]
        windows = self.windows.calibration[:: max(1, len(self.windows.calibration) // 2)][:2]
        evaluators = [ProxyEvaluator.on(window[None], self.space, self.supernet) for window in windows]
        evaluations = len(windows) / len(self.windows.proxy)
        found = measure_marginals(self.family, evaluators, quality, evaluations, self.method.operating_point)
        return self._marginals.setdefault(quality, found)


def fitted(
    loaded: LoadedModel,
    calibration: torch.Tensor,
    space: SearchSpace,
    files: TensorFiles | None = None,
    method: Method = DEFAULT,
    compensation: bool = True,
    tell: Callable[[str], None] = lambda line: None,
    on_layer: Callable[[int], None] | None = None,
    cache: RefitCache | None = None,
    shared: Shared | None = None,
) -> tuple[Fitted, TensorFiles]:
    """Statistics, ranking and refits of a model, with the files that they are kept in.

    Args:
        calibration: `num_windows x length` token ids.
        files: Where they may be already; by default where all runs keep theirs.
        compensation: Whether there are refits at all, which `cache` keeps once they are asked for.
        shared: Where the others of a team have put theirs.

    Raises:
        ModelError: The model computes NaN or infinite numbers, or is not the one that `shared` was made from.
    """
    recipe = method.ridge, method.order, max(1, method.scored_tokens // calibration.shape[1])
    widths = space.widths if compensation else None
    if files is None:
        files = files_of(loaded, calibration, widths, *recipe, tell, shared)
    try:
        heads = space.query_heads
        return fit(
            loaded.model, calibration, widths, files, *recipe, on_layer=on_layer, cache=cache, queries=heads
        ), files
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # with the ridge, whatever is finite can be factored
        check_finite(loaded.name, loaded.dtype, torch.nan)
        raise


@contextmanager
def prepared(
    config: RunConfig,
    loaded: LoadedModel,
    windows: TokenWindows,
    phases: Phases,
    profiles: Mapping[str, Any] | None = None,
    method: Method | None = None,
    shared: Shared | None = None,
) -> Iterator[Problem]:
    """Measure importance, build the compensation table and open the supernet, for as long as the context lasts.

    Args:
        profiles: Tables of the run that is continued, measured on the device where the model will run.
        method: Of the run that is continued; by default today's, with the recipe that the settings name.
        shared: The run's preparation where it is shared: what this machine lacks is taken from there.
    """
    model, method = loaded.model, method or replace(DEFAULT, allocation=recipe_of(config.recipe))
    space = space_of(config, anatomy_of(model))
    costs = file_costs(config, loaded)
    target = _target(config, loaded, space, phases, profiles)
    space = replace(space, extra_costs=costs | (target.costs() if target else {}))
    if method.priced_by == "objectives":
        space = replace(space, priced_by=priced_by(config.objectives))
    choices, heldout_choices = _choices(config, loaded)
    calibration = windows.calibration
    with phases.phase(FITTING, steps(space.num_layers)) as advance:
        room = refit_cache(config, space.anatomy, model.dtype.itemsize, Machine.of(loaded.device), loaded.offload)
        found, files = fitted(
            loaded, calibration, space, None, method, config.compensation, phases.note, advance, room, shared
        )
        statistics = found.statistics
        sums = (part for block in statistics.blocks.values() for part in (block.square, block.fisher))
        check_finite(loaded.name, loaded.dtype, *sums)
        importance = fisher(statistics)
        taylor_family = ThresholdFamily.from_importance(space, taylor(statistics))
        layers = layer_scores(statistics)
    with Supernet(model, found.ranking, found.refits, loaded.resident, loaded.known) as supernet:
        enough = min(method.allocation_tokens // calibration.shape[1], len(calibration) // 4)
        some = calibration[: max(1, enough)]
        keep = partial(_stage, files, device_of(model), len(some), config.seed)
        with phases.phase("allocation", steps(space.num_layers)) as advance:
            like = empty({kind: (space.num_layers, len(w)) for kind, w in space.widths.items()})
            sensitivity = keep(
                "sensitivity",
                like,
                lambda drawn: block_sensitivity(supernet, some, space.widths, drawn, on_layer=advance),
            )
            prices = Prices.of(space, unit_marginal_costs(space, importance), block_marginal_costs(space, sensitivity))
            bare = method.allocation.bare
            threshold_family = ThresholdFamily.along(space, prices.path(bare), importance)
            threshold_family = replace(threshold_family, prices=prices, recipe=bare)
        with phases.phase("width exchanges", len(method.anchors) * steps(space.num_layers)) as advance:
            measured = threshold_family, prices, supernet, some, sensitivity, keep
            family = with_exchanges(*measured, advance, method, phases.note)
            prices = family.prices or prices
            if not config.recipe_search:
                family, threshold_family = (replace(path, prices=None) for path in (family, threshold_family))
        members = method.refit_members
        if members is None:
            members = anchors_of(family, config.refit_anchors or 0)
        supernet = anchored(supernet, members, calibration, space.widths, files, phases)
        with phases.phase("dense model"):
            proxy = ProxyEvaluator.on(windows.proxy, space, supernet, choices)
            dense = proxy.evaluate_dense()
            check_finite(loaded.name, loaded.dtype, dense["loss"])
        if shared is not None:
            phases.note(shared.taken)
        families = {
            "family": family,
            "threshold_family": threshold_family,
            "fisher_family": ThresholdFamily.from_importance(space, importance),
            "taylor_family": taylor_family,
        }
        yield Problem(
            space,
            prices,
            supernet=supernet,
            proxy=proxy,
            windows=windows,
            dense=dense,
            limits=measured_limits(config.limits),
            layers=layers,
            method=replace(method, refit_members=members),
            files=files,
            target=target,
            heldout_choices=heldout_choices,
            **families,
        )


def _stage(
    files: TensorFiles, device: torch.device, windows: int, seed: int, name: str, like: Tensors, measure: Measure
) -> Tensors:
    """A part of a preparation, from its files or measured now.

    Tokens are drawn anew for each part: what was taken from the files changes nothing that comes after it.
    """
    drawn = torch.Generator(device).manual_seed(seed)
    return files.once(f"{name}_{windows}_{seed}", lambda: measure(drawn), like)


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


def _choices(config: RunConfig, loaded: LoadedModel) -> tuple[Choices | None, Choices | None]:
    """Every other multiple-choice item for the search, the rest for the finished front."""
    if "accuracy" not in config.objectives:
        return None, None
    items = [item for file in config.item_files for item in read_items(Path(file)).items]
    search, heldout = (
        Choices.of(part, loaded.tokenizer, max_positions(loaded.model)) for part in (items[::2], items[1::2])
    )
    check_tokens(loaded.model, loaded.tokenizer, *search.rows.tokens, *heldout.rows.tokens)
    return search, heldout
