"""One comparison from start to end: open each problem, run its arms, judge, write what is there."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from llmbo.comparison.arms import arm_part, measured_curves, union_front
from llmbo.comparison.config import Arm, CompareConfig, ProblemConfig
from llmbo.comparison.display import CompareDisplay
from llmbo.comparison.page import page
from llmbo.comparison.problems import OpenProblem, opened
from llmbo.comparison.recorded import open_recorded
from llmbo.comparison.result import build_comparison
from llmbo.comparison.runner import Outcome, check_designs, run_arm
from llmbo.comparison.schema import ArmPart, Comparison, UnionPoint
from llmbo.comparison.store import EvaluationStore
from llmbo.config import EARLIER
from llmbo.errors import StorageError
from llmbo.files import replace_file
from llmbo.problem.objectives import Objective
from llmbo.report import environment
from pruning.text import read_mix

PLACES = ("model", "text", "items", "name", "storage")
# Settings that came after rounds were first stored and change no proposal. What a comparison never sets and was there then is keyed too.
SINCE = (
    "samples", "refit_front", "heldout_text", "memory", "offload", "artifacts", "advisor_reply_tokens", "advisor_warm_start",
)  # fmt: skip
KEYED_BY = "content"  # written beside the code's digest; earlier versions keyed rounds by the text's path


def compare(
    config: CompareConfig, out: Path, cache: Path, fresh: bool, display: CompareDisplay, say: Callable[[str], None]
) -> Comparison:
    """Run what is not stored yet, and write `comparison.json` and `comparison.html` to `out` after every seed.

    Raises:
        LlmboError, PruningError: One line for the user; what is finished is stored.
    """
    with _locked(out), EvaluationStore.open(cache) as store:
        if fresh:
            store.forget_rounds(config.name)
        _warn_of_other_code(config, store, say)
        results = _PartialResults(config, out)
        problems = dict.fromkeys(arm.problem for arm in config.arms)
        for text in {each.run.text for each in problems if each.recorded is None} - {"self"}:
            read_mix(text)  # one that cannot be read is told before the first problem, not hours later
        try:
            for problem_config in problems:
                with _opened(problem_config, config, store, display) as problem:
                    _run_problem(problem_config, problem, config, store, display, results)
        except KeyboardInterrupt:
            results.write("interrupted")
            raise
        return results.write("complete")


class _PartialResults:
    """Finished arms and what belongs to them; writes the comparison they make."""

    def __init__(self, config: CompareConfig, out: Path) -> None:
        self._config, self._out = config, out
        self.arms: list[ArmPart] = []
        self.union: list[UnionPoint] = []
        self.objectives: tuple[Objective, ...] = ()
        self.judged: Mapping[str, tuple[Objective, ...]] = {}
        self.facts: dict[str, object] = {}

    def write(self, status: Literal["complete", "interrupted"]) -> Comparison:
        result = build_comparison(
            self._config, self.arms, self.union, self.objectives, self.judged, self.facts, environment(), status
        )
        for name, content in (
            ("comparison.json", result.model_dump_json(indent=1) + "\n"),
            ("comparison.html", page(result)),
        ):
            replace_file(self._out / name, content)
        return result


def _run_problem(
    problem_config: ProblemConfig,
    problem: OpenProblem,
    config: CompareConfig,
    store: EvaluationStore,
    display: CompareDisplay,
    results: _PartialResults,
) -> None:
    """All arms of one problem, seed by seed, so that an early look at the results compares all of them."""
    arms = [arm for arm in config.arms if arm.problem == problem_config]
    curves = measured_curves(problem, config)
    outcomes: list[Outcome] = []
    methods = {arm.label for arm in arms} & {config.method}
    if methods or not results.objectives:
        results.objectives, results.judged, results.facts = problem.objectives, problem.judged, dict(problem.facts)
    for seed in config.seeds:
        for arm in arms:
            outcome = run_arm(arm, seed, arm_key(arm, seed, config, problem), config, problem, store, display)
            outcomes.append(outcome)
            check_designs(outcomes)
            results.arms.append(arm_part(outcome, problem, curves, config))
        if methods:
            results.union = union_front(outcomes, problem)
        results.write("interrupted")


def arm_key(arm: Arm, seed: int, config: CompareConfig, problem: OpenProblem) -> str:
    """Names an arm's stored rounds: whatever changes its proposals changes the name.

    Model and text count by what they hold, not by where they lie; both are in the problem's identity. A setting that stands at what
    runs did before there was the setting (`EARLIER`) does not count, so that what was stored then is found.
    """
    settings = asdict(arm)
    run = settings["problem"]["run"]
    # what was left open, too
    run |= {"query_heads": problem.space.query_heads, "refit_anchors": run["refit_anchors"] or 0}
    run = {
        key: value
        for key, value in run.items()
        if key not in (*PLACES, *SINCE) and not (key in EARLIER and value == EARLIER[key])
    }
    what = [arm.strategy, settings["options"], run, config.batch, problem.identity]
    return f"{arm.label}/{seed}/{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]}"


@contextmanager
def _opened(
    problem: ProblemConfig, config: CompareConfig, store: EvaluationStore, display: CompareDisplay
) -> Iterator[OpenProblem]:
    if problem.recorded is not None:
        yield open_recorded(problem, config.margin, config.judged_by)
        return
    among = [arm.problem for arm in config.arms if arm.problem.recorded is None]
    with opened(problem, among, config.margin, config.judged_by, store, display) as problem_opened:
        yield problem_opened


def _warn_of_other_code(config: CompareConfig, store: EvaluationStore, say: Callable[[str], None]) -> None:
    """Evaluations are checked when a problem is opened; proposals that other code has made cannot be.

    Raises:
        StorageError: The proposals may be those of another text or model.
    """
    sources = sorted(Path(__file__).parents[1].rglob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    stored = store.fact(config.name)
    if stored and stored.get("keyed_by") != KEYED_BY:
        raise StorageError(
            f"The proposals of the comparison '{config.name}' were stored by an earlier version, under the path of their text "
            "whatever it held: --fresh makes them anew; evaluations are kept."
        )
    if stored and stored["code"] != digest:
        say("note: some proposals of this comparison were made by other code; --fresh makes them anew.")
        return
    store.set_fact(config.name, {"code": digest, "keyed_by": KEYED_BY})


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second process out of the output folder; the lock dies with the process that holds it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise StorageError(f"Another process is working on '{out}': wait for it, or choose another --out.") from error
    except OSError as error:
        raise StorageError(
            f"Cannot write the folder '{out}' ({error.strerror or error}): choose another --out."
        ) from error
    try:
        yield
    finally:
        lock.release()
