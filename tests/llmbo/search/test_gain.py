"""A trial's gain over the threshold family at equal size."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from llmbo.problem.objectives import Objective
from llmbo.search.gain import trial_gains
from llmbo.types import Source, Trial, TrialState

KL = Objective("kl", "nats/token", known=False, reference=1.2)
DENSE = {"kl": 0.0, "params_share": 1.0}


def trial(
    number: int, share: float, kl: float, origin: str = "threshold", state: TrialState = TrialState.COMPLETE
) -> Trial:
    values: Mapping[str, float] = {"kl": kl, "params_share": share} if state is TrialState.COMPLETE else {}
    return Trial(number, 0, (number,), origin, state, values, source=Source.of_origin(origin))


FAMILY = [trial(0, 0.5, 0.8), trial(1, 0.75, 0.3)]


def test_members_gain_nothing_and_others_what_they_are_below_the_family() -> None:
    trials = [*FAMILY, trial(2, 0.5, 0.7, "qnehvi"), trial(3, 0.75, 0.45, "qnehvi")]
    assert trial_gains(trials, KL, DENSE) == pytest.approx({0: 0.0, 1: 0.0, 2: 0.1, 3: -0.15}, abs=1e-9)


def test_between_members_the_family_is_interpolated() -> None:
    gains = trial_gains([*FAMILY, trial(2, 0.6, 0.0, "qnehvi")], KL, DENSE)
    assert 0.3 < gains[2] < 0.8


def test_nothing_is_said_where_the_family_was_not_measured() -> None:
    outside = [trial(2, 0.4, 0.1, "qnehvi"), trial(3, 0.6, 0.0, "qnehvi", TrialState.FAILED)]
    assert set(trial_gains([*FAMILY, *outside], KL, DENSE)) == {0, 1}
    assert trial_gains([trial(0, 0.5, 0.4, "random")], KL, DENSE) == {}


def test_more_is_better_where_the_objective_is_maximised() -> None:
    accuracy = Objective("accuracy", "share", known=False, reference=0.2, maximize=True)
    values = {0: 0.5, 1: 0.6, 2: 0.4}
    trials = [
        replace(trial(n, 0.5, 0.0, "threshold" if n == 0 else "qnehvi"), values={"accuracy": v, "params_share": 0.5})
        for n, v in values.items()
    ]
    gains = trial_gains(trials, accuracy, {"accuracy": 0.8})
    assert gains == pytest.approx({0: 0.0, 1: 0.1, 2: -0.1}, abs=1e-9)
