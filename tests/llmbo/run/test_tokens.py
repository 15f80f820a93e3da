"""How many tokens refits are fitted on: said, as the run had it, or what the machine gets through and the text holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmbo.config import RunConfig
from llmbo.models.loading import find_prunable
from llmbo.models.stored import anatomy_of_config
from llmbo.run.duration import Rates
from llmbo.run.tokens import CHOICES, settled

SLOW = Rates(1e6, 1e6, 1e6)


def test_a_faster_machine_takes_more_tokens_and_what_was_said_stays(model_folder: Path) -> None:
    config = RunConfig(str(model_folder))
    anatomy = anatomy_of_config(find_prunable(str(model_folder)))
    found = [
        settled(config, anatomy, "float32", "cpu", Rates(speed, speed, speed)).calibration_tokens
        for speed in (1e6, 1e8, 1.4e8, 2e8, 2.8e8, 1e12)
    ]
    assert found == sorted(found) and found[0] == CHOICES[-1] and found[-1] == CHOICES[0] and len(set(found)) > 2
    said = replace(config, calibration_tokens=4096, refit_anchors=1)
    assert settled(said, anatomy, "float32", "cpu", SLOW) is said


def test_what_a_model_must_write_first_is_less(model_folder: Path) -> None:
    """As much as it writes in two minutes; products alone would let it have more."""
    anatomy = anatomy_of_config(find_prunable(str(model_folder)))

    def tokens(text: str, passes: float) -> int:
        config = RunConfig(str(model_folder), text=text, refit_anchors=0)
        return settled(config, anatomy, "float32", "cpu", Rates(1e12, 1e12, passes)).calibration_tokens

    speeds = [10**power for power in range(4, 12)]
    own, others = ([tokens(text, speed) for speed in speeds] for text in ("self", "builtin"))
    assert own == sorted(own) and {own[0], own[-1]} == {CHOICES[0], CHOICES[-1]}
    assert all(a <= b for a, b in zip(own, others, strict=True)) and own != others


@pytest.mark.parametrize(("speed", "number"), [(1e6, 0), (1.5e7, 1), (2.5e7, 2), (1e12, 3)])
def test_a_faster_machine_fits_refits_at_more_pruned_members(model_folder: Path, speed: float, number: int) -> None:
    config = RunConfig(str(model_folder), calibration_tokens=4096)
    anatomy = anatomy_of_config(find_prunable(str(model_folder)))
    rates = Rates(speed, speed, speed)
    assert settled(config, anatomy, "float32", "cpu", rates).refit_anchors == number
    for none in ({"window": 16, "calibration_tokens": 144}, {"compensation": False}, {"refit_anchors": 0}):
        assert settled(replace(config, **none), anatomy, "float32", "cpu", rates).refit_anchors == 0, none


def test_a_short_text_gives_what_it_has_and_the_run_keeps_that_number(llmbo: Any) -> None:
    done = llmbo(budget=2, calibration_tokens=0)
    assert done.exit_code == 0, done.output
    settings = llmbo.report()["run"]["settings"]
    assert settings["calibration_tokens"] == 1024 == llmbo.report()["data"]["calibration"]["tokens"]  # of 1,200 in all
    for tokens, code in ((0, 0), (1024, 0), (512, 2)):
        again = llmbo(budget=4 + (tokens > 0), calibration_tokens=tokens)
        assert again.exit_code == code, again.output
    assert "calibration_tokens: 1024 -> 512" in again.output


def test_a_text_that_is_too_short_for_what_was_asked_for_is_refused(llmbo: Any) -> None:
    done = llmbo(budget=2, calibration_tokens=8192)
    assert done.exit_code == 2 and "ask for fewer tokens" in done.output


@pytest.mark.parametrize("tokens", [-1, 7])
def test_less_than_a_window_is_refused(model_folder: Path, tokens: int) -> None:
    with pytest.raises(Exception, match="calibration-tokens must"):
        RunConfig(str(model_folder), calibration_tokens=tokens)
