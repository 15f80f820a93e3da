"""What the commands that train have in common: their options, and what they say meanwhile."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llmbo.training.plan import Progress

Out = Annotated[Path, typer.Option(help="Folder to make; it must be empty or not exist.")]
Minutes = Annotated[
    float | None, typer.Option(help="Time to train, from which steps follow; 20 if nothing else says how long.")
]
Steps = Annotated[int | None, typer.Option(help="Optimizer steps, instead of --minutes.")]
Tokens = Annotated[int | None, typer.Option(help="Tokens to train on, instead of --minutes.")]
Batch = Annotated[int, typer.Option(help="Windows per step; 0: 4 on a CPU, 16 elsewhere.")]
MicroBatch = Annotated[
    int, typer.Option(help="Windows that pass the model at once, for less memory; 0: all of a batch.")
]
Recompute = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
]
Window = Annotated[int, typer.Option(help="Tokens per window.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between validations, each a checkpoint; 0: ten in all.")]
Patience = Annotated[int, typer.Option(help="Validations without a gain after which training stops.")]
Heldout = Annotated[
    int, typer.Option(help="Windows for validation, and as many for the final comparison; not trained on.")
]
Dtype = Annotated[str, typer.Option(help="Of the products: auto (the faster one here), float32, bfloat16.")]


def tell(progress: "Progress", console: Any) -> None:
    step, value = progress.history[-1]
    best = " (best)" if progress.best[0] == step else ""
    scores = "".join(
        f", {name} {acc:.3f}" for at, found in progress.scores if at == step for name, acc in found.items()
    )
    console.print(f"step {step}: validation {value:.4f}{best}{scores}", style="dim", highlight=False)
