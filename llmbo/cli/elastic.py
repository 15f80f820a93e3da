"""`llmbo elastic`: one adapter for all sub-networks of a model, trained before the search."""

import shlex
import sys
from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say
from llmbo.cli.training import (
    Batch,
    Dtype,
    EvalEvery,
    Heldout,
    MicroBatch,
    Minutes,
    Out,
    Patience,
    Recompute,
    Steps,
    Tokens,
    Window,
    tell,
)


def elastic(
    model: Annotated[str, typer.Option(help="Alias (see `llmbo models`), local folder or hub name.")],
    out: Out,
    text: Annotated[
        str,
        typer.Option(
            help="builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN], mix:SOURCE=WEIGHT,… or self (sampled from the model). "
            "Half of it is left alone, for searches."
        ),
    ] = "builtin",
    minutes: Minutes = None,
    steps: Steps = None,
    tokens: Tokens = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.")] = 16,
    batch: Batch = 0,
    micro_batch: MicroBatch = 0,
    recompute: Recompute = False,
    window: Window = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate; 0 takes 1e-3.")] = 0.0,
    eval_every: EvalEvery = 0,
    patience: Patience = 4,
    heldout: Heldout = 12,
    min_share: Annotated[
        float, typer.Option(help="Of the smallest member that is trained, as for `llmbo optimize`.")
    ] = 0.4,
    neuron_step: Annotated[int, typer.Option(help="Neurons per step of a member, as for `llmbo optimize`.")] = 0,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens for the members' refits, as there.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, mps.")] = "auto",
) -> None:
    """Train an adapter that makes a model's sub-networks better, all of them at once; `llmbo optimize --elastic` then searches them.

    The same command goes on from the last validation when it was stopped.

    Example: llmbo elastic --model llama --out llama-elastic --minutes 10
    """
    from llmbo.display.console import Console

    with one_line_errors(
        interrupted="Interrupted. The same command goes on from the last validation.",
        smaller="--window or --micro-batch",
    ):
        from llmbo.display.progress import Display
        from llmbo.models.silence import silence_libraries
        from llmbo.training.elastic import Task, train_elastic
        from llmbo.training.plan import Length, Plan

        silence_libraries()
        console, command = Console(stderr=True), shlex.join(["llmbo", *sys.argv[1:]])
        plan = Plan(0, batch, "lora", rank, lr, True, eval_every, patience, seed, micro_batch, recompute)
        task = Task(
            model, out, text, window, heldout, min_share, neuron_step, calibration_tokens, seed, dtype, device
        )  # fmt: skip
        length = Length(steps, tokens, minutes)
        with Display(console, 0) as display:
            outcome = train_elastic(task, plan, length, command, display, lambda progress: tell(progress, console))
    for member in outcome.members:
        say(
            f"share {member.share:.2f}: held-out KL from the dense model {member.before.kl:.4f} → {member.after.kl:.4f}, "
            f"loss {member.before.loss:.4f} → {member.after.loss:.4f}"
        )
    progress = outcome.progress
    if progress.fault:
        say(f"Training stopped early: {progress.fault}. That is what was written; a smaller --lr may get further.")
    if progress.best[0] == 0:
        say("No validation was better than before the training, so the adapter changes nothing.")
    say(
        f"{out}: {progress.best[0]} steps, {outcome.tokens} tokens. Next: llmbo optimize --model {model} --elastic {out}"
    )
