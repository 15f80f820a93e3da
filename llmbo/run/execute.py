"""A run from the first candidate to the written report: search, judge the front on held-out windows, report."""

from collections.abc import Iterator, Sequence
from typing import Any

from llmbo.advisor.summary import summarise
from llmbo.config import TOLD
from llmbo.display.progress import Display
from llmbo.errors import ReplyAwaited
from llmbo.evaluation.items import items_part
from llmbo.problem.kept import hand_on, made_from, own_files
from llmbo.problem.proxy import ProxyEvaluator
from llmbo.problem.shared import share
from llmbo.problem.texts import written_files
from llmbo.report import build_report, environment, front_of, write_report
from llmbo.report.recipes import recipe_parts
from llmbo.run.assemble import RunParts
from llmbo.run.database import shown_url
from llmbo.run.facts import elsewhere_part
from llmbo.run.judgement import judge, judgements, spread
from llmbo.run.records import digest_elsewhere
from llmbo.run.refit_front import refit_front, refitted
from llmbo.search.loop import run_search
from llmbo.types import Measurement, Trial

ELSEWHERE = 12  # models of the front that are judged on another text as well: so many a table shows


def execute(run: RunParts, display: Display, command: str) -> None:
    """Spend the budget, and write the report whatever ends the search.

    Args:
        command: What the report says the run was started with.

    Raises:
        KeyboardInterrupt, ReplyAwaited: After the report of what is there has been written.
    """
    config, status = run.config, "failed"
    display.objectives, display.dense = run.objectives, run.problem.dense
    if config.artifacts:
        files, beside = run.problem.files, written_files(config, own_files(run.folder))
        run.store.set_fact("shared", share(files, made_from(files), beside, config.artifacts, display))
    run.store.set_fact("budget", config.budget)  # so that `llmbo watch` knows how far it is
    run.store.set_fact("versions", environment()["versions"])  # workers are to have the same, and go on with the rest
    run.store.set_fact("free", config.handed_on())
    try:
        with display.phase("search", config.budget):
            run_search(run.proposer, run.evaluator, run.store, config.budget, config.batch, config.seed, display)
        with display.phase("held-out windows"):
            measure_heldout(run)
        if run.elsewhere is not None:
            with display.phase("another domain"):
                measure_elsewhere(run)
        hand_on(run.problem.files, run.folder, run.problem.kept, display.note)
        judge(run, display)
        refit_front(run, display)
        status = "complete"
    except (KeyboardInterrupt, ReplyAwaited):
        status = "interrupted"
        raise
    finally:
        _write(run, display, command, status)


def measure_heldout(run: RunParts) -> None:
    """Measure the finished front, and the dense model, on windows that nothing has seen; skips what is stored."""
    missing = _unmeasured(run)
    if not missing and "dense_heldout" in run.store.facts:
        return
    evaluator, top = run.problem.heldout(), run.problem.space.max_levels
    dense = evaluator.evaluate_dense()
    run.store.set_heldout(None, dense)
    run.store.set_fact("dense_heldout", {**dense, **run.problem.deployed(top)})
    for trial, found in _measured(missing, evaluator):
        run.store.set_heldout(trial.number, Measurement({**found, **run.problem.deployed(trial.x)}, found.windows))


def measure_elsewhere(run: RunParts) -> None:
    """The same of a dozen models of the front on windows of another text. Should that text have changed since, all is measured anew."""
    assert run.elsewhere is not None
    part = elsewhere_part(run.elsewhere)
    missing = _unmeasured(run, part["digest"], ELSEWHERE)
    if not missing and digest_elsewhere(run.store.facts) == part["digest"]:
        return
    evaluator = ProxyEvaluator.on(run.elsewhere.heldout, run.problem.space, run.problem.supernet)
    dense = evaluator.evaluate_dense()
    run.store.set_heldout(None, dense, part["digest"])
    run.store.set_fact("elsewhere", {**part, "dense": dense})
    for trial, found in _measured(missing, evaluator):
        run.store.set_heldout(trial.number, found, part["digest"])


def _measured(trials: Sequence[Trial], evaluator: ProxyEvaluator) -> Iterator[tuple[Trial, Measurement]]:
    """Each trial with what it measures, as many at a time as the evaluator likes."""
    for first in range(0, len(trials), evaluator.at_once):
        batch = trials[first : first + evaluator.at_once]
        yield from zip(batch, evaluator.evaluate([trial.x for trial in batch]), strict=True)


def _unmeasured(run: RunParts, digest: str = "", most: int | None = None) -> list[Trial]:
    """Trials of the front, or `most` of them spread over it, without held-out values."""
    stored, front = run.store.heldout(digest), front_of(run.store.trials(), run.objectives)
    return [trial for trial in (spread(front, most) if most else front) if trial.number not in stored]


def _write(run: RunParts, display: Display, command: str, status: str) -> None:
    run.store.check()  # the report is the owner's to write
    config, facts, trials = run.config, run.store.facts, run.store.trials()
    part = _run_part(run, display.seconds, command, status, facts)
    advised = config.advisor != "none"
    report = build_report(
        trials,
        run.objectives,
        run.problem.space,
        {**facts, "run": part, "item_files": [items_part(file) for file in run.items]},
        run.store.heldout(),
        summarise(config.settings(), run.advice, trials, run.objectives, run.problem.dense) if advised else None,
        run.store.heldout(digest) if (digest := digest_elsewhere(facts)) else {},
        {**judgements(run), "refitted": refitted(run)},
        recipe_parts(run.problem, trials, run.objectives),
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
        "settings": {**{name: getattr(config, name) for name in TOLD}, **config.settings()},
        "seed": config.seed,
        "device": facts["device"],
        "dtype": facts["dtype"],
        "recipe": facts.get("recipe"),
        **here,
        "seconds": {name: round(own, 3) for name, own in (earlier["seconds"] | spent).items()},
        "peak_memory_bytes": max(here["peak_memory_bytes"], earlier["peak_memory_bytes"]),
    }
