"""A loaded model and its windows -> a problem to search: importance, refits, the allocation path, the dense model's values."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from llmbo.config import RunConfig
from llmbo.config.objectives import known_limits, measured_limits
from llmbo.models.checks import check_finite, check_tokens
from llmbo.models.loading import LoadedModel, max_positions
from llmbo.problem.expansion import ONE_LEVEL, STEPS, best_exchanges, exchanged_family, expansions
from llmbo.problem.family import ThresholdFamily, block_marginal_costs, geometric_mean, unit_marginal_costs
from llmbo.problem.hardware import KIND_OF, Target, build_target, num_measurements, target_model
from llmbo.problem.marginals import Marginals, measure_marginals
from llmbo.problem.proxy import ProxyEvaluator, known_values
from llmbo.problem.space import SearchSpace
from llmbo.problem.statistics import LayerStatistics
from llmbo.types import Phases
from pruning.anatomy import BlockKind, anatomy_of
from pruning.calibration import TokenWindows, cut_windows, read_text, sample_windows
from pruning.choices import Choices
from pruning.compensation import RIDGE, CompensationTable
from pruning.cost import Serving
from pruning.exchanges import exchange_costs
from pruning.importance import activation, fisher, layer_scores, taylor
from pruning.items import read_items
from pruning.latency import Workload
from pruning.likelihood import dense_distribution
from pruning.masks import Ranking
from pruning.sensitivity import block_sensitivity
from pruning.statistics import Statistics, collect_statistics
from pruning.supernet import Supernet

# Exchanges are made to lower KL. They are dropped where it is more than so many times what it was, measured on the same tokens,
# and by more than so many nats.
LOSS_OF_EXCHANGES = 1.2
UNSEEN = 0.01


@dataclass(frozen=True)
class Method:
    """The constants behind the prepared problem, so that experiments can sweep them; runs use the defaults.

    Args:
        scored_tokens: Of the calibration windows, so many score units; all of them enter the refits, which need more.
        allocation_tokens: Of them, at most a quarter, tell block sensitivity and width exchanges; four times as many do it no better.
        ridge: Of the refits, see `pruning.compensation`.
        anchors: Where the path is corrected, as parts of the way from its smallest member to the dense model: beyond these
            nothing is gained.
        second_order: Weight of the expansions' second order; more than 1 allows for what several exchanges cost together.
        operating_point: Where one level less of each block is measured, as such a part: most of a front's gain is decided there.
    """

    scored_tokens: int = 8192
    allocation_tokens: int = 2048
    ridge: float = RIDGE
    anchors: tuple[float, ...] = (0.07, 0.23, 0.4)
    second_order: float = 1.5
    operating_point: float = 0.35


DEFAULT = Method()


@dataclass(frozen=True)
class Problem:
    """A prepared model: everything that search strategies share and none of what tells them apart.

    Args:
        family: The best allocation known without search; the other three are baselines.
        threshold_family: The same before width exchanges.
        limits: Largest allowed values of what is measured; `space` knows the others.
        layers: Scores per layer by method and kind (`pruning.importance.layer_scores`).
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
    layers: Mapping[str, Mapping[str, torch.Tensor]]
    method: Method
    target: Target | None
    heldout_choices: Choices | None

    @property
    def statistics(self) -> LayerStatistics:
        """What advisors read of `layers`."""
        return LayerStatistics.of(self.layers)

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
        evaluations = len(windows) / len(self.windows.proxy)
        return measure_marginals(self.family, evaluators, quality, evaluations, self.method.operating_point)


def load_windows(config: RunConfig, loaded: LoadedModel) -> TokenWindows:
    """The run's three sets of windows."""
    if config.text == "self":
        return sample_windows(loaded.model, loaded.tokenizer, config.windows, config.window, config.seed)
    windows = cut_windows(read_text(config.text), loaded.tokenizer, config.windows, config.window, config.seed)
    check_tokens(loaded.model, loaded.tokenizer, windows.calibration, windows.proxy, windows.heldout)
    return windows


def ranked(
    model: PreTrainedModel,
    windows: TokenWindows,
    on_window: Callable[[int], None] | None = None,
    method: Method = DEFAULT,
    compensation: bool = True,
) -> tuple[Statistics, Ranking]:
    """What one pass over the calibration windows tells, and which units of each layer stay first.

    Args:
        compensation: Whether refits follow: without them there is no need of Gram matrices, the largest part by far.
    """
    scored = max(1, method.scored_tokens // windows.calibration.shape[1])
    statistics = collect_statistics(model, windows.calibration, on_window=on_window, scored=scored, grams=compensation)
    return statistics, activation(model, statistics).ranking()


@contextmanager
def prepared(
    config: RunConfig,
    loaded: LoadedModel,
    windows: TokenWindows,
    phases: Phases,
    profiles: Mapping[str, Any] | None = None,
    method: Method = DEFAULT,
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
        statistics, ranking = ranked(model, windows, advance, method, config.compensation)
        sums = (part for block in statistics.blocks.values() for part in (block.square, block.fisher))
        check_finite(loaded.name, loaded.dtype, *sums)
        importance = fisher(model, statistics)
        taylor_family = ThresholdFamily.from_importance(space, taylor(model, statistics))
        layers = layer_scores(model, statistics)
    with phases.phase("compensation"):
        table = CompensationTable(model, statistics, ranking, ridge=method.ridge) if config.compensation else None
        if table is not None:
            table.fill({kind: widths[1:-1] for kind, widths in space.widths.items()})
    del statistics
    with Supernet(model, ranking, table) as supernet:
        enough = min(method.allocation_tokens // windows.calibration.shape[1], len(windows.calibration) // 4)
        some = windows.calibration[: max(1, enough)]
        with phases.phase("allocation", len(some)) as advance:
            generator = torch.Generator(model.device).manual_seed(config.seed)
            sensitivity = block_sensitivity(supernet, some, space.widths, generator, on_window=advance)
            costs = geometric_mean(unit_marginal_costs(space, importance), block_marginal_costs(space, sensitivity))
        threshold_family = ThresholdFamily.from_marginal_costs(space, costs, importance)
        with phases.phase("width exchanges", len(method.anchors) * len(some)) as advance:
            family = with_exchanges(
                threshold_family, supernet, some, sensitivity, generator, advance, method, phases.note
            )
        with phases.phase("dense model"):
            proxy = ProxyEvaluator.on(windows.proxy, space, supernet, choices)
            dense = proxy.evaluate(space.max_levels)
            check_finite(loaded.name, loaded.dtype, dense["loss"])
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
            layers=layers,
            method=method,
            target=target,
            heldout_choices=heldout_choices,
            **families,
        )


def with_exchanges(
    family: ThresholdFamily,
    supernet: Supernet,
    windows: torch.Tensor,
    sensitivity: Mapping[BlockKind, torch.Tensor],
    generator: torch.Generator,
    on_window: Callable[[int], None],
    method: Method = DEFAULT,
    tell: Callable[[str], None] = lambda line: None,
) -> ThresholdFamily:
    """The family after width exchanges, by what a level more or less of each block changes in some members; it keeps that.

    What an anchor's exchanges bring is measured on half of the windows: where they lose, the expansion that promised a gain was wrong,
    and is dropped with them.

    Args:
        windows: `num_windows x length` token ids, to measure these changes on.
        sensitivity: Of the dense model's blocks, `num_layers x levels` by kind.
        tell: Is told in one line of exchanges that are dropped.
    """
    space = family.space
    low = float(family.shares[0])
    anchors = list(dict.fromkeys(family.at(low + (1 - low) * part) for part in method.anchors))
    anchors = [x for x in anchors if x != space.max_levels]
    dense = dense_distribution(supernet.model, windows)
    exchanges, sound, measured = [], [], []
    half = (len(windows) + 1) // 2

    def advance(before: int, done: int) -> None:
        on_window(before + done)

    def measured_kl(point: torch.Tensor) -> float:
        x = tuple(point.int().tolist())
        return supernet.quality(space.decode(x), windows[:half], dense.rows(0, half)).kl or 0.0

    for index, x in enumerate(anchors):
        costs = exchange_costs(
            supernet,
            space.decode(x),
            space.neighbouring_widths(x, STEPS),
            windows,
            dense,
            generator,
            on_window=partial(advance, index * len(windows)),
        )
        first, second = torch.cat([costs[block.kind].cpu() for block in space.anatomy.blocks]).unbind(-1)
        exchange = best_exchanges(space, x, (first + method.second_order * second)[:, ONE_LEVEL])
        plain = torch.tensor(x, dtype=torch.float64)
        if exchange.any() and bool(space.legal((plain + exchange)[None])):
            before, after = measured_kl(plain), measured_kl(plain + exchange)
            if after > LOSS_OF_EXCHANGES * before + UNSEEN:
                tell(
                    f"Width exchanges at share {float(space.share(plain[None])):.2f} would have raised KL from {before:.3g} to "
                    f"{after:.3g} and are dropped: the search goes on along the path without them."
                )
                exchanges.append(torch.zeros_like(exchange))
                continue
        exchanges.append(exchange)
        sound.append(x)
        measured.append(first + second)
    corrected = exchanged_family(family, anchors, exchanges)
    return replace(corrected, expansions=expansions(space, sound, measured, sensitivity))


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
