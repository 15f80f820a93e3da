"""`llmbo optimize`: search, judge the front on held-out windows, report."""

import shlex
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from llmbo.cli.common import EXIT_NOTHING_COUNTS, numbers, one_line_errors, say, split_list
from llmbo.config import RunConfig
from llmbo.config.formats import counted_types, engines_help
from llmbo.config.objectives import limits_help, objectives_help
from llmbo.errors import ConfigError

if TYPE_CHECKING:
    from llmbo.api import Run
    from llmbo.display.progress import Show


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
    deploy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE", help=f"Search only what this engine can run; may be repeated. {engines_help()}."
        ),
    ] = None,
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
    quantize: Annotated[
        str,
        typer.Option(
            help=f"File type of llama.cpp that file_bytes is counted of: {', '.join(counted_types())}. auto: what the first engine of "
            "--deploy takes, f16 without any."
        ),
    ] = "auto",
    latency_target: Annotated[
        str, typer.Option(help="Where the model will run, for latency, energy and peak_memory: auto, cpu, cuda.")
    ] = "auto",
    items: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="JSONL file of multiple-choice or last-word items that the finished front is judged on, or, with the objective "
            "accuracy, searched for; several are given one by one.",
        ),
    ] = None,
    samples: Annotated[
        bool, typer.Option(help="Let some of the finished front continue three prompts, for the page.")
    ] = True,
    refit_front: Annotated[
        int,
        typer.Option(
            help="Points of the finished front that are refitted in sequence, minutes each; see export --refit."
        ),
    ] = 0,
    racing: Annotated[
        bool, typer.Option(help="Stop candidates whose first windows say that the front dominates them.")
    ] = False,
    compensation: Annotated[bool, typer.Option(help="Repair output projections by least squares.")] = True,
    recipe: Annotated[
        str,
        typer.Option(
            help="Of the allocation path: default, dense-prices, a JSON file of its numbers, or a finished run, whose best is taken."
        ),
    ] = "default",
    recipe_search: Annotated[
        bool, typer.Option(help="Let the search try members of other recipes' paths too.")
    ] = False,
    text: Annotated[
        str,
        typer.Option(
            help="builtin, python, text:PATH, hf:DATASET:CONFIG:SPLIT[:COLUMN], mix:SOURCE=WEIGHT,SOURCE=WEIGHT,… or self (what "
            "the model writes itself, the better choice without a text of your own)."
        ),
    ] = "builtin",
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the text through the tokenizer's chat template, for instruct models.")
    ] = False,
    heldout_text: Annotated[
        str, typer.Option(help="Text of another domain that the finished front is judged on too, or none.")
    ] = "python",
    min_share: Annotated[
        float, typer.Option(help="Smallest share of the decoder blocks' parameters to consider.")
    ] = 0.4,
    neuron_step: Annotated[
        int, typer.Option(help="Neurons per step of the search; 0 takes about a twelfth of a layer.")
    ] = 0,
    neuron_multiple: Annotated[
        int,
        typer.Option(
            help="Multiple that such a twelfth is rounded to, if as large: 256 for K-quants, 128 for GPTQ, AWQ."
        ),
    ] = 256,
    query_heads: Annotated[
        bool | None,
        typer.Option(
            "--query-heads/--no-query-heads",
            help="Let KV groups lack query heads; by default only where a layer has a single group.",
        ),
    ] = None,
    refit_anchors: Annotated[
        int | None,
        typer.Option(
            help="So many pruned models have refits of their own, which models like them take; by default what this machine does in half "
            "a minute, 3 at most."
        ),
    ] = None,
    elastic: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="Adapter of the model that `llmbo elastic` has trained, merged into its weights."
        ),
    ] = "",
    calibration_tokens: Annotated[
        int,
        typer.Option(help="Tokens for ranking and refits; 0: what this machine does in a minute."),
    ] = 0,
    proxy_tokens: Annotated[int, typer.Option(help="Tokens that every candidate is measured on.")] = 3072,
    heldout_tokens: Annotated[int, typer.Option(help="Tokens that only the finished front is measured on.")] = 1536,
    window: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    dtype: Annotated[
        str, typer.Option(help="auto measures float32 against bfloat16 here and takes the faster.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    devices: Annotated[
        str, typer.Option(help="Evaluate on several at once, in a process each: cuda:0,cuda:1 or cpu,cpu.")
    ] = "",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Most to take on the device, e.g. 24GB; by default what is free there.")
    ] = "",
    offload: Annotated[
        str,
        typer.Option(
            help="Where layers wait: none (on the device), gpu (other GPUs), cpu, disk; auto takes the first with enough room but gpu."
        ),
    ] = "auto",
    name: Annotated[str, typer.Option(help="Run folder below runs/; by default the model's name.")] = "",
    storage: Annotated[str | None, typer.Option(help="Database URL; by default SQLite in the run folder.")] = None,
    artifacts: Annotated[
        str,
        typer.Option(
            metavar="DIR|s3://BUCKET/PREFIX",
            help="Put what is prepared there, for workers on machines that share no folder with this one.",
        ),
    ] = "",
    advisor: Annotated[
        str,
        typer.Option(
            help="none, random, heuristic, openai:MODEL[@URL], transformers:PATH, transformers:self, mail:DIR, replay:FILE."
        ),
    ] = "none",
    advisor_hooks: Annotated[
        str, typer.Option(help="Where it is heard: some of warm_start,propose,directions,filter.")
    ] = "warm_start,propose,directions",
    advisor_share: Annotated[float, typer.Option(help="Most of the trials that may stem from it, 0.3 for 30 %.")] = 0.3,
    advisor_warm_start: Annotated[
        int, typer.Option(help="Places that it may fill among the first twelve trials, at most 6.")
    ] = 3,
    advisor_context: Annotated[
        str, typer.Option(help="What it reads: full, no-tables, no-optimiser, shuffled, partial or none.")
    ] = "full",
    advisor_every: Annotated[int, typer.Option(help="Rounds between its first proposals; the gaps grow.")] = 2,
    advisor_max_calls: Annotated[int, typer.Option(help="Cap on prompts for the whole run.")] = 8,
    advisor_max_tokens: Annotated[int, typer.Option(help="Cap on tokens, prompts and replies.")] = 150_000,
    advisor_reply_tokens: Annotated[
        int, typer.Option(help="Tokens of one reply, thinking included; an empty or cut reply is asked for with more.")
    ] = 4000,
    advisor_max_cost: Annotated[float | None, typer.Option(help="Cap in dollars; needs --advisor-price.")] = None,
    advisor_max_seconds: Annotated[float, typer.Option(help="Cap on seconds of waiting for replies.")] = 900.0,
    advisor_deadline: Annotated[
        float, typer.Option(help="Seconds a dead or misbehaving model may cost before the run goes on without advice.")
    ] = 120.0,
    advisor_price: Annotated[
        str | None, typer.Option(help="Dollars per million prompt and reply tokens, e.g. 0.4,1.6.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Load nothing: say what the run would take, and whether it fits this machine."),
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what this run has stored and start over.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say nothing but errors and the report's path.")] = False,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="Events on stderr, one JSON object each.")] = False,
) -> None:
    """Search for smaller models and write runs/NAME/report.json.

    The same command continues a run that was stopped, whatever stopped it; a larger --budget extends a finished one.
    Exit codes: 0; 2 for what is refused or, with --plan, does not fit; 3 when no trial keeps the limits or beats the reference point
    given; 4 when an advisor is asked by mail and has not replied yet; 130 when stopped.

    Example: llmbo optimize --model llama --budget 60
    """
    typed = locals()
    with one_line_errors(
        interrupted="Interrupted. The same command goes on from here.", smaller="--window or --calibration-tokens"
    ):
        if quiet and json_logs:
            raise ConfigError("--quiet and --json-logs exclude each other: choose one.")
        settings = {item.name: typed[item.name] for item in fields(RunConfig)} | {
            "strategy": _tied(strategy) if uniform else strategy,
            "deploy": tuple(deploy or ()),
            "objectives": tuple(split_list(objectives)),
            "reference_point": numbers("--reference-point", reference_point),
            "maximum": tuple(maximum or ()),
            "items": tuple(items or ()),
            "advisor_hooks": tuple(split_list(advisor_hooks)),
            "advisor_price": numbers("--advisor-price", advisor_price),
        }
        RunConfig(**settings)  # refuses what it can before anything heavy is loaded
        import llmbo
        from llmbo.models.silence import silence_libraries

        silence_libraries()
        if plan:
            planned = llmbo.plan(**settings, devices=split_list(devices))
            say(str(planned))
            if planned.refused:
                raise ConfigError(planned.refused)
            return
        command = shlex.join(["llmbo", *sys.argv[1:]])
        show: Show = "nothing" if quiet else "json" if json_logs else "auto"
        run = llmbo.optimize(**settings, devices=split_list(devices), fresh=fresh, show=show, command=command)
        # The default reference point is only where hypervolume begins; one that was typed is what the user asks for.
        nothing = bool(run.report.warnings) and not (run.report.front and settings["reference_point"] is None)
        if quiet and nothing:
            for text in run.report.warnings:
                say(f"warning: {text}", err=True)
        if not (quiet or json_logs):
            _print_front(run)
            if text == RunConfig.text:
                say("Cut by Python's documentation: for another use name a --text, or --text self.")
    say(f"Report: {run.folder / 'report.json'}   Page: {run.page}")
    if nothing:
        raise typer.Exit(EXIT_NOTHING_COUNTS)


def _tied(strategy: str) -> str:
    if strategy not in ("qnehvi", "uniform"):  # the default, or the same thing said twice
        raise ConfigError(f"--uniform is a strategy of its own: leave out --strategy {strategy}, or --uniform.")
    return "uniform"


def _print_front(run: "Run") -> None:
    from llmbo.display.console import Console
    from llmbo.display.results import advice_line, summary

    Console().print(summary(run.report))
    if run.report.advisor:
        say(advice_line(run.report.advisor))
