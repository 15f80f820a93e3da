"""The Python face: `optimize` searches, `load_run` opens what a search has stored, a `Run` hands out its models."""

from llmbo.api.run import Point, Run
from llmbo.api.search import load_run, optimize

__all__ = ["Point", "Run", "load_run", "optimize"]
