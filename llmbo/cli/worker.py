"""`llmbo worker`: one more process, on any machine, that evaluates for a run."""

import shlex
import sys
from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say
from llmbo.cli.watch import own_database


def worker(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_URL",
            envvar="LLMBO_RUN",
            help="Run folder, its name below runs/, or the URL of the run's database, which LLMBO_RUN may hold as well.",
        ),
    ],
    name: Annotated[str, typer.Option(help="Of the run, where its database holds several.")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    model: Annotated[
        str, typer.Option(help="Where the base model is on this machine, if elsewhere than the run's.")
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Events on stderr, one JSON object each.")] = False,
) -> None:
    """Evaluate candidates of a run that another process has started, until its search is done.

    Workers come and go as they like. Where the process that proposes is gone, one of them goes on in its place and writes the report.

    Example: llmbo worker runs/llama --device cuda:1

    Example: llmbo worker postgresql://user@host/trials --name llama
    """
    with one_line_errors(interrupted="Left the run; it goes on without this worker.", smaller="--memory of the run"):
        from llmbo.display.progress import build_display
        from llmbo.models.silence import libraries_silenced
        from llmbo.run.stored import run_in
        from llmbo.run.worker import work

        is_url = "://" in run or run.startswith("journal:")
        url, name = (run, name or run_in(run)) if is_url else own_database(run)[1:]
        show = "nothing" if quiet else "json" if json_logs else "auto"
        with libraries_silenced(), build_display(show, 0, name) as display:  # type: ignore[arg-type]
            work(url, name, display, shlex.join(["llmbo", *sys.argv[1:]]), device, model)
        say(f"The search of the run '{name}' is done.")
