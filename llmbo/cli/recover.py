"""`llmbo recover`: short training of a pruned model."""

import shlex
import sys
from typing import Annotated

import typer

from llmbo.cli.common import one_line_errors, say
from llmbo.cli.export import DtypeOption, FormatOption, QuantizeOption, RefitOption, ShardOption
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
from llmbo.config.numbers import MOST, Within


def recover(
    source: Annotated[
        str, typer.Argument(help="Folder written by `llmbo export`; with --trial, a run.", metavar="DIR_OR_RUN")
    ],
    out: Out,
    trial: Annotated[int | None, typer.Option(help="Recover this trial of a run.")] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    tokens: Tokens = None,
    train: Annotated[
        str,
        typer.Option(
            help="What learns: lora (adapters, merged at the end), refit-lora (adapters of the blocks' inputs, and norms; outputs "
            "are refitted), norms (and biases), all (but the embeddings). By default lora."
        ),
    ] = "",
    lora: Annotated[
        bool | None, typer.Option("--lora/--no-lora", help="Short for --train lora, and for --train all.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters, 16 by default.")] = None,
    distil: Annotated[
        bool | None,
        typer.Option(
            "--distil/--no-distil",
            help="Learn the dense model's distributions, or the text's next tokens. By default the former, where that model is known.",
        ),
    ] = None,
    hidden: Annotated[
        float,
        typer.Option(
            help="Weight of the distance of hidden states from the dense model's beside the divergence; 0: none."
        ),
    ] = 0.0,
    teacher: Annotated[
        str, typer.Option(help="Where the dense model is now; by default where the folder or the run had it.")
    ] = "",
    text: Annotated[
        str,
        typer.Option(
            help="builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN], mix:SOURCE=WEIGHT,… or self (sampled from the dense "
            "model); by default the run's, and self where that was builtin and the dense model teaches."
        ),
    ] = "",
    items: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="JSONL file of multiple-choice or last-word items to judge by, before and after; several are given one by one.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="Items per file; 0 takes all.")] = 0,
    items_every: Annotated[
        int,
        typer.Option(
            help="Take the items behind every so many validations, too, which takes its time; 0: behind none."
        ),
    ] = 0,
    format: FormatOption = "",
    dtype: DtypeOption = "",
    quantize: QuantizeOption = "",
    max_shard_size: ShardOption = "5GB",
    refit: RefitOption = "",
    batch: Batch = 0,
    micro_batch: MicroBatch = 0,
    recompute: Recompute = False,
    window: Window = 256,
    lr: Annotated[
        float, typer.Option(help="Peak learning rate; 0 takes what suits: 3e-4 for all weights, 1e-3 for the rest.")
    ] = 0.0,
    eval_every: EvalEvery = 0,
    patience: Patience = 4,
    heldout: Heldout = 12,
    seed: Annotated[int, typer.Option(help="Seed of the windows' order.")] = 0,
    compute_dtype: Dtype = "auto",
    device: Annotated[str, typer.Option(help="auto (of a trial: the run's), cpu, cuda, mps.")] = "auto",
) -> None:
    """Train a pruned model for some minutes and write it as a new folder. It is never worse than what it was.

    --format, --dtype, --quantize, --max-shard-size and --refit are for --trial, and the same as of `llmbo export`.

    The same command goes on from the last validation when it was stopped. `torchrun --nproc-per-node N -m llmbo recover …` divides each
    batch among N processes.

    Example: llmbo recover runs/llama --trial 38 --out exports/llama-60-recovered

    Example: llmbo recover runs/llama --trial 38 --format gguf --quantize q4_k_m --out exports/llama-60-q4

    Example: llmbo recover exports/llama-60 --out exports/llama-60-recovered --steps 200
    """
    from llmbo.display.console import Console

    with one_line_errors(
        interrupted="Interrupted. The same command goes on from the last validation.",
        smaller="--window or --micro-batch",
    ):
        from llmbo.display.progress import Display
        from llmbo.evaluation.items import read_item_files
        from llmbo.models.silence import silence_libraries
        from llmbo.training.plan import Length, Plan, method_of
        from llmbo.training.processes import place, together
        from llmbo.training.recovery import Task
        from llmbo.training.recovery import recover as train_briefly

        silence_libraries()
        Within(0, MOST).check("--limit", limit, whole=True)
        files = read_item_files(items or (), limit or None)
        command = shlex.join(["llmbo", *sys.argv[1:]])
        length, (method, width) = Length(steps, tokens, minutes), method_of(train, lora, rank)
        plan = Plan(0, batch, method, width, lr, False, eval_every, patience, seed, micro_batch, recompute, hidden)
        with together(device) as own:
            others, console = place() > 0, Console(stderr=True, quiet=place() > 0)
            task = Task(
                *(source, out, text, window, heldout, teacher, compute_dtype, own, files, items_every, trial, format),
                *(refit, dtype, quantize, max_shard_size, distil),
            )
            with Display(console, 0) as display:
                outcome = train_briefly(task, plan, length, command, display, lambda progress: tell(progress, console))
    if others:
        return
    before, after, progress = outcome.before, outcome.after, outcome.progress
    kl = f", KL from the dense model {before.kl:.4f} → {after.kl:.4f}" if before.kl is not None else ""
    say(
        f"{out}: held-out loss {before.loss:.4f} → {after.loss:.4f} nats per token (gain {outcome.gain:+.4f}){kl} after "
        f"{progress.best[0]} steps, {outcome.tokens} tokens."
    )
    for score in outcome.scores:
        say("{}: {} → {}".format(*score))
    if progress.fault:
        say(f"Training stopped early: {progress.fault}. That is what was written; a smaller --lr may get further.")
    if progress.best[0] == 0:
        say("No validation was better than the untrained model, so that is what was written.")
