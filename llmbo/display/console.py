"""Where text reaches a terminal. Names, origins, reasons and replies come from models, reports and servers: none of it is trusted."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from llmbo.errors import printable


def decimals(value: float, sign: str = "") -> str:
    """Four decimals; of what is large, such as a hypervolume over bytes, four digits."""
    return f"{value:{sign}.4f}" if abs(value) < 1000 else f"{value:{sign}.4g}"


class Console(RichConsole):
    """Rich's, for text that is not trusted: no markup in it, and nothing that a terminal obeys."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(printable(text), style)
