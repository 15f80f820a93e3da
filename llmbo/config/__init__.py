"""What the user may choose, by name, and every check that needs neither a model nor anything heavy. All rooms may import it."""

from llmbo.config.run import DTYPE_CHOICES, EARLIER, MAX_NAME_BYTES, RESTATED, TOLD, RunConfig, restated
from llmbo.config.strategies import STRATEGIES

__all__ = ["DTYPE_CHOICES", "EARLIER", "MAX_NAME_BYTES", "RESTATED", "STRATEGIES", "TOLD", "RunConfig", "restated"]
