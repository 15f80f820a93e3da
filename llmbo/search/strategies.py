"""The table of search strategies: name -> proposer. Heavy libraries are imported when a strategy is built."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

from llmbo.config import STRATEGIES
from llmbo.errors import ConfigError, unknown
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.problem.space import SearchSpace
from llmbo.search.baselines import RandomProposer, ThresholdProposer
from llmbo.search.baselines.designs import NUM_INITIAL, Started
from llmbo.types import Proposer, Source

Design = Literal["moved", "threshold", "random"]
Family = Literal["family", "threshold_family", "fisher_family", "taylor_family"]
Options = Mapping[str, Any]


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
class Strategy:
    """How to build a proposer.

    Args:
        proposer: `module:class`; the class is a dataclass whose fields are filled from the problem by name.
        design: Its initial design; None where it has none, or is one itself.
        wrapped: Whether the design is put before it (`Started`), or is its own business.
        fixed: Fields that belong to the name.
        family: Which of the problem's families it sees.
    """

    proposer: str
    design: Design | None = None
    wrapped: bool = True
    fixed: Options = field(default_factory=dict)
    family: Family = "family"

    @property
    def type(self) -> Any:
        module, name = self.proposer.split(":")
        return getattr(import_module(module), name)

    @property
    def options(self) -> dict[str, Any]:
        """What may be changed, with its default."""
        found = {
            item.name: item.default
            for item in dataclasses.fields(self.type)
            if item.init and item.default is not dataclasses.MISSING and item.name not in self.fixed
        }
        return found | ({"num_initial": NUM_INITIAL} if self.design and self.wrapped else {})

    def checked(self, name: str, options: Options) -> dict[str, Any]:
        """`options` as the proposer wants them.

        Raises:
            ConfigError: One is unknown, or of another type than its default.
        """
        known, checked = self.options, dict[str, Any]()
        for key, given in options.items():
            if key not in known:
                raise ConfigError(unknown(f"key of the strategy {name}", key, known))
            value: Any = tuple(given) if isinstance(given, list) else given
            kinds: Any = (int, float) if isinstance(known[key], float) else type(known[key])
            if known[key] is not None and (not isinstance(value, kinds) or isinstance(value, bool) != (kinds is bool)):
                raise ConfigError(f"The key {key} of the strategy {name} is like {known[key]!r}, got {value!r}.")
            if key == "num_initial" and isinstance(value, int) and value < 1:
                raise ConfigError(f"The key num_initial of the strategy {name} must be at least 1, got {value}.")
            checked[key] = value
        return checked

    def build(self, name: str, problem: SearchProblem, objectives: Sequence[Objective], options: Options) -> Proposer:
        checked = self.checked(name, options)
        parts = {
            "space": problem.space,
            "family": getattr(problem, self.family),
            "objectives": tuple(objectives),
            "dense": problem.dense,
            "limits": problem.limits,
            "problem": problem,
            **self.fixed,
        }
        num_initial = checked.pop("num_initial", NUM_INITIAL) if self.wrapped else NUM_INITIAL
        names = {item.name for item in dataclasses.fields(self.type) if item.init}
        search: Proposer = self.type(**{key: value for key, value in parts.items() if key in names}, **checked)
        if self.design is None or not self.wrapped:
            return search
        return Started(design_of(self.design, problem, objectives), search, problem.space, num_initial)


def _path(origin: str, source: Source, family: Family = "family") -> Strategy:
    """A family without search; gains are measured against members whose source is the path."""
    return Strategy(f"{_DESIGNS}:ThresholdProposer", fixed={"origin": origin, "source": source}, family=family)


_DESIGNS = "llmbo.search.baselines.designs"
_NSGA2 = "llmbo.search.baselines.nsga2:Nsga2Proposer"
_OPTUNA = "llmbo.search.baselines.optuna_samplers:OptunaProposer"
TABLE: dict[str, Strategy] = {
    "qnehvi": Strategy("llmbo.search.acquisition:QNehviProposer", "moved", wrapped=False, fixed={"advice": None}),
    "qnehvi-plain": Strategy(
        "llmbo.search.acquisition:QNehviProposer",
        "threshold",
        wrapped=False,
        fixed={"advice": None},
        family="threshold_family",
    ),
    "advised": Strategy("llmbo.advisor.strategy:AdvisedStrategy", "moved", wrapped=False),  # for comparisons only
    "threshold-moved": _path("threshold", Source.PATH),
    "threshold": _path("threshold", Source.PATH, "threshold_family"),
    "threshold-fisher": _path("threshold-fisher", Source.SEARCH, "fisher_family"),
    "llm-pruner": _path("llm-pruner", Source.SEARCH, "taylor_family"),
    "uniform": Strategy(f"{_DESIGNS}:UniformProposer"),
    "random": Strategy(f"{_DESIGNS}:RandomProposer"),
    "random-vectors": Strategy(f"{_DESIGNS}:RandomVectorsProposer"),
    "knapsack": Strategy("llmbo.search.baselines.knapsack:KnapsackProposer"),
    "local-search": Strategy("llmbo.search.baselines.local_search:LocalSearchProposer", "threshold"),
    "nsga2": Strategy(_NSGA2, "random"),
    "nsga2-seeded": Strategy(_NSGA2, "threshold"),
    "botorch": Strategy("llmbo.search.baselines.plain_botorch:PlainBotorchProposer", "random"),
    "optuna-tpe": Strategy(_OPTUNA, "random", fixed={"sampler": "tpe"}),
    "optuna-tpe-seeded": Strategy(_OPTUNA, "threshold", fixed={"sampler": "tpe"}),
    "optuna-nsga2": Strategy(_OPTUNA, "random", fixed={"sampler": "nsga2"}),
    "optuna-nsga2-seeded": Strategy(_OPTUNA, "threshold", fixed={"sampler": "nsga2"}),
    "optuna-gp": Strategy(_OPTUNA, "random", fixed={"sampler": "gp"}),
    "optuna-gp-seeded": Strategy(_OPTUNA, "threshold", fixed={"sampler": "gp"}),
}


def strategy_of(name: str) -> Strategy:
    """The strategy behind a name.

    Raises:
        ConfigError: There is none of that name; says which are like it.
    """
    if name not in TABLE:
        raise ConfigError(unknown("strategy", name, STRATEGIES))
    return TABLE[name]


def design_of(design: Design, problem: SearchProblem, objectives: Sequence[Objective]) -> Proposer:
    """The proposer of an initial design."""
    if design == "random":
        return RandomProposer(problem.space)
    family = problem.family if design == "moved" else problem.threshold_family
    return ThresholdProposer(family, tuple(objectives), problem.dense)
