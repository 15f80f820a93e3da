"""`llmbo models`."""

from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say


def models(
    check: Annotated[
        str | None,
        typer.Option(
            help="Tell what of this model (alias, local folder or hub name) can be searched, and which formats hold the results, "
            "from its config and tokenizer alone.",
            metavar="MODEL",
        ),
    ] = None,
) -> None:
    """List the model aliases, or check one model before anything is measured. Any local folder or hub name works as well.

    Example: llmbo models --check llama
    """
    if check is None:
        from llmbo.models.aliases import ALIASES

        for alias in ALIASES.values():
            say(f"{alias.name:10} {alias.title}; from the package {alias.package}, {alias.licence}")
        return
    with one_line_errors(interrupted="Interrupted."):
        from llmbo.deploy.check import findings
        from llmbo.models.silence import silence_libraries

        silence_libraries()
        for finding in findings(check):
            say(finding)
