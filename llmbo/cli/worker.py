"""`llmbo worker`: one more process, on any machine, that evaluates for a run."""

import os
import shlex
import sys
from collections.abc import Sequence
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
    artifacts: Annotated[
        str,
        typer.Option(
            metavar="DIR|s3://BUCKET/PREFIX",
            help="Where the run's --artifacts are on this machine, if elsewhere than the run's.",
        ),
    ] = "",
    memory: Annotated[
        str, typer.Option(help="Of this worker's device, e.g. 24GB, if another than the run may take of its own.")
    ] = "",
    offload: Annotated[
        str,
        typer.Option(help="auto, none, gpu, cpu, disk: where this worker's layers wait, if elsewhere than the run's."),
    ] = "",
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors.")] = False,
    print_slurm: Annotated[
        bool,
        typer.Option(
            "--print-slurm", help="Print a script that Slurm's sbatch starts once a worker, instead of working."
        ),
    ] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Events on stderr, one JSON object each.")] = False,
) -> None:
    """Evaluate candidates of a run that another process has started, until its search is done.

    Workers come and go as they like. Where the process that proposes is gone, one of them goes on in its place and writes the report.

    Example: llmbo worker runs/llama --device cuda:1

    Example: llmbo worker postgresql://user@host/trials --name llama

    Example: llmbo worker journal:/shared/llama.log --print-slurm > workers.sh; sbatch --array=1-8 workers.sh
    """
    if print_slurm:
        placed = {"--device": device if device != "auto" else "", "--model": model, "--artifacts": artifacts}
        placed |= {"--memory": memory, "--offload": offload}
        options = {"--name": name, **placed}
        return say(slurm_script(run, [word for pair in options.items() if pair[1] for word in pair]), err=False)
    with one_line_errors(interrupted="Left the run; it goes on without this worker.", smaller="--memory"):
        from llmbo.display.progress import build_display
        from llmbo.models.silence import libraries_silenced
        from llmbo.run.stored import run_in
        from llmbo.run.worker import work

        url, name = (run, name or run_in(run)) if _is_url(run) else own_database(run)[1:]
        show = "nothing" if quiet else "json" if json_logs else "auto"
        with libraries_silenced(), build_display(show, 0, name) as display:  # type: ignore[arg-type]
            work(url, name, display, shlex.join(["llmbo", *sys.argv[1:]]), device, model, artifacts, memory, offload)
        say(f"The search of the run '{name}' is done.")


def slurm_script(run: str, options: Sequence[str]) -> str:
    """What `sbatch --array` starts for each worker, where this command was typed. Holds no password: that stays in the environment.

    Args:
        run: As typed: a run folder or the URL of a database.
        options: Further words of `llmbo worker`.
    """
    from llmbo.run.database import shown_url

    secret = _is_url(run) and shown_url(run) != run
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=llmbo-worker",
        "#SBATCH --array=1-8        # so many workers",
        "#SBATCH --gres=gpu:1       # for each",
        "#SBATCH --requeue          # one that is pre-empted begins again",
        "#SBATCH --output=llmbo-worker-%A-%a.log",
        f"cd {shlex.quote(os.getcwd())} || exit",
    ]
    if secret:  # sbatch hands the environment on
        lines.append(': "${LLMBO_RUN:?export it, with the address of the database, before sbatch}"')
    return "\n".join([*lines, shlex.join(["exec", "llmbo", "worker", *([] if secret else [run]), *options])])


def _is_url(run: str) -> bool:
    return "://" in run or run.startswith("journal:")
