"""Phases that nobody watches."""

from contextlib import nullcontext


class Quiet:
    """Implements `llmbo.types.Phases`."""

    def phase(self, name: str, total: int | None = None) -> nullcontext:
        return nullcontext(lambda done: None)

    def note(self, text: str) -> None: ...
