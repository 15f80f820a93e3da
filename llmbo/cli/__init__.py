"""Flags, messages, exit codes: one file per command. Heavy imports happen inside the commands, so that `--help` answers at once."""

import typer

from llmbo.cli.compare import compare
from llmbo.cli.export import export
from llmbo.cli.models import models
from llmbo.cli.optimize import optimize

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Find the Pareto front of smaller models inside a pretrained LLM."""


for command in (optimize, compare, export, models):
    app.command()(command)
