"""A picture that is redrawn in place in a notebook's output, as `rich.live.Live` redraws one in a terminal."""

import io
import time
from collections.abc import Callable
from typing import Any

from rich.console import RenderableType

from llmbo.display.console import Console

WIDTH = 110
SECONDS_BETWEEN = 0.25
_PRE = '<pre style="line-height: 1.2; white-space: pre; overflow-x: auto">{code}</pre>'


def notebook_console() -> Console:
    """Keeps what is printed, for a `NotebookLive` to show."""
    return Console(record=True, file=io.StringIO(), width=WIDTH, force_terminal=True, force_jupyter=False, _environ={})


class NotebookLive:
    """What was printed to the console so far, and below it the picture as it is now.

    Args:
        console: From `notebook_console`.
        picture: Gives what to draw.
    """

    def __init__(
        self, console: Console, picture: Callable[[], RenderableType], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._picture = picture
        self._clock = clock
        self._drawn = 0.0
        self._handle: Any = None

    def start(self) -> None:
        from IPython.display import display  # there wherever a notebook is

        self._handle = display(self._html(), display_id=True)
        self._drawn = self._clock()

    def refresh(self) -> None:
        if self._handle is not None and self._clock() - self._drawn >= SECONDS_BETWEEN:
            self._handle.update(self._html())
            self._drawn = self._clock()

    def stop(self) -> None:
        """Leaves the printed lines; the picture goes, as it does in a terminal."""
        if self._handle is not None:
            self._handle.update(self._html(last=True))

    def _html(self, last: bool = False) -> Any:
        from IPython.display import HTML

        drawn = notebook_console()
        if not last:
            drawn.print(self._picture())
        parts = (
            console.export_html(inline_styles=True, clear=False, code_format=_PRE) for console in (self._console, drawn)
        )
        return HTML("".join(parts))
