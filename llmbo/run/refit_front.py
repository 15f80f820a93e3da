"""Some points of the finished front, refitted in sequence and measured once more, in columns of their own."""

from dataclasses import replace
from functools import partial
from typing import Any

from llmbo.problem.kept import own_files
from llmbo.problem.proxy import ProxyEvaluator
from llmbo.problem.sequence import PHASE, beyond, sequential
from llmbo.report import front_of
from llmbo.run.assemble import RunParts
from llmbo.run.judgement import noise, spread, windows_of
from llmbo.run.records import digest_elsewhere
from llmbo.types import Phases

KIND = "refitted"
MEASURED: tuple[str, ...] = ("objectives", "heldout", "elsewhere")
NOISE = {"heldout": "noise", "elsewhere": "noise_elsewhere"}


def refit_front(run: RunParts, phases: Phases) -> None:
    """Refit as many points as the settings ask for, spread over the front by size; skips what is stored."""
    problem, digest = run.problem, digest_elsewhere(run.store.facts)
    chosen = spread(front_of(run.store.trials(), run.objectives), run.config.refit_front)
    stored = run.store.judgements(KIND)
    missing = [trial for trial in chosen if stored.get(trial.number, {}).get("digest") != digest]
    if not missing:
        return
    space, files, layers = problem.space, own_files(run.folder, phases.note), problem.space.num_layers
    evaluators = {"objectives": problem.proxy, "heldout": problem.heldout()}
    if run.elsewhere is not None:
        evaluators["elsewhere"] = ProxyEvaluator.on(run.elsewhere.heldout, space, problem.supernet)
    with phases.phase(PHASE, len(missing) * layers) as advance:
        for place, trial in enumerate(missing):
            refits = sequential(
                files,
                trial.number,
                problem.supernet,
                space.decode(trial.x),
                problem.windows.calibration,
                partial(beyond, advance, place * layers),
            )
            supernet = problem.supernet.using(refits)
            found = {
                name: replace(evaluator, supernet=supernet).evaluate([trial.x])[0]
                for name, evaluator in evaluators.items()
            }
            windows = {name: measured.windows for name, measured in found.items() if name in NOISE}
            run.store.set_judgement(KIND, trial.number, {**found, "digest": digest, "windows": windows})


def refitted(run: RunParts) -> dict[int | None, dict[str, Any]]:
    """What is stored, as the report shows it: of another text only what its windows as they are now say."""
    digest, stored = digest_elsewhere(run.store.facts), run.store.judgements(KIND)
    front, shown = front_of(run.store.trials(), run.objectives), dict[int | None, dict[str, Any]]()
    for number, found in stored.items():
        names = MEASURED if found["digest"] == digest else MEASURED[:-1]
        shown[number] = {name: found[name] for name in names if name in found}
    dense = {"heldout": run.store.heldout(), "elsewhere": run.store.heldout(digest) if digest else {}}
    for name, field in NOISE.items():
        kept = {number: stored[number].get("windows", {}).get(name) for number in shown if name in shown[number]}
        windows = windows_of({None: dense[name][None]}) if None in dense[name] else {}
        for number, part in noise(front, windows | {n: own for n, own in kept.items() if own}, run.objectives).items():
            shown[number][field] = part
    return shown
