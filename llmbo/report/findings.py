"""What a run must not leave unsaid: that nothing it measured is a result, and why."""

from collections.abc import Callable, Mapping, Sequence

from llmbo.config.objectives import measured_limits
from llmbo.problem.objectives import Objective
from llmbo.types import Trial, TrialState

REMEDY = "Search on with a larger --budget, or anew under another --name with"


def warnings_of(trials: Sequence[Trial], objectives: Sequence[Objective], limits: Mapping[str, float]) -> list[str]:
    """One line if trials have ended and none is within the limits and better than the reference point; else none.

    Args:
        limits: All of the run's, by name.
    """
    ended = [trial for trial in trials if trial.state is not TrialState.RUNNING]
    whole = [trial for trial in ended if trial.complete and not trial.stopped]
    if not ended:
        return []
    if not whole:
        reasons = [trial.failure for trial in ended if trial.failure]
        return [
            f"No trial was measured to its end{f', the last because: {reasons[-1]}' if reasons else ''}: there is no front."
        ]
    within = [trial for trial in whole if trial.feasible]
    if not within:
        measured = measured_limits(limits)
        missed = _missed(measured, whole, lambda name, value: value <= measured[name], lambda name: 1.0)
        some = " and ".join(f"--max {name}={limit:g}" for name, limit in measured.items())
        return [f"No trial keeps {some} ({missed}), so there is no front. {REMEDY} a larger limit."]
    reference = {objective.name: objective.reference for objective in objectives}
    sign = {objective.name: objective.sign for objective in objectives}

    def beats(name: str, value: float) -> bool:
        return sign[name] * value > sign[name] * reference[name]

    if any(all(beats(name, trial.values[name]) for name in reference) for trial in within):
        return []
    point = ", ".join(f"{name} {value:g}" for name, value in reference.items())
    missed = _missed(reference, within, beats, lambda name: -sign[name])
    return [
        f"No trial beats the reference point {point} ({missed}), so hypervolume is 0. {REMEDY} a worse --reference-point."
    ]


def _missed(
    wanted: Mapping[str, float],
    trials: Sequence[Trial],
    reached: Callable[[str, float], bool],
    direction: Callable[[str], float],
) -> str:
    """The best that there was of whatever no trial reached; `direction` is 1 where less is better, -1 where more is."""
    told = []
    for name in wanted:
        best = min(trials, key=lambda trial: direction(name) * trial.values[name])
        if not reached(name, best.values[name]):
            told.append(f"the best {name} is {best.values[name]:.4g}, of trial {best.number}")
    return "; ".join(told) or "each is reached, but not by one trial at once"
