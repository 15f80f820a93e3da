"""Flags, messages, exit codes: one file per command. Heavy imports happen inside the commands, so that `--help` answers at once."""

from typing import Annotated

import typer

from llmbo import __version__
from llmbo.cli import common
from llmbo.cli.advise import advise
from llmbo.cli.cache import cache
from llmbo.cli.common import OneLineGroup, say
from llmbo.cli.compare import compare
from llmbo.cli.elastic import elastic
from llmbo.cli.evaluate import evaluate
from llmbo.cli.export import export
from llmbo.cli.models import models
from llmbo.cli.optimize import optimize
from llmbo.cli.profile import profile
from llmbo.cli.recover import recover
from llmbo.cli.report import report
from llmbo.cli.rerank import rerank
from llmbo.cli.watch import watch
from llmbo.cli.worker import worker

app = typer.Typer(cls=OneLineGroup, no_args_is_help=True, pretty_exceptions_enable=False)


def _tell_version(asked: bool) -> None:
    if asked:
        say(f"llmbo {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Find the Pareto front of smaller models inside a pretrained LLM."""
    common.running = f"llmbo {context.invoked_subcommand}"


for command in (
    optimize,
    worker,
    report,
    watch,
    export,
    evaluate,
    recover,
    elastic,
    rerank,
    compare,
    advise,
    profile,
    models,
    cache,
):
    app.command()(command)
