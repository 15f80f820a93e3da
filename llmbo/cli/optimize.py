"""`llmbo optimize`: search, judge the front on held-out windows, report."""

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbo.cli.common import numbers, one_line_errors, split_list
from llmbo.config.objectives import limits_help, objectives_help
from llmbo.errors import ConfigError

if TYPE_CHECKING:
    from llmbo.display.progress import Display
    from llmbo.run.assemble import Run


def optimize(
    model: Annotated[str, typer.Option(help="Alias (see `llmbo models`), local folder or hub name.")],
    budget: Annotated[int, typer.Option(help="Candidates to evaluate.")] = 60,
    batch: Annotated[int, typer.Option(help="Candidates proposed at a time.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    strategy: Annotated[
        str, typer.Option(help="qnehvi, or a baseline such as threshold, random, nsga2-seeded.")
    ] = "qnehvi",
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform",
            "--tie",
            help="Only models whose layers are all equal, which any tool can load: --strategy uniform.",
        ),
    ] = False,
    objectives: Annotated[str, typer.Option(help=objectives_help())] = "kl,params_share",
    reference_point: Annotated[
        str | None, typer.Option(help="Worst values that count, one per objective, e.g. 1.2,1.0.")
    ] = None,
    maximum: Annotated[
        list[str] | None,
        typer.Option("--max", metavar="NAME=VALUE", help=limits_help()),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of context that costs are counted or measured for.")] = 2048,
    serve_batch: Annotated[int, typer.Option(help="Sequences at a time that costs are counted or measured for.")] = 1,
    latency_target: Annotated[
        str, typer.Option(help="Where the model will run, for latency, energy and peak_memory: auto, cpu, cuda.")
    ] = "auto",
    items: Annotated[
        str, typer.Option(help="JSONL file with question, choices and answer (an index) in each line, for accuracy.")
    ] = "",
    racing: Annotated[
        bool, typer.Option(help="Stop candidates whose first windows say that the front dominates them.")
    ] = False,
    compensation: Annotated[bool, typer.Option(help="Repair output projections by least squares.")] = True,
    text: Annotated[str, typer.Option(help="builtin, text:PATH, hf:DATASET:CONFIG:SPLIT or self.")] = "builtin",
    min_share: Annotated[
        float, typer.Option(help="Smallest share of the decoder blocks' parameters to consider.")
    ] = 0.4,
    neuron_step: Annotated[
        int, typer.Option(help="Neurons per step of the search; 0 takes about a twelfth of a layer.")
    ] = 0,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens for importance and compensation.")] = 16384,
    proxy_tokens: Annotated[int, typer.Option(help="Tokens that every candidate is measured on.")] = 3072,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens that only the finished front is measured on.")] = 1536,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="auto measures float32 against bfloat16 here and takes the faster.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    name: Annotated[str, typer.Option(help="Run folder below runs/; by default the model's name.")] = "",
    storage: Annotated[str | None, typer.Option(help="Database URL; by default SQLite in the run folder.")] = None,
    advisor: Annotated[
        str,
        typer.Option(
            help="none, random, heuristic, openai:MODEL[@URL], transformers:PATH, transformers:self, replay:FILE."
        ),
    ] = "none",
    advisor_hooks: Annotated[
        str, typer.Option(help="Where it is heard: some of warm_start,propose,directions,filter.")
    ] = "warm_start,propose,directions,filter",
    advisor_share: Annotated[float, typer.Option(help="Its share of the initial design, at most 0.5.")] = 0.25,
    advisor_context: Annotated[str, typer.Option(help="What it reads: full, partial or none.")] = "full",
    advisor_every: Annotated[int, typer.Option(help="Rounds between its first proposals; the gaps grow.")] = 2,
    advisor_max_calls: Annotated[int, typer.Option(help="Cap on prompts for the whole run.")] = 8,
    advisor_max_tokens: Annotated[int, typer.Option(help="Cap on tokens, prompts and replies.")] = 25_000,
    advisor_max_cost: Annotated[float | None, typer.Option(help="Cap in dollars; needs --advisor-price.")] = None,
    advisor_max_seconds: Annotated[float, typer.Option(help="Cap on seconds of waiting for replies.")] = 900.0,
    advisor_deadline: Annotated[
        float, typer.Option(help="Seconds a dead or misbehaving model may cost before the run goes on without advice.")
    ] = 120.0,
    advisor_price: Annotated[
        str | None, typer.Option(help="Dollars per million prompt and reply tokens, e.g. 0.4,1.6.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what this run has stored and start over.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and the report's path.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Events on stderr, one JSON object each.")] = False,
) -> None:
    """Search for smaller models and write runs/NAME/report.json.

    The same command continues a run that was stopped, whatever stopped it; a larger --budget extends a finished one.

    Example: llmbo optimize --model llama --budget 60
    """
    from llmbo.config import RunConfig

    with one_line_errors(interrupted="Interrupted. The same command goes on from here."):
        config = RunConfig(
            model=model,
            budget=budget,
            batch=batch,
            seed=seed,
            strategy=_tied(strategy) if uniform else strategy,
            objectives=tuple(split_list(objectives)),
            reference_point=numbers("--reference-point", reference_point),
            maximum=tuple(maximum or ()),
            context=context,
            serve_batch=serve_batch,
            latency_target=latency_target,
            items=items,
            racing=racing,
            compensation=compensation,
            text=text,
            min_share=min_share,
            neuron_step=neuron_step,
            calibration_tokens=calibration_tokens,
            proxy_tokens=proxy_tokens,
            heldout_tokens=heldout_tokens,
            window=window,
            dtype=dtype,
            device=device,
            name=name,
            storage=storage,
            advisor=advisor,
            advisor_hooks=tuple(split_list(advisor_hooks)),
            advisor_share=advisor_share,
            advisor_context=advisor_context,
            advisor_every=advisor_every,
            advisor_max_calls=advisor_max_calls,
            advisor_max_tokens=advisor_max_tokens,
            advisor_max_cost=advisor_max_cost,
            advisor_max_seconds=advisor_max_seconds,
            advisor_deadline=advisor_deadline,
            advisor_price=numbers("--advisor-price", advisor_price),
        )
        if quiet and json_logs:
            raise ConfigError("--quiet and --json-logs exclude each other: choose one.")
        _optimize(config, fresh, "nothing" if quiet else "json" if json_logs else "auto")


def _tied(strategy: str) -> str:
    from llmbo.errors import ConfigError

    if strategy not in ("qnehvi", "uniform"):  # the default, or the same thing said twice
        raise ConfigError(f"--uniform is a strategy of its own: leave out --strategy {strategy}, or --uniform.")
    return "uniform"


def _optimize(config: Any, fresh: bool, show: str) -> None:
    from rich.console import Console

    from llmbo.display.progress import advice_line, build_display, summary
    from llmbo.models.loading import silence_libraries
    from llmbo.run.assemble import assemble
    from llmbo.search.loop import run_search

    silence_libraries()

    with build_display(show, config.budget, config.name) as display, assemble(config, fresh, display) as run:
        display.objectives, display.dense = run.objectives, run.problem.dense
        run.store.set_fact("budget", config.budget)  # so that `llmbo watch` knows how far it is
        status = "failed"
        try:
            with display.phase("search", config.budget):
                run_search(run.proposer, run.evaluator, run.store, config.budget, config.batch, config.seed, display)
            with display.phase("held-out windows"):
                _measure_heldout(run)
            status = "complete"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            report = _write(run, display, status)
    if show == "auto":
        Console().print(summary(report))
        if report.advisor:
            typer.echo(advice_line(report.advisor))
    typer.echo(f"Report: {run.folder / 'report.json'}   Page: {run.folder / 'report.html'}")


def _measure_heldout(run: "Run") -> None:
    """Measure the finished front, and the dense model, on windows that nothing has seen; skips what is stored."""
    from llmbo.report import front_of

    stored = run.store.heldout()
    missing = [trial for trial in front_of(run.store.trials(), run.objectives) if trial.number not in stored]
    if not missing and "dense_heldout" in run.store.facts:
        return
    evaluator = run.problem.heldout()

    def measure(x: tuple[int, ...]) -> dict[str, float]:
        return {**evaluator.evaluate(x), **run.problem.deployed(x)}

    run.store.set_fact("dense_heldout", measure(run.problem.space.max_levels))
    for trial in missing:
        run.store.set_heldout(trial.number, measure(trial.x))


def _write(run: "Run", display: "Display", status: str) -> Any:
    from llmbo.advisor.summary import summarise
    from llmbo.report import build_report, environment, write_report
    from llmbo.run.store import shown_url

    facts, storage = run.store.facts, run.config.storage
    earlier = facts.get("run", {"seconds": {}, "peak_memory_bytes": 0})
    here = environment()
    seconds = {name: earlier["seconds"].get(name, 0.0) + spent for name, spent in display.seconds.items()}
    run_part = {
        "name": run.config.name,
        "command": shlex.join(
            ["llmbo", *(word.replace(storage, shown_url(storage)) if storage else word for word in sys.argv[1:])]
        ),
        "status": status,
        "settings": {"budget": run.config.budget, **run.config.settings()},
        "seed": run.config.seed,
        "device": facts["device"],
        "dtype": facts["dtype"],
        **here,
        "seconds": {name: round(spent, 3) for name, spent in (earlier["seconds"] | seconds).items()},
        "peak_memory_bytes": max(here["peak_memory_bytes"], earlier["peak_memory_bytes"]),
    }
    trials, settings = run.store.trials(), run.config.settings()
    advised = run.config.advisor != "none"
    report = build_report(
        trials,
        run.objectives,
        run.problem.space,
        {**facts, "run": run_part},
        run.store.heldout(),
        summarise(settings, run.ledger, trials, run.objectives, run.problem.dense) if advised else None,
    )
    write_report(report, run.folder)
    run.store.set_fact("run", run_part)  # last: it says that the report is there
    return report
