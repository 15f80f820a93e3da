"""`llmbo profile`: measure the tables that `--objectives decode_latency`, `peak_memory` and their like are worked out from."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import one_line_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmbo.problem.hardware import Check, Profile


def profile(
    model: Annotated[str, typer.Option(help="Alias, local folder or hub name.")],
    latency_target: Annotated[str, typer.Option(help="Where the model will run: auto, cpu, cuda, cuda:1.")] = "auto",
    measure: Annotated[str, typer.Option(help="Some of latency, memory and energy.")] = "latency,memory",
    context: Annotated[int, typer.Option(help="Tokens of the prompt, which decoding attends to.")] = 2048,
    serve_batch: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    neuron_step: Annotated[int, typer.Option(help="Neurons per grid level; 0: about a twelfth of a layer's.")] = 0,
    repeats: Annotated[int, typer.Option(help="Repetitions that count.")] = 12,
    check: Annotated[int, typer.Option(help="Random architectures to measure as a whole; 0 for none.")] = 20,
    dtype: Annotated[str, typer.Option(help="auto (the faster one here), float32, bfloat16 or float16.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is in the cache.")] = False,
) -> None:
    """Measure every kind of block at every width on this machine, and check predictions against whole models.

    The tables are kept in the cache, where `llmbo optimize` with the same options finds them.

    Example: llmbo profile --model llama --context 256
    """
    from llmbo.display.console import Console

    with one_line_errors(
        interrupted="Interrupted. Tables that were finished are in the cache.", smaller="--context or --serve-batch"
    ):
        from llmbo.config.numbers import MOST, MOST_CONTEXT, MOST_SERVED, Within
        from llmbo.display.progress import Display
        from llmbo.errors import ConfigError, unknown
        from llmbo.models.loading import load_model
        from llmbo.models.placement import check_dtype, choose_device
        from llmbo.models.silence import silence_libraries
        from llmbo.problem.hardware import KIND_OF, build_target, device_name, num_measurements
        from llmbo.problem.hardware import check as check_tables
        from llmbo.problem.space import SearchSpace
        from llmbo.search.baselines import RandomProposer
        from pruning.anatomy import anatomy_of
        from pruning.latency import Workload

        for flag, value, least, most in (
            ("--context", context, 1, MOST_CONTEXT), ("--serve-batch", serve_batch, 1, MOST_SERVED),
            ("--neuron-step", neuron_step, 0, MOST), ("--repeats", repeats, 1, MOST), ("--check", check, 0, MOST),
        ):  # fmt: skip
            Within(least, most).check(flag, value, whole=True)
        check_dtype(dtype)
        words, known = measure.split(","), sorted({*KIND_OF.values()})
        for word in words:
            if word not in known:
                raise ConfigError(unknown("name in --measure", word, known))
        kinds = [kind for kind in known if kind in words]
        silence_libraries()
        with Display(Console(stderr=True), 0) as display:
            with display.phase("model"):
                dense = load_model(model, dtype, choose_device(latency_target, "--latency-target")).model
            space = SearchSpace(anatomy_of(dense), neuron_step=neuron_step)
            workload = Workload(sequences=serve_batch, context=context, repeats=repeats)
            with display.phase("tables", num_measurements(space, kinds)) as advance:
                target = build_target(dense, space, workload, kinds, fresh=fresh, on_measured=advance)
            with display.phase("whole models", check) as advance:
                some = [space.decode(row.x) for row in RandomProposer(space).propose([], check, 0)]
                checked = check_tables(target, some, advance)
    console = Console()
    console.print(
        f"{device_name(dense.device)}, {dense.dtype}, {serve_batch} x {context} tokens, {repeats} repetitions"
    )
    for name, profile in target.profiles.items():
        console.print(_table(name, profile))
    _print_check(checked, console)


def _table(kind: str, profile: "Profile") -> Any:
    """What one block takes by kind and width, in each phase."""
    from rich.table import Table

    from llmbo.problem.hardware import MemoryProfile

    unit, scale = {"latency": ("ms", 1e3), "energy": ("mJ", 1e3), "memory": ("MB", 1e-6)}[kind]
    phases = list(profile.table.phases.values())
    table = Table("block", "width", *(f"{phase}, {unit}" for phase in profile.table.phases), title=kind)

    def row(name: str, width: str, values: "Sequence[float]") -> None:
        table.add_row(name, width, *(f"{scale * value:.3f}" for value in values))

    if isinstance(profile, MemoryProfile):
        blocks = phases
        table.caption = "while it runs, beyond weights and KV cache"
    else:
        blocks = [phase.blocks for phase in phases]
        row("embeddings, norm, head", "", [phase.fixed for phase in phases])
        row("layer", "", [phase.layer for phase in phases])
        table.caption = "; ".join(
            f"{name}: half the quartile distance of a stack's ratio is at most {phase.spread:.1%}"
            for name, phase in profile.table.phases.items()
        )
    for block, rows in blocks[0].items():
        for index, (units, _) in enumerate(rows):
            if units:
                row(block, str(units), [found[block][index][1] for found in blocks])
    return table


def _print_check(checked: "Check", console: Any) -> None:
    for name, pairs in checked.pairs.items():
        if len(pairs) > 1:
            console.print(
                f"{name}: mean error {checked.error(name):.1%}, rank correlation {checked.rank_correlation(name):.3f} "
                f"over {len(pairs)} random architectures"
            )
