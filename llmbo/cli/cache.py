"""`llmbo cache`."""

from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them. Runs keep what they have.")] = False,
) -> None:
    """List what preparations have left on disk, so that no model is prepared twice on one text, and copies of weights that are mapped;
    or remove them.

    Example: llmbo cache --clear
    """
    with one_line_errors(interrupted="Interrupted."):
        from llmbo.models.aliases import cache_dir
        from llmbo.models.mapping import clear_copies, copies
        from llmbo.problem.kept import clear as remove
        from llmbo.problem.kept import kept, prepared_dir

        if clear:
            say(f"{remove() / 1e6:.0f} MB removed from '{prepared_dir()}'.")
            if freed := clear_copies():
                say(f"{freed / 1e6:.0f} MB of weights removed from '{cache_dir()}'.")
            return
        found = kept()
        for one in found:
            say(
                f"{one.model:24} {one.dtype:9} {one.tokens:>8} tokens {one.bytes / 1e6:>9.0f} MB  used {one.days:.0f} days ago  "
                f"{one.folder.name}"
            )
        say(f"{sum(one.bytes for one in found) / 1e6:.0f} MB in {len(found)} preparations in '{prepared_dir()}'.")
        mapped = copies()
        for copy in mapped:
            say(f"{copy.source:24} {copy.dtype:9} {copy.bytes / 1e6:>9.0f} MB of weights  {copy.folder.name}")
        if mapped:
            say(
                f"{sum(one.bytes for one in mapped) / 1e6:.0f} MB in {len(mapped)} copies of weights in '{cache_dir()}'."
            )
