"""`llmbo rerank`: whether a run's front is still one after a short training."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import one_line_errors, say
from llmbo.cli.training import tell
from llmbo.config.numbers import MOST, Within

if TYPE_CHECKING:
    from llmbo.training.rerank import Orders, Reranking


def rerank(
    run: Annotated[str, typer.Argument(help="Run folder, or its name below runs/.", metavar="RUN")],
    top: Annotated[int, typer.Option(help="Points of the front, evenly over its sizes.")] = 5,
    steps: Annotated[int, typer.Option(help="Optimizer steps for each.")] = 15,
    text: Annotated[
        str,
        typer.Option(
            help="builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN] or mix:SOURCE=WEIGHT,…; by default the run's."
        ),
    ] = "",
    lora: Annotated[bool, typer.Option("--lora", help="Train low-rank adapters instead of all weights.")] = False,
    rank: Annotated[int | None, typer.Option(help="Rank of the adapters of --lora, 16 by default.")] = None,
    distil: Annotated[bool, typer.Option("--distil", help="Learn the dense model's distributions.")] = False,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    lr: Annotated[float, typer.Option(help="Peak learning rate; 0 takes 3e-4, with --lora 1e-3.")] = 0.0,
    heldout: Annotated[
        int, typer.Option(help="Windows for validation, and as many for the comparison; not trained on.")
    ] = 12,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving", help="Train all for a quarter of the steps; the better half at equal size goes on, twice."
        ),
    ] = False,
    model: Annotated[str | None, typer.Option(help="Where the base model is now, if it has moved.")] = None,
    device: Annotated[str | None, typer.Option(help="Device to train on; by default the run's.")] = None,
) -> None:
    """Train some points of the front alike and briefly, and compare their orders before and after.

    Results are in RUN/rerank.json; the same command goes on where it was stopped, a larger --top adds points.

    Example: llmbo rerank runs/llama --top 5 --steps 15
    """
    from llmbo.display.console import Console

    with one_line_errors(
        interrupted="Interrupted. The same command goes on from the last validation.", smaller="--batch"
    ):
        from llmbo.display.progress import Display
        from llmbo.models.silence import silence_libraries
        from llmbo.training import rerank as training
        from llmbo.training.plan import Plan, method_of

        silence_libraries()
        console = Console(stderr=True)
        Within(1, MOST).check("--steps", steps, whole=True)
        Within(1, MOST).check("--batch", batch, whole=True)
        plan = Plan(steps, batch, *method_of("", lora, rank), lr, distil, every=steps)
        with Display(console, 0) as display:
            found = training.rerank(
                run, top, plan, text, heldout, display, model, device, lambda progress: tell(progress, console), halving
            )
    Console().print(_table(found))
    tau = {name: _tau(orders) for name, orders in found.orders.items()}
    say(f"Kendall's tau of the orders: by loss {tau['loss']}, at equal size {tau['equal_size']}, by KL {tau['kl']}.")
    for point in found.failed:
        say(
            f"Trial {point.trial} is not compared: {point.fault}. A smaller --lr may get further, without the {training.FILE} of now."
        )
    if found.left:
        say(f"Left behind by halving: {', '.join(str(point.trial) for point in found.left)}.")
    if not found.points:
        return
    gone = set(found.front(found.before)) - set(found.front(found.after))
    say(
        f"No longer on the front after training: {', '.join(map(str, sorted(gone)))}."
        if gone
        else "All that were on the front on held-out text before are so after training."
    )


def _table(found: "Reranking") -> Any:
    from rich.table import Table

    made = Table("trial", "params")
    for title in ("loss", "after", "KL", "after", "vs neighbours", "after", "front", "after"):
        made.add_column(title, justify="right")
    columns = [(found.excess(values), found.front(values)) for values in (found.before, found.after)]
    for point in found.points:
        excess = [f"{own[point.trial]:+.3f}" if point.trial in own else "" for own, _ in columns]
        front = ["yes" if point.trial in front else "no" for _, front in columns]
        both = [f"{values[name]:.3f}" for name in ("loss", "kl") for values in (point.before, point.after)]
        made.add_row(str(point.trial), f"{point.params / 1e6:.1f}M", *both, *excess, *front)
    return made


def _tau(orders: "Orders") -> str:
    return "unknown (too few points)" if orders.tau is None else f"{orders.tau:.2f}"
