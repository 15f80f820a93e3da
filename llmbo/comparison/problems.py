"""Problem settings -> something whose candidates can be measured, every measurement kept in the store."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from llmbo.comparison.config import ProblemConfig
from llmbo.comparison.store import Evaluation, EvaluationStore
from llmbo.config import RunConfig
from llmbo.config.objectives import OBJECTIVES
from llmbo.errors import StorageError
from llmbo.models.loading import LoadedModel, load_model
from llmbo.problem.hardware import device_name
from llmbo.problem.objectives import Objective, build_objectives
from llmbo.problem.preparation import prepared
from llmbo.problem.proxy import known_values
from llmbo.problem.space import SearchSpace
from llmbo.problem.texts import load_windows
from llmbo.run.facts import items_digest
from llmbo.search.strategies import SearchProblem
from llmbo.types import Evaluator, Phases
from pruning.calibration import SPLITS, TokenWindows, cut_windows
from pruning.text import read_mix

# WikiText is stored as words separated by spaces; a subword tokenizer wants the text as it was written.
UNDO = (
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    (" ,", ","),
    (" .", "."),
    (" ;", ";"),
    (" :", ":"),
    (" !", "!"),
    (" ?", "?"),
    (" 's", "'s"),
    (" n't", "n't"),
    ("( ", "("),
    (" )", ")"),
)
CHECK_SHARE = 0.6  # of the family's member that is measured anew whenever a problem is opened
CHECK_TOLERANCE = 0.005  # relative; threads and machines alone change a loss by far less


class Measure(Protocol):
    """Measures a point, or remembers having measured it."""

    def __call__(self, x: tuple[int, ...], origin: str) -> Evaluation: ...


@dataclass(frozen=True)
class OpenProblem:
    """A problem for as long as its context lasts.

    Args:
        search: What strategies may know.
        objectives: Of the search.
        measure: Values on the proxy windows.
        judge: Values on held-out windows, or None where fronts are not judged.
        judged: Objectives of the judgement, by the quality that takes the place of the searched one: held-out `loss`, and `accuracy` on
            held-out items where the search is for accuracy. Empty where fronts are not judged.
        facts: Model, text and machine, for the reader of the results.
        identity: Digest of all that values follow from: weights, windows, settings and the machine; or the recording.
        evaluators: Keys of `measure` and `judge` in the store; empty where nothing is stored.
    """

    search: SearchProblem
    objectives: tuple[Objective, ...]
    measure: Measure
    judge: Measure | None
    judged: Mapping[str, tuple[Objective, ...]]
    facts: Mapping[str, Any]
    identity: str
    evaluators: tuple[str, str] = ("", "")

    @property
    def space(self) -> SearchSpace:
        return self.search.space


@contextmanager
def opened(
    config: ProblemConfig,
    among: Sequence[ProblemConfig],
    margin: float,
    judged_by: Sequence[str],
    store: EvaluationStore,
    phases: Phases,
) -> Iterator[OpenProblem]:
    """Load model and text, prepare the search space, and check that stored evaluations are of the same problem.

    Args:
        among: All problems of the comparison; windows are dealt out for the most demanding, so that all share them.
        margin: Reference point of losses over the dense model's, in nats.
        judged_by: Objectives of the search whose costs fronts are judged by (`judged_objectives`); none for no judgement.
    """
    with phases.phase("model"):
        loaded = load_model(config.run.model, config.run.dtype, config.run.device)
        run = replace(config.run, dtype=loaded.dtype, device=loaded.device)
        windows = windows_of(config, run, among, loaded)
    with prepared(run, loaded, windows, phases) as problem:
        recipe = (
            *(loaded.fingerprint, loaded.dtype, loaded.device, run.compensation, _digest(windows.calibration)),
            *([problem.method.fits] if run.compensation else []),
            *([items_digest(run)] if run.items else []),
            *([problem.target.to_dict()] if problem.target else []),
        )
        proxy_key, heldout_key = (_key(*recipe, _digest(part)) for part in (windows.proxy, windows.heldout))
        measure = _stored(problem.proxy, problem.space, store, proxy_key)
        _check(measure, problem.proxy, problem.threshold_family.at(CHECK_SHARE), store, proxy_key)
        reference = run.reference_point or _reference(run.objectives, problem.dense, margin)
        objectives = build_objectives(run.objectives, problem.dense, problem.smallest, reference, run.limits)
        judge, judged = None, dict[str, tuple[Objective, ...]]()
        if judged_by:
            with phases.phase("dense model, held-out windows"):
                evaluator = problem.heldout()
                judge = _stored(evaluator, problem.space, store, heldout_key)
                dense = judge(problem.space.max_levels, "dense").values
            judged = judged_objectives(judged_by, dense, problem.smallest, margin)
        facts = {
            "model": loaded.name,
            "fingerprint": loaded.fingerprint,
            "dtype": loaded.dtype,
            "device": loaded.device,
            "text": windows.source,
            "text_sha256": windows.sha256,
            "tokens": {split: part.numel() for split, part in windows.parts.items()},
        }
        identity = _key(proxy_key, device_name(torch.device(loaded.device)))
        yield OpenProblem(problem, objectives, measure, judge, judged, facts, identity, (proxy_key, heldout_key))


def _reference(names: Sequence[str], dense: Mapping[str, float], margin: float) -> tuple[float, ...] | None:
    """Loss has the same margin on proxy and on held-out windows; None stands for the other qualities' own default."""
    if "loss" not in names:
        return None
    return tuple(dense[name] + (margin if name == "loss" else 0.0) for name in names)


def judged_objectives(
    searched: Sequence[str], dense: Mapping[str, float], smallest: Mapping[str, float], margin: float
) -> dict[str, tuple[Objective, ...]]:
    """What fronts are judged by: held-out loss, whatever quality was searched, against the known costs that were.

    Args:
        searched: Objectives of the search. With accuracy among them fronts are judged by that too, on items that it did not see.
        dense: Held-out values of the dense model.
        smallest: Known values of the smallest legal model.
        margin: Reference point of the loss over the dense model's, in nats. That of costs is the dense model's, whatever the search's.

    Returns:
        Objectives by quality: `loss`, perhaps `accuracy`.
    """
    known = [name for name in searched if OBJECTIVES[name].known]
    references = {"loss": dense["loss"] + margin}
    if "accuracy" in searched and dense.get("accuracy"):  # a dense model without a right answer leaves nothing to lose
        references["accuracy"] = OBJECTIVES["accuracy"].default(dense["accuracy"])
    costs = [dense[name] for name in known]
    return {
        quality: build_objectives((quality, *known), dense, smallest, (reference, *costs))
        for quality, reference in references.items()
    }


def windows_of(
    config: ProblemConfig, run: RunConfig, among: Sequence[ProblemConfig], loaded: LoadedModel
) -> TokenWindows:
    """The windows of one problem: the first of those dealt out for the greatest number that any of `among` wants."""
    same_text = [
        other.run
        for other in among
        if (other.run.text, other.run.chat, other.run.window) == (run.text, run.chat, run.window)
    ]
    most = {split: max(other.windows[split] for other in [run, *same_text]) for split in SPLITS}
    if config.run.text == "self" or not config.undo_spacing:
        tokens: dict[str, Any] = {f"{split}_tokens": count * run.window for split, count in most.items()}
        largest = replace(run, **tokens)
        windows = load_windows(largest, loaded)
    else:
        text = read_mix(run.text).edited(undo_spacing)
        windows = cut_windows(text, loaded.tokenizer, most, run.window, 0, run.chat)
    own: dict[str, Any] = {split: part[: run.windows[split]] for split, part in windows.parts.items()}
    return replace(windows, **own)


def undo_spacing(text: str) -> str:
    """WikiText's words and punctuation, put together again."""
    for old, new in UNDO:
        text = text.replace(old, new)
    return text


def _stored(
    evaluator: Evaluator,
    space: SearchSpace,
    store: EvaluationStore,
    key: str,
    clock: Callable[[], float] = time.perf_counter,
) -> Measure:
    def measure(x: tuple[int, ...], origin: str) -> Evaluation:
        digest = space.decode(x).digest
        found = store.evaluation(key, digest)
        if found is None:
            start = clock()
            [values] = evaluator.evaluate([x])
            found = Evaluation(values, clock() - start)
            store.add_evaluation(key, digest, x, origin, found)
        # Costs are counted anew: what was stored may be of another context, or lack a cost that is searched only now.
        return replace(found, values={**found.values, **known_values(space, x)})

    return measure


def _check(measure: Measure, evaluator: Evaluator, x: tuple[int, ...], store: EvaluationStore, key: str) -> None:
    """Refuse stored evaluations that other code, or another machine, has made."""
    stored, now = measure(x, "threshold").values, evaluator.evaluate([x])[0]
    if not math.isclose(stored["loss"], now["loss"], rel_tol=CHECK_TOLERANCE):
        raise StorageError(
            f"The cache holds loss {stored['loss']:.4f} of an architecture whose loss is {now['loss']:.4f} here: it was filled by "
            "other code or on another machine. Choose another --cache."
        )


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _digest(windows: torch.Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
