"""From a strategy's name to its proposer. Heavy libraries are imported when the strategy is asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import Any, Protocol

from llmbo.config.plugins import failure, loaded
from llmbo.config.strategies import STRATEGIES, Design, Strategy, strategy_plugin
from llmbo.errors import ConfigError, unknown
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines import RandomProposer, ThresholdProposer
from llmbo.search.baselines.designs import NUM_INITIAL, Started
from llmbo.search.contract import PluginProposer
from llmbo.search.soundness import on_sound_path
from llmbo.types import Proposer

Options = Mapping[str, Any]
# Fields that are filled. `memory` is a dict that a proposer hands on to the one that takes its place when the path is left.
FILLED = ("space", "family", "objectives", "dense", "limits", "problem", "memory", "tell")


class SearchProblem(Protocol):
    """What a strategy may know about a problem before the first evaluation."""

    @property
    def space(self) -> SearchSpace: ...

    @property
    def family(self) -> ThresholdFamily: ...

    @property
    def threshold_family(self) -> ThresholdFamily: ...

    @property
    def fisher_family(self) -> ThresholdFamily: ...

    @property
    def taylor_family(self) -> ThresholdFamily: ...

    @property
    def dense(self) -> Mapping[str, float]: ...

    @property
    def limits(self) -> Mapping[str, float]:
        """Largest allowed values of what is measured; `space` knows the others."""
        ...


@dataclass(frozen=True)
class ProposerFactory:
    """A strategy that is ready to be built.

    Args:
        type: The class of its proposer.
        plugin: Where a third party's comes from; None for our own.
    """

    name: str
    strategy: Strategy
    type: Any
    plugin: EntryPoint | None = None

    @property
    def design(self) -> Design | None:
        return self.strategy.design

    @property
    def options(self) -> dict[str, Any]:
        """What may be changed, with its default."""
        found = {
            item.name: item.default
            for item in dataclasses.fields(self.type)
            if item.init
            and item.default is not dataclasses.MISSING
            and item.name not in (*FILLED, *self.strategy.fixed)
        }
        return found | ({"num_initial": NUM_INITIAL} if self.design and self.strategy.wrapped else {})

    def checked(self, options: Options) -> dict[str, Any]:
        """`options` as the proposer wants them.

        Raises:
            ConfigError: One is unknown, or of another type than its default.
        """
        known, checked = self.options, dict[str, Any]()
        for key, given in options.items():
            if key not in known:
                raise ConfigError(unknown(f"key of the strategy {self.name}", key, known))
            value: Any = tuple(given) if isinstance(given, list) else given
            kinds: Any = (int, float) if isinstance(known[key], float) else type(known[key])
            if known[key] is not None and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool)):
                raise ConfigError(f"The key {key} of the strategy {self.name} is like {known[key]!r}, got {value!r}.")
            if key == "num_initial" and isinstance(value, int) and value < 1:
                raise ConfigError(f"The key num_initial of the strategy {self.name} must be at least 1, got {value}.")
            checked[key] = value
        return checked

    def build(
        self,
        problem: SearchProblem,
        objectives: Sequence[Objective],
        options: Options,
        tell: Callable[[str], None] = lambda line: None,
    ) -> Proposer:
        """The proposer for a problem.

        Args:
            tell: Is told in one line what the user should know.

        Raises:
            ConfigError: An option is unknown or of the wrong type, recipes are searched where none is to be tried, or a third party's
                class takes exception to something.
        """
        self.strategy.check(self.name, problem.family.prices is not None)
        build = partial(self._built, problem, objectives, self.checked(options), {}, tell)
        if self.strategy.family != "family":
            return build(getattr(problem, self.strategy.family))
        return on_sound_path(problem.family, problem.threshold_family, objectives, problem.dense, build, tell)

    def _built(
        self,
        problem: SearchProblem,
        objectives: Sequence[Objective],
        options: Options,
        memory: dict[str, Any],
        tell: Callable[[str], None],
        family: ThresholdFamily,
    ) -> Proposer:
        checked, strategy = dict(options), self.strategy
        num_initial = checked.pop("num_initial", NUM_INITIAL) if strategy.wrapped else NUM_INITIAL
        parts = {
            "space": problem.space,
            "family": family,
            "objectives": tuple(objectives),
            "dense": problem.dense,
            "limits": problem.limits,
            "problem": problem,
            "memory": memory,
            "tell": tell,
            **strategy.fixed,
        }
        names = {item.name for item in dataclasses.fields(self.type) if item.init}
        search: Proposer
        try:
            search = self.type(**{key: value for key, value in parts.items() if key in names}, **checked)
        except Exception as error:
            if self.plugin is None:
                raise
            raise ConfigError(failure("strategy", self.plugin, error)) from error
        if self.plugin is not None:
            search = PluginProposer(self.plugin, search, problem.space)
        if self.design is None or not strategy.wrapped:
            return search
        return Started(design_of(self.design, problem, family, objectives), search, problem.space, num_initial)


def strategy_of(name: str, own: Mapping[str, Strategy] = STRATEGIES) -> ProposerFactory:
    """The strategy behind a name.

    Raises:
        ConfigError: There is none of that name, and it says which are like it; or a third party's cannot be used.
    """
    point = strategy_plugin(name, own)
    if point is None:
        return ProposerFactory(name, own[name], _class_of(own[name]))
    found = loaded("strategy", point)
    try:
        strategy = found if isinstance(found, Strategy) else Strategy(found)
        return ProposerFactory(name, strategy, _fillable(_class_of(strategy), strategy.fixed), point)
    except Exception as error:
        raise ConfigError(failure("strategy", point, error)) from error


def _class_of(strategy: Strategy) -> Any:
    if not isinstance(strategy.proposer, str):
        return strategy.proposer
    module, _, name = strategy.proposer.partition(":")
    return getattr(import_module(module), name)


def _fillable(cls: Any, fixed: Options) -> Any:
    """`cls`, if it is a proposer that a problem can fill."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and hasattr(cls, "propose")):
        raise TypeError(f"expected a dataclass with the method propose, or a Strategy, got {cls!r}")
    fields = {item.name: item for item in dataclasses.fields(cls) if item.init}
    for name in fixed:
        if name not in fields:
            raise TypeError(f"it has no field {name} to be fixed")
    for name, item in fields.items():
        if item.default is item.default_factory is dataclasses.MISSING and name not in (*FILLED, *fixed):
            raise TypeError(f"its field {name} needs a default, as none of {', '.join(FILLED)} is called so")
    return cls


def design_of(
    design: Design, problem: SearchProblem, moved: ThresholdFamily, objectives: Sequence[Objective]
) -> Proposer:
    """The proposer of an initial design; `moved` is the path that the strategy searches from."""
    if design == "random":
        return RandomProposer(problem.space)
    family = moved if design == "moved" else problem.threshold_family
    return ThresholdProposer(family, tuple(objectives), problem.dense)
