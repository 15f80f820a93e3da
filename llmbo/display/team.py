"""The processes that evaluate for a run, as `llmbo watch` shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Member:
    """One process.

    Args:
        claims: Numbers of the trials that it has to evaluate.
        done: Trials that it has finished.
        per_minute: Of the last of these; None before the first.
        heard: Seconds since its last heartbeat, as seen from here; None before the first.
        gone: It has left, or nothing is heard of it any more.
    """

    name: str
    device: str
    claims: tuple[int, ...]
    done: int
    per_minute: float | None
    heard: float | None
    gone: bool

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """In the columns of `team_table`."""
        rate = "" if self.per_minute is None else f"{self.per_minute:.3g}/min"
        heard = "gone" if self.gone else "" if self.heard is None else f"{self.heard:.0f} s"
        return self.name, self.device, f"{self.done} done", rate, heard, self._claimed

    @property
    def line(self) -> str:
        name, device, done, rate, heard, claimed = self.cells
        told = [done, rate, claimed, heard if self.gone or not heard else f"last heard {heard} ago"]
        return f"{name} ({device}): {', '.join(filter(None, told))}"

    @property
    def _claimed(self) -> str:
        if not self.claims:
            return "" if self.gone else "waiting"
        return f"trial {' '.join(map(str, self.claims))}"


def team_table(members: Sequence[Member], rows: int) -> Table:
    """A row for each process, those that are there first; where there are more than `rows`, the rest is counted."""
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "left", "right", "right", "right", "left"):
        table.add_column(justify=justify, no_wrap=True, overflow="ellipsis")
    ordered = sorted(members, key=lambda member: member.gone)
    shown = ordered if len(ordered) <= rows else ordered[: max(0, rows - 1)]
    for member in shown:
        style = "dim" if member.gone else ""
        table.add_row(*(Text(cell, style) for cell in member.cells))
    if rest := ordered[len(shown) :]:
        there, done = sum(not member.gone for member in rest), sum(member.done for member in rest)
        table.add_row(
            Text(f"{len(rest)} more", "dim"), Text(f"{there} there", "dim"), Text(f"{done} done", "dim"), "", "", ""
        )
    return table
