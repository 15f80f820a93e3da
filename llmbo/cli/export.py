"""`llmbo export`: a trial of a run as a folder that loads where people deploy."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors


def export(
    run: Annotated[str, typer.Argument(help="Run folder, or its name below runs/.", metavar="RUN")],
    trial: Annotated[int, typer.Option(help="Number of a finished trial, usually one of the front.")],
    format: Annotated[str, typer.Option(help="hf, gguf or padded.")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must be empty or not exist.")],
    dtype: Annotated[
        str,
        typer.Option(
            help="hf, padded: auto (as the run measured), float32, bfloat16, float16. gguf: f16, bf16, q8_0, f32."
        ),
    ] = "",
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file, e.g. 500MB.")] = "5GB",
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to rebuild on; by default the run's.")] = None,
) -> None:
    """Write a trial as a Hugging Face folder (hf), a llama.cpp file (gguf) or a zero-padded stock folder (padded).

    What was written is loaded again in a fresh process and its logits compared before the folder appears.

    Example: llmbo export runs/llama --trial 38 --format gguf --out exports/llama-54
    """
    from rich.console import Console

    with one_line_errors(interrupted="Interrupted. Nothing was left in the output folder."):
        from llmbo.deploy.export import export as carry_out
        from llmbo.deploy.export import place_order
        from llmbo.display.progress import Display
        from llmbo.models.loading import silence_libraries

        silence_libraries()
        order = place_order(run, trial, format, dtype, out, max_shard_size)
        with Display(Console(stderr=True), 0) as display:
            check = carry_out(order, shlex.join(["llmbo", *sys.argv[1:]]), display, model, device)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    values = order.trial.objectives
    assert values is not None
    typer.echo(
        f"{out}: {values.params / 1e6:.1f}M of {order.report.model.params / 1e6:.1f}M parameters, {order.dtype}, {size / 1e6:.1f} MB. "
        f"Checked by {check.by}: difference {check.difference:.1e} of the logits' spread."
    )
    if format == "padded":
        typer.echo(
            "Padded with zeros to equal layers: this format saves no memory and no time. Use hf or gguf for that."
        )
    typer.echo(f"How to load it: {out / 'README.md'}")
