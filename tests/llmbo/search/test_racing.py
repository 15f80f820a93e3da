"""A race stops what the front dominates, practically never what belongs on it, and the same way in every run."""

import copy
from collections.abc import Callable
from typing import Any

import optuna
import pytest
import torch
from click.testing import Result

from llmbo.search.racing import ALPHA, MIN_WINDOWS, checkpoints, estimate, lost
from llmbo.search.surrogate import fit_surrogate

WINDOWS = 12


def stopped_at(values: torch.Tensor, rival: torch.Tensor) -> int | None:
    return next((m for m in checkpoints(len(rival)) if lost(values[:m], rival)), None)


@pytest.mark.parametrize("windows", [1, 2, 3, 4, 5, 12, 48])
def test_checkpoints_leave_something_to_save(windows: int) -> None:
    looks = checkpoints(windows)
    assert looks == sorted(set(looks)) and all(MIN_WINDOWS <= look < windows for look in looks)


@pytest.mark.parametrize(("heavy_tails", "most"), [(False, 2 * ALPHA), (True, 6 * ALPHA)])
def test_a_candidate_of_the_front_is_practically_never_stopped(heavy_tails: bool, most: float) -> None:
    """Differences to the rival are noise around nothing, the hardest case; half of them end at or below it."""
    rng = torch.Generator().manual_seed(0)
    draws, rival = 3000, torch.zeros(WINDOWS, dtype=torch.float64)
    d = torch.randn(draws, WINDOWS, generator=rng, dtype=torch.float64)
    if heavy_tails:  # Student's t with 4 degrees of freedom
        d /= torch.randn(draws, WINDOWS, 4, generator=rng, dtype=torch.float64).square().mean(-1).sqrt()
    good = d[d.mean(-1) <= 0]
    stopped = sum(stopped_at(row, rival) is not None for row in good)
    assert len(good) > draws / 3 and stopped / len(good) <= most


def test_what_is_clearly_worse_is_stopped_early() -> None:
    rng = torch.Generator().manual_seed(1)
    rival = torch.randn(WINDOWS, generator=rng, dtype=torch.float64)
    worse = rival + 5 + 0.3 * torch.randn(100, WINDOWS, generator=rng, dtype=torch.float64)
    looks = [stopped_at(row, rival) for row in worse]
    assert all(look is not None for look in looks) and looks.count(MIN_WINDOWS) > 50


def test_what_windows_have_in_common_does_not_matter() -> None:
    rng = torch.Generator().manual_seed(2)
    values, rival, hard = torch.randn(3, WINDOWS, generator=rng, dtype=torch.float64)
    for m in checkpoints(WINDOWS):
        plain, shifted = estimate(values[:m], rival), estimate((values + 9 * hard)[:m], rival + 9 * hard)
        assert shifted[1] == pytest.approx(plain[1])
        assert shifted[0] - 9 * hard.mean() == pytest.approx(plain[0])
    mean, error = estimate(values, rival)
    assert mean == pytest.approx(float(values.mean())) and error == 0


def test_the_surrogate_trusts_an_estimate_less() -> None:
    Z = torch.linspace(0, 1, 12, dtype=torch.float64)[:, None]
    Y = torch.sin(4 * Z)
    Y[6] += 2
    variance = torch.zeros(12, dtype=torch.float64)
    variance[6] = 4.0
    Z = torch.cat([Z, Z], dim=1)  # the last column is the share
    plain, told = (fit_surrogate(Z, Y, 1, found).posterior(Z[6:7]).mean.item() for found in (None, variance))
    truth = float(torch.sin(4 * Z[6, 0]))
    assert abs(told - truth) < min(0.3, abs(plain - truth))


def test_races_in_a_search(llmbo: Any) -> None:
    """Lost ones are on no front; a run that was interrupted measures what it would have measured anyway."""
    options = {"racing": True, "proxy_tokens": 256, "strategy": "random"}
    runs = []
    for name, budgets in (("whole", (24,)), ("parts", (15, 24))):
        for budget in budgets:
            result = llmbo(name=name, budget=budget, **options)
            assert result.exit_code == 0, result.output
        runs.append(llmbo.report(name))
    whole, parts = runs
    assert [trial["objectives"] for trial in parts["trials"]] == [trial["objectives"] for trial in whole["trials"]]
    stopped = [trial for trial in whole["trials"] if trial["objectives"]["error"] is not None]
    assert stopped and all(64 <= trial["objectives"]["tokens"] < 256 for trial in stopped)
    assert not {trial["number"] for trial in stopped} & {point["trial"] for point in whole["front"]}
    assert [trial["number"] for trial in whole["trials"] if not trial["counts"]] == [
        trial["number"] for trial in stopped
    ]
    stored = [
        [trial.user_attrs for trial in optuna.load_study(study_name=name, storage=f"sqlite:///{run}/study.db").trials]
        for name in ("whole", "parts")
        for run in [llmbo.folder / "runs" / name]
    ]
    assert [trial["windows"] for trial in stored[0]] == [trial["windows"] for trial in stored[1]]
    for trial in stored[0]:
        seen = int(trial["values"].get("tokens", 256)) // 16
        assert {name: len(values) for name, values in trial["windows"].items()} == {"kl": seen, "loss": seen}
        for name, values in trial["windows"].items():
            assert "error" in trial["values"] or trial["values"][name] == pytest.approx(sum(values) / seen, rel=1e-12)
    plain = copy.deepcopy(options) | {"racing": None, "name": "plain"}
    assert llmbo(budget=24, **plain).exit_code == 0
    assert [point["trial"] for point in llmbo.report("plain")["front"]] == [point["trial"] for point in whole["front"]]


def test_racing_needs_one_measured_objective(llmbo: Callable[..., Result]) -> None:
    result = llmbo(objectives="kl,loss,params", racing=True)
    assert result.exit_code == 2 and "--racing needs kl or loss" in result.stderr
