"""`llmbo models`."""

from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say
from llmbo.config.formats import engines_help
from llmbo.errors import ConfigError


def models(
    check: Annotated[
        str | None,
        typer.Option(
            help="Tell what of this model (alias, local folder or hub name) can be searched, and which formats hold the results, "
            "from its config and tokenizer alone.",
            metavar="MODEL",
        ),
    ] = None,
    deploy: Annotated[
        list[str] | None,
        typer.Option(metavar="ENGINE", help=f"With --check: an engine that is to run them. {engines_help()}."),
    ] = None,
) -> None:
    """List the model aliases, or check one model before anything is measured. Any local folder or hub name works as well.

    Example: llmbo models --check llama --deploy vllm
    """
    if check is None and not deploy:
        from llmbo.models.aliases import ALIASES

        for alias in ALIASES.values():
            say(f"{alias.name:10} {alias.title}; from the package {alias.package}, {alias.licence}")
        return
    with one_line_errors(interrupted="Interrupted."):
        from llmbo.deploy.check import findings
        from llmbo.models.silence import silence_libraries

        silence_libraries()
        if check is None:
            raise ConfigError("--deploy belongs to --check MODEL here: name the model.")
        for finding in findings(check, deploy or ()):
            say(finding)
