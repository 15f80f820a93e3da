"""`llmbo evaluate`: loss, perplexity, files of items and benchmark tasks of one or several models, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import one_line_errors, say, split_list
from llmbo.errors import ConfigError

if TYPE_CHECKING:
    from llmbo.evaluation.table import Result


def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="Aliases, hub names or folders, exported ones too.", metavar="MODEL...")
    ],
    text: Annotated[
        str | None,
        typer.Option(
            help="builtin, python, text:PATH or hf:DATASET:CONFIG:SPLIT[:COLUMN]; builtin unless --tasks or --items are given."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, from its start; 0 takes all.")] = 16384,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    stride: Annotated[
        int, typer.Option(help="Tokens predicted per window; 0: as many as the window holds. Less gives more context.")
    ] = 0,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, or paths of its YAML task files, by commas.")] = "",
    items: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="JSONL file of multiple-choice or last-word items; several are given one by one."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Examples per task, and items per file; 0 takes all.")] = 0,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Solved examples before each question; by default each task's own number.")
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Put questions and solved examples as turns of a chat with the model."
        ),
    ] = False,
    json: Annotated[Path | None, typer.Option(help="File to append the results to, one JSON line per model.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (the faster one here), float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run code that a model brings along. Exported folders never need it."),
    ] = False,
) -> None:
    """Print loss and perplexity with their full recipe, and scores of items and benchmark tasks, of several models in one table.

    Example: llmbo evaluate llama exports/llama-54 --text text:notes.txt --tasks arc_easy --limit 100

    Example: llmbo evaluate llama exports/llama-54 --items questions.jsonl --items passages.jsonl
    """
    from llmbo.display.console import Console

    with one_line_errors(
        interrupted="Interrupted. Models that were finished are in the --json file.", smaller="--window"
    ):
        from llmbo.display.progress import Display
        from llmbo.evaluation.table import Settings, compare, table
        from llmbo.models.silence import silence_libraries

        silence_libraries()
        asked = split_list(tasks)
        if tasks and not asked:
            raise ConfigError(f"--tasks '{tasks}' names no task: see lm-eval's list.")
        settings = Settings(
            text=text or ("" if asked or items else "builtin"),
            tokens=tokens,
            window=window,
            stride=stride or window - 1,
            tasks=tuple(asked),
            limit=limit or None,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            items=tuple(items or ()),
        )
        with Display(Console(stderr=True), 0) as display:
            results = list(compare(models, settings, display, json))
    _print(results, table, Console())


def _print(results: "list[Result]", table: Any, console: Any) -> None:
    console.print(table(results))
    for recipe in dict.fromkeys(str(result.quality.recipe) for result in results if result.quality):
        say(f"Recipe: {recipe}")
    for file, _ in results[0].items:
        say(f"Items: {file}; ± is a standard error")
    for note in dict.fromkeys(note for result in results for note in result.notes):
        say(f"Note: {note}")
