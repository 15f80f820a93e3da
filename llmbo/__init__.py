"""Search for the Pareto front of smaller models inside a pretrained decoder LLM.

    import llmbo

    run = llmbo.optimize("llama", budget=40)
    run.front                                   # the models worth having, smallest first
    run.export(trial=37, format="gguf", out="exports/small")

Names are looked up on first use (PEP 562), so that `import llmbo` and the command line start without the heavy libraries.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmbo.errors import LlmboError, ReplyAwaited
from llmbo.version import __version__

if TYPE_CHECKING:
    from llmbo.api import Plan, Point, Run, load_run, optimize, plan

__all__ = ["LlmboError", "Plan", "Point", "ReplyAwaited", "Run", "__version__", "load_run", "optimize", "plan"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("llmbo.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
