"""`llmbo export`: a trial of a run as a folder that loads where people deploy."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmbo.cli.common import imports, one_line_errors, say
from llmbo.config.formats import FORMATS, caveat


def _format_help() -> str:
    rows = "; ".join(f"{row.name}: {row.description}" for row in FORMATS.values())
    return f"{rows}. By default, with the file type, what the run counted file_bytes of, else what its first engine takes, else hf."


def _dtype_help() -> str:
    """Formats with the same choices together."""
    names: dict[tuple[str, ...], list[str]] = {}
    for row in FORMATS.values():
        names.setdefault(row.choices, []).append(row.name)
    choices = "; ".join(f"{', '.join(formats)}: {', '.join(dtypes)}" for dtypes, formats in names.items())
    return f"The first is the default. {choices}. auto: as the run measured."


def _quantize_help() -> str:
    choices = "; ".join(f"{row.name}: {', '.join(row.quantised)}" for row in FORMATS.values() if row.quantised)
    return (
        f"In place of --dtype, a file type of llama.cpp. {choices}; or recipe:FILE, JSON of tensors' patterns and types; or searched:SIZE, "
        "e.g. searched:90MB, the best types for a file of at most that size, and refits to them, in minutes."
    )


# What `recover --trial` writes is said in the same words.
FormatOption = Annotated[str, typer.Option(help=_format_help(), show_default=False)]
DtypeOption = Annotated[str, typer.Option(help=_dtype_help())]
QuantizeOption = Annotated[str, typer.Option(help=_quantize_help())]
ShardOption = Annotated[str, typer.Option(help="Largest safetensors file, e.g. 500MB.")]
RefitOption = Annotated[
    str,
    typer.Option(
        help="sequential: refitted for this trial alone, in minutes if the run has not; table: as the search measured it. By default "
        "sequential where the run has it."
    ),
]


def export(
    run: Annotated[str, typer.Argument(help="Run folder, or its name below runs/.", metavar="RUN")],
    out: Annotated[Path, typer.Option(help="Folder to make; it must be empty or not exist.")],
    format: FormatOption = "",
    trial: Annotated[int | None, typer.Option(help="Number of a finished trial, usually one of the front.")] = None,
    fit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME<=VALUE",
            help="Instead of --trial: the best model of the front within this budget on any objective that the report holds, e.g. "
            '"params<=1e8", or on the file that is written: "file_bytes<=4e9"; may be repeated.',
        ),
    ] = None,
    dtype: DtypeOption = "",
    quantize: QuantizeOption = "",
    max_shard_size: ShardOption = "5GB",
    refit: RefitOption = "",
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to rebuild on; by default the run's.")] = None,
) -> None:
    """Write a trial as a folder or file that loads where people deploy.

    What was written is loaded again in a fresh process and its logits compared before the folder appears.

    Example: llmbo export runs/llama --trial 38 --format gguf --out exports/llama-54
    Example: llmbo export runs/llama --fit "file_bytes<=9e7" --format gguf --quantize q4_k_m --out exports/llama-90mb
    """
    from llmbo.deploy.reader import started
    from llmbo.display.console import Console

    with one_line_errors(interrupted="Interrupted. Nothing was left in the output folder."), started(format) as read:
        with imports():
            from llmbo.deploy.export import export as write
            from llmbo.deploy.request import ExportRequest
            from llmbo.display.progress import Display
            from llmbo.models.silence import silence_libraries

        silence_libraries()
        request = ExportRequest.of(run, trial, format, out, dtype, max_shard_size, refit, quantize, fit or (), model)
        with Display(Console(stderr=True), 0) as display:
            check = write(request, shlex.join(["llmbo", *sys.argv[1:]]), display, model, device, read)
    chosen = f"trial {request.trial.number}, " if fit else ""
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    values, dense = request.trial.objectives, request.report.model.params
    assert values is not None
    say(
        f"{out}: {chosen}{values.params / 1e6:.1f}M of {dense / 1e6:.1f}M parameters, {request.target.label}, {size / 1e6:.1f} MB. "
        f"Refits: {request.refit}. Checked by {check.by}: difference {check.difference:.1e} of the logits' spread."
    )
    for note in check.notes:
        say(note)
    if warning := caveat(request.format):
        say(warning)
    say(f"How to load it: {out / 'README.md'}")
