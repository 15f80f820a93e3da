"""`llmbo cache`."""

from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of them. Runs keep what they have.")] = False,
) -> None:
    """List what preparations have left on disk, so that no model is prepared twice on one text; or remove it.

    Example: llmbo cache --clear
    """
    with one_line_errors(interrupted="Interrupted."):
        from llmbo.problem.kept import clear as remove
        from llmbo.problem.kept import kept, prepared_dir

        if clear:
            say(f"{remove() / 1e6:.0f} MB removed from '{prepared_dir()}'.")
            return
        found = kept()
        for one in found:
            say(
                f"{one.model:24} {one.dtype:9} {one.tokens:>8} tokens {one.bytes / 1e6:>9.0f} MB  used {one.days:.0f} days ago  "
                f"{one.folder.name}"
            )
        say(f"{sum(one.bytes for one in found) / 1e6:.0f} MB in {len(found)} preparations in '{prepared_dir()}'.")
