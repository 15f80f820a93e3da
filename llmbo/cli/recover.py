"""`llmbo recover`: short training of a pruned model."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import one_line_errors, say

if TYPE_CHECKING:
    from llmbo.training.trainer import Progress


def recover(
    source: Annotated[
        str, typer.Argument(help="Folder written by `llmbo export`; with --trial, a run.", metavar="DIR_OR_RUN")
    ],
    out: Annotated[Path, typer.Option(help="Folder to make; it must be empty or not exist.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")],
    trial: Annotated[int | None, typer.Option(help="Recover this trial of a run.")] = None,
    text: Annotated[
        str, typer.Option(help="builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN] or mix:SOURCE=WEIGHT,….")
    ] = "builtin",
    lora: Annotated[
        bool, typer.Option("--lora", help="Train low-rank adapters and merge them, instead of all weights.")
    ] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters of --lora, 16 by default.")] = None,
    distil: Annotated[bool, typer.Option("--distil", help="Learn the dense model's distributions.")] = False,
    teacher: Annotated[str, typer.Option(help="Dense model for --distil; by default the one the folder names.")] = "",
    temperature: Annotated[float, typer.Option(help="Softens both distributions in --distil.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate; 0 takes 3e-4, with --lora 1e-3.")] = 0.0,
    eval_every: Annotated[int, typer.Option(help="Steps between validations, each a checkpoint.")] = 25,
    patience: Annotated[int, typer.Option(help="Validations without a gain after which training stops.")] = 4,
    heldout: Annotated[
        int, typer.Option(help="Windows for validation, and as many for the final comparison; not trained on.")
    ] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the windows' order.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="Of the products: auto (the faster one here), float32, bfloat16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Train a pruned model for a few steps and write it as a new folder. It is never worse than what it was.

    The same command goes on from the last validation when it was stopped.

    Example: llmbo recover exports/llama-60 --out exports/llama-60-recovered --steps 200 --distil
    """
    from llmbo.display.console import Console

    with one_line_errors(
        interrupted="Interrupted. The same command goes on from the last validation.", smaller="--window or --batch"
    ):
        from llmbo.display.progress import Display
        from llmbo.models.silence import silence_libraries
        from llmbo.training.recovery import Task
        from llmbo.training.recovery import recover as train_briefly
        from llmbo.training.trainer import Plan, adapter_rank

        silence_libraries()
        console, command = Console(stderr=True), shlex.join(["llmbo", *sys.argv[1:]])
        plan = Plan(steps, batch, lr, adapter_rank(lora, rank), distil, temperature, eval_every, patience, seed)
        task = Task(source, out, text, window, heldout, teacher, dtype, device, trial)
        with Display(console, 0) as display:
            outcome = train_briefly(task, plan, command, display, lambda progress: tell(progress, console))
    say(
        f"{out}: held-out loss {outcome.before:.4f} → {outcome.after:.4f} nats per token (gain {outcome.gain:+.4f}) after "
        f"{outcome.progress.best[0]} steps, {outcome.tokens} tokens."
    )
    if outcome.progress.best[0] == 0:
        say("No validation was better than the untrained model, so that is what was written.")


def tell(progress: "Progress", console: Any) -> None:
    step, loss = progress.history[-1]
    best = " (best)" if progress.best[0] == step else ""
    console.print(f"step {step}: validation loss {loss:.4f}{best}", style="dim", highlight=False)
