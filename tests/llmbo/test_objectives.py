"""Signs flip once; nothing that no model can beat is accepted."""

import math

import pytest
import torch

from llmbo.errors import ConfigError
from llmbo.objectives import OBJECTIVES, Objective, build_objectives, check_objectives, ref_point, to_maximize

DENSE = {"kl": 0.0, "loss": 3.5, "perplexity": 33.0, "params": 1000.0, "params_share": 1.0}
SMALLEST = {"params": 400.0, "params_share": 0.4}
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
        (("kl", "speed"), None, "'speed'.*kl, loss, params, params_share"),
        (("kl", "kl"), None, "two different"),
        (("kl",), None, "two different"),
        ((), None, "two different"),
        (("kl", "loss"), None, "exactly one size"),
        (("params", "params_share"), None, "exactly one size"),
        (("kl", "params"), (1.0,), "one number per objective.*got 1"),
        (("kl", "params"), (1.0, 2.0, 3.0), "one number per objective.*got 3"),
        (("kl", "params"), (0.0, 500.0), "kl is 0"),
        (("kl", "params"), (1.0, -1.0), "params is -1"),
        (("kl", "params"), (math.nan, 500.0), "kl is nan"),
        (("kl", "params"), (math.inf, 500.0), "kl is inf"),
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
        partner = "kl" if name.startswith("params") else "params"
        check_objectives((name, partner), None)
