"""A run from the first candidate to the written report: search, judge the front on held-out windows, report."""

from typing import Any

from llmbo.advisor.summary import summarise
from llmbo.display.progress import Display
from llmbo.problem.kept import hand_on
from llmbo.report import build_report, environment, front_of, write_report
from llmbo.run.assemble import RunParts
from llmbo.run.database import shown_url
from llmbo.search.loop import run_search


def execute(run: RunParts, display: Display, command: str) -> None:
    """Spend the budget, and write the report whatever ends the search.

    Args:
        command: What the report says the run was started with.

    Raises:
        KeyboardInterrupt: After the report of what is there has been written.
    """
    config, status = run.config, "failed"
    display.objectives, display.dense = run.objectives, run.problem.dense
    run.store.set_fact("budget", config.budget)  # so that `llmbo watch` knows how far it is
    try:
        with display.phase("search", config.budget):
            run_search(run.proposer, run.evaluator, run.store, config.budget, config.batch, config.seed, display)
        with display.phase("held-out windows"):
            measure_heldout(run)
        hand_on(run.problem.files, run.folder, run.problem.space.anatomy, display.note)
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        _write(run, display, command, status)


def measure_heldout(run: RunParts) -> None:
    """Measure the finished front, and the dense model, on windows that nothing has seen; skips what is stored."""
    stored = run.store.heldout()
    missing = [trial for trial in front_of(run.store.trials(), run.objectives) if trial.number not in stored]
    if not missing and "dense_heldout" in run.store.facts:
        return
    evaluator = run.problem.heldout()

    def measure(x: tuple[int, ...]) -> dict[str, float]:
        return {**evaluator.evaluate([x])[0], **run.problem.deployed(x)}

    run.store.set_fact("dense_heldout", measure(run.problem.space.max_levels))
    for trial in missing:
        run.store.set_heldout(trial.number, measure(trial.x))


def _write(run: RunParts, display: Display, command: str, status: str) -> None:
    run.store.check()  # the report is the owner's to write
    config, facts, trials = run.config, run.store.facts, run.store.trials()
    part = _run_part(run, display.seconds, command, status, facts)
    advised = config.advisor != "none"
    report = build_report(
        trials,
        run.objectives,
        run.problem.space,
        {**facts, "run": part},
        run.store.heldout(),
        summarise(config.settings(), run.advice, trials, run.objectives, run.problem.dense) if advised else None,
    )
    write_report(report, run.folder)
    for text in report.warnings:
        display.warn(text)
    run.store.set_fact("run", part)  # last: it says that the report is there


def _run_part(
    run: RunParts, seconds: dict[str, float], command: str, status: str, facts: dict[str, Any]
) -> dict[str, Any]:
    """How the run was made, as `RunPart` wants it; seconds and memory add to those of the processes before this one."""
    config = run.config
    earlier, here = facts.get("run", {"seconds": {}, "peak_memory_bytes": 0}), environment()
    spent = {name: earlier["seconds"].get(name, 0.0) + own for name, own in seconds.items()}
    if config.storage:
        command = command.replace(config.storage, shown_url(config.storage))
    return {
        "name": config.name,
        "command": command,
        "status": status,
        "settings": {"budget": config.budget, **config.settings()},
        "seed": config.seed,
        "device": facts["device"],
        "dtype": facts["dtype"],
        "recipe": facts.get("recipe"),
        **here,
        "seconds": {name: round(own, 3) for name, own in (earlier["seconds"] | spent).items()},
        "peak_memory_bytes": max(here["peak_memory_bytes"], earlier["peak_memory_bytes"]),
    }
