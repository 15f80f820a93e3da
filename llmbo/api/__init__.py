"""The Python face: `plan` says what a search takes, `optimize` searches, `load_run` opens what is stored, a `Run` hands out its models."""

from llmbo.api.run import Point, Run
from llmbo.api.search import load_run, optimize, plan
from llmbo.run.plan import Plan

__all__ = ["Plan", "Point", "Run", "load_run", "optimize", "plan"]
