"""The strategies of a comparison: those of `--strategy`, and the default method with an advisor, whose keys say which."""

from llmbo.config.strategies import STRATEGIES, Strategy
from llmbo.search import strategies
from llmbo.search.strategies import ProposerFactory

COMPARED = {**STRATEGIES, "advised": Strategy("llmbo.advisor.strategy:AdvisedStrategy", "moved", wrapped=False)}


def strategy_of(name: str) -> ProposerFactory:
    """The strategy behind a name.

    Raises:
        ConfigError: There is none of that name, or a third party's cannot be used.
    """
    return strategies.strategy_of(name, COMPARED)
