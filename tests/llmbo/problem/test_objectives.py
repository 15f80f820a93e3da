"""Signs flip once; nothing that no model can beat is accepted."""

import math

import pytest
import torch

from llmbo.config.objectives import (
    OBJECTIVES,
    check_objectives,
    feasible,
    known_limits,
    measured_limits,
    parse_limits,
)
from llmbo.errors import ConfigError
from llmbo.problem.objectives import Objective, build_objectives, outcomes, ref_point, to_maximize
from llmbo.types import Trial, TrialState

DENSE = {
    "kl": 0.0,
    "loss": 3.5,
    "perplexity": 33.0,
    "params": 1000.0,
    "params_share": 1.0,
    "flops": 5000.0,
    "weight_bytes": 2000.0,
    "kv_bytes": 100.0,
}
SMALLEST = {"params": 400.0, "params_share": 0.4, "flops": 2000.0, "weight_bytes": 800.0, "kv_bytes": 50.0}
PAIRS = [(quality, size) for quality in ("kl", "loss") for size in ("params", "params_share")]


@pytest.mark.parametrize("names", [*PAIRS, *(pair[::-1] for pair in PAIRS)])
def test_defaults_can_be_beaten_and_keep_their_order(names: tuple[str, str]) -> None:
    objectives = build_objectives(names, DENSE, SMALLEST)
    assert tuple(objective.name for objective in objectives) == names
    assert [objective.known for objective in objectives] == [name.startswith("params") for name in names]
    assert all(objective.reference >= DENSE[objective.name] for objective in objectives)


def test_larger_is_better_for_the_optimiser_whatever_the_user_wants() -> None:
    objectives = (Objective("cost", "", False, 5.0), Objective("speed", "", False, 1.0, maximize=True))
    worse, better = {"cost": 4.0, "speed": 2.0}, {"cost": 3.0, "speed": 7.0}
    Y = to_maximize([worse, better], objectives)
    assert Y.dtype == torch.float64 and Y.shape == (2, 2)
    assert (Y[1] > Y[0]).all() and (Y > ref_point(objectives)).all()
    worst = {"cost": 5.0, "speed": 1.0}
    torch.testing.assert_close(to_maximize([worst], objectives)[0], ref_point(objectives))


def test_no_trials_give_an_empty_matrix() -> None:
    assert to_maximize([], build_objectives(("kl", "params"), DENSE, SMALLEST)).shape == (0, 2)


def test_the_given_reference_point_is_kept() -> None:
    objectives = build_objectives(("params_share", "loss"), DENSE, SMALLEST, (0.8, 4.5))
    assert [objective.reference for objective in objectives] == [0.8, 4.5]


@pytest.mark.parametrize(
    ("names", "reference", "message"),
    [
        (("kl", "speed"), None, "'speed'.*kl, loss, accuracy, params, params_share"),
        (("kl", "kl"), None, "two or three different"),
        (("kl",), None, "two or three different"),
        ((), None, "two or three different"),
        (("kl", "loss"), None, "at least one cost"),
        (("params", "params_share"), None, "at least one quality"),
        (("kl", "loss", "params", "flops"), None, "two or three different"),
        (("kl", "params"), (1.0,), "one number per objective.*got 1"),
        (("kl", "params"), (1.0, 2.0, 3.0), "one number per objective.*got 3"),
        (("kl", "params"), (0.0, 500.0), "kl must be above 0, got 0"),
        (("kl", "params"), (1.0, -1.0), "params must be above 0, got -1"),
        (("kl", "params"), (math.nan, 500.0), "kl must be a number, got nan"),
        (("kl", "params"), (math.inf, 500.0), "kl must be below 1e.18, got inf"),
    ],
)
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    names: tuple[str, ...], reference: tuple[float, ...] | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objectives(names, reference)


@pytest.mark.parametrize(
    ("names", "reference"),
    [
        (("loss", "params_share"), (3.5, 0.9)),
        (("loss", "params_share"), (4.0, 0.4)),
        (("params", "loss"), (400.0, 4.0)),
    ],
)
def test_a_reference_point_that_nobody_beats_is_refused_with_the_best_value(
    names: tuple[str, ...], reference: tuple[float, ...]
) -> None:
    check_objectives(names, reference)  # only the model tells
    with pytest.raises(
        ConfigError, match=r"--reference-point for \w+ is [\d.]+, but the (dense|smallest legal) model has"
    ):
        build_objectives(names, DENSE, SMALLEST, reference)


def test_every_known_name_can_be_asked_for() -> None:
    for name in OBJECTIVES:
        partner = "kl" if OBJECTIVES[name].known else "params"
        check_objectives((name, partner), None)


def test_limits_are_told_apart_by_how_they_are_kept() -> None:
    limits = parse_limits(["params_share=0.6", "kl=0.5", "kv_bytes=1e6"])
    assert known_limits(limits) == {"params_share": 0.6, "kv_bytes": 1e6} and measured_limits(limits) == {"kl": 0.5}
    assert feasible({"kl": 0.5}, {"kl": 0.5}) and not feasible({"kl": 0.51}, {"kl": 0.5})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["params_share"], "NAME=VALUE.*'params_share'"),
        (["params_share=small"], "NAME=VALUE.*'params_share=small'"),
        (["params_share=0"], "above 0"),
        (["kl=nan"], "above 0"),
        (["parms=3"], "'parms': did you mean params"),
        (["kl=1", "kl=2"], "kl is given twice"),
    ],
)
def test_limits_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_limits(words)


def test_a_limit_bounds_the_reference_point() -> None:
    objectives = build_objectives(("kl", "params_share"), DENSE, SMALLEST, (1.2, 1.0), {"params_share": 0.6, "kl": 2.0})
    assert [objective.reference for objective in objectives] == [1.2, 0.6]
    with pytest.raises(ConfigError, match=r"--max params_share is 0\.3, but the smallest legal model has 0.4"):
        build_objectives(("kl", "params_share"), DENSE, SMALLEST, None, {"params_share": 0.3})


def test_what_breaks_a_limit_counts_for_nothing() -> None:
    objectives = build_objectives(("kl", "params"), DENSE, SMALLEST)
    values = {"kl": 0.1, "params": 500.0}
    trials = [Trial(n, 0, (), "x", TrialState.COMPLETE, values, feasible=n == 1) for n in range(2)]
    Y = outcomes(trials, objectives)
    assert (Y[0] == -math.inf).all() and (Y[1] > ref_point(objectives)).all()
