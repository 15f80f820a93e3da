"""`llmbo profile`: measure the block times that `--objectives decode_latency` or `prefill_latency` is summed from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import one_line_errors

if TYPE_CHECKING:
    from llmbo.latency import Check, Target


def profile(
    model: Annotated[str, typer.Option(help="Alias, local folder or hub name.")],
    latency_target: Annotated[str, typer.Option(help="Where the model will run: auto, cpu, cuda, cuda:1.")] = "auto",
    context: Annotated[int, typer.Option(help="Tokens of the prompt, which decoding attends to.")] = 2048,
    serve_batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    neuron_step: Annotated[int, typer.Option(help="Neurons per grid level; 0: about a twelfth of a layer's.")] = 0,
    repeats: Annotated[int, typer.Option(help="Repetitions that count.")] = 7,
    check: Annotated[int, typer.Option(help="Random architectures to measure as a whole; 0 for none.")] = 20,
    dtype: Annotated[str, typer.Option(help="auto (the faster one here), float32, bfloat16 or float16.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is in the cache.")] = False,
) -> None:
    """Time every kind of block at every width on this machine, and check the sums against whole models.

    The table is kept in the cache, where `llmbo optimize` with the same options finds it.

    Example: llmbo profile --model llama --context 256
    """
    from rich.console import Console

    with one_line_errors(interrupted="Interrupted. A table that was finished is in the cache."):
        from llmbo.baselines import RandomProposer
        from llmbo.errors import ConfigError
        from llmbo.latency import build_target, device_name, num_stacks
        from llmbo.latency import check as check_table
        from llmbo.models import choose_device, load_model, silence_libraries
        from llmbo.progress import Display
        from llmbo.space import SearchSpace
        from pruning.anatomy import anatomy_of
        from pruning.latency import Workload

        for flag, value, least in (
            ("--context", context, 1), ("--serve-batch", serve_batch, 1), ("--repeats", repeats, 1), ("--check", check, 0),
        ):  # fmt: skip
            if value < least:
                raise ConfigError(f"{flag} must be at least {least}, got {value}.")
        silence_libraries()
        with Display(Console(stderr=True), 0) as display:
            with display.phase("model"):
                dense = load_model(model, dtype, choose_device(latency_target)).model
            space = SearchSpace(anatomy_of(dense), neuron_step=neuron_step)
            workload = Workload(sequences=serve_batch, context=context, repeats=repeats)
            with display.phase("latency table", num_stacks(space)) as advance:
                target = build_target(dense, space, workload, fresh=fresh, on_stack=advance)
            with display.phase("whole models", check) as advance:
                some = [space.decode(row.x) for row in RandomProposer(space).propose([], check, 0)]
                checked = check_table(target, some, advance)
    console = Console()
    console.print(
        f"{device_name(dense.device)}, {dense.dtype}, {serve_batch} x {context} tokens, {repeats} repetitions"
    )
    console.print(_table(target))
    _print_check(checked, console)


def _table(target: "Target") -> Any:
    """Milliseconds of one block by kind and width."""
    from rich.table import Table

    table = Table("block", "width", *(f"{phase}, ms" for phase in target.table.phases))
    phases = list(target.table.phases.values())
    table.add_row("embeddings, norm, head", "", *(f"{1000 * phase.fixed:.3f}" for phase in phases))
    table.add_row("layer", "", *(f"{1000 * phase.layer:.3f}" for phase in phases))
    for kind, rows in phases[0].blocks.items():
        for index, (units, _) in enumerate(rows[1:], 1):
            table.add_row(kind, str(units), *(f"{1000 * phase.blocks[kind][index][1]:.3f}" for phase in phases))
    table.caption = "; ".join(
        f"{name}: half the quartile distance of a stack's time is at most {phase.spread:.1%}"
        for name, phase in target.table.phases.items()
    )
    return table


def _print_check(checked: "Check", console: Any) -> None:
    for name, pairs in checked.pairs.items():
        if len(pairs) > 1:
            console.print(
                f"{name}: mean error {checked.error(name):.1%}, rank correlation {checked.rank_correlation(name):.3f} "
                f"over {len(pairs)} random architectures"
            )
