"""What `--strategy` takes: one row for each of ours, and whatever installed packages register. Nothing heavy is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, Literal, get_args

from llmbo.config.plugins import plugin_named
from llmbo.errors import ConfigError, unknown
from llmbo.types import Source

GROUP = "llmbo.strategies"

Design = Literal["moved", "threshold", "random"]
Family = Literal["family", "threshold_family", "fisher_family", "taylor_family"]


@dataclass(frozen=True)
class Strategy:
    """How to build a proposer.

    Args:
        proposer: A dataclass whose fields are filled from the problem by name (`search.strategies.SearchProblem`); or
            `module:class`, imported when it is needed.
        design: Its initial design; None where it has none, or is one itself.
        wrapped: Whether the design is put before it (`Started`), or is its own business.
        fixed: Fields that belong to the name.
        family: Which of the problem's families it sees.
        recipes: Whether it searches recipes, and so needs a family that knows prices.

    Raises:
        ConfigError: There is no such design or family.
    """

    proposer: str | type[Any]
    design: Design | None = None
    wrapped: bool = True
    fixed: Mapping[str, Any] = field(default_factory=dict)
    family: Family = "family"
    recipes: bool = False

    def __post_init__(self) -> None:
        if self.design is not None and self.design not in get_args(Design):
            raise ConfigError(unknown("initial design", self.design, get_args(Design)))
        if self.family not in get_args(Family):
            raise ConfigError(unknown("family", self.family, get_args(Family)))

    def check(self, name: str, recipe_search: bool) -> None:
        """Refuse a strategy that searches recipes where none is to be tried.

        Raises:
            ConfigError: As said.
        """
        if self.recipes and not recipe_search:
            raise ConfigError(
                f"The strategy {name} searches recipes, and none is to be tried: add --recipe-search, in a comparison "
                "recipe_search = true. Recorded problems have no recipes."
            )


def _path(origin: str, source: Source, family: Family = "family") -> Strategy:
    """A family without search; gains are measured against members whose source is the path."""
    return Strategy(f"{_DESIGNS}:ThresholdProposer", fixed={"origin": origin, "source": source}, family=family)


_DESIGNS = "llmbo.search.baselines.designs"
_NSGA2 = "llmbo.search.baselines.nsga2:Nsga2Proposer"
_LINAS = "llmbo.search.baselines.linas:LinasProposer"
_OPTUNA = "llmbo.search.baselines.optuna_samplers:OptunaProposer"
_QNEHVI = "llmbo.search.acquisition:QNehviProposer"
STRATEGIES: Mapping[str, Strategy] = {
    "qnehvi": Strategy(_QNEHVI, "moved", wrapped=False, fixed={"advice": None}),
    "qnehvi-plain": Strategy(_QNEHVI, "threshold", wrapped=False, fixed={"advice": None}, family="threshold_family"),
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
    "nsga2-moved": Strategy(_NSGA2, "moved"),
    "nsga2-recipes": Strategy("llmbo.search.baselines.nsga2:Nsga2Recipes", "moved", recipes=True),
    "linas": Strategy(_LINAS, "random"),
    "linas-moved": Strategy(_LINAS, "moved"),
    "botorch": Strategy("llmbo.search.baselines.plain_botorch:PlainBotorchProposer", "random"),
    "optuna-tpe": Strategy(_OPTUNA, "random", fixed={"sampler": "tpe"}),
    "optuna-tpe-seeded": Strategy(_OPTUNA, "threshold", fixed={"sampler": "tpe"}),
    "optuna-tpe-moved": Strategy(_OPTUNA, "moved", fixed={"sampler": "tpe"}),
    "optuna-tpe-recipes": Strategy(
        "llmbo.search.baselines.optuna_samplers:OptunaRecipes", "moved", fixed={"sampler": "tpe"}, recipes=True
    ),
    "optuna-nsga2": Strategy(_OPTUNA, "random", fixed={"sampler": "nsga2"}),
    "optuna-nsga2-seeded": Strategy(_OPTUNA, "threshold", fixed={"sampler": "nsga2"}),
    "optuna-gp": Strategy(_OPTUNA, "random", fixed={"sampler": "gp"}),
    "optuna-gp-seeded": Strategy(_OPTUNA, "threshold", fixed={"sampler": "gp"}),
}


def strategy_plugin(name: str, own: Mapping[str, Strategy] = STRATEGIES) -> EntryPoint | None:
    """The plug-in behind a strategy's name, or None for one of our `own`.

    Raises:
        ConfigError: There is none of that name, or more than one.
    """
    return plugin_named("strategy", GROUP, name, own)
