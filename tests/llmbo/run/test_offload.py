"""A run whose layers wait in their files finds what one with a resident model finds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llmbo import load_run


def numbers(values: dict[str, float | None] | None) -> dict[str, float]:
    return {name: value for name, value in (values or {}).items() if value is not None}


@pytest.mark.parametrize("flags", [{}, {"no_compensation": True}], ids=["refits", "none"])
def test_a_run_with_layers_elsewhere_is_the_run_of_a_resident_model(
    llmbo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, object]
) -> None:
    if not torch.cuda.is_available():  # the computing device, by another name, stands for a card
        for user in ("llmbo.models.placement", "llmbo.problem.residence"):
            monkeypatch.setattr(f"{user}.other_cards", lambda device: {"cpu:0": 10**9})
    found = {}
    for offload in ("none", "disk", "gpu"):
        monkeypatch.setenv("LLMBO_PREPARED", str(tmp_path / offload))  # nothing is taken from the other
        done = llmbo(name=offload, budget=6, offload=offload, **flags)
        assert done.exit_code == 0, done.output
        found[offload] = llmbo.report(offload)
    for part in ("trials", "front"):
        resident = found["none"][part]
        for elsewhere in (found["disk"][part], found["gpu"][part]):
            assert [point["architecture"] for point in elsewhere] == [point["architecture"] for point in resident]
            for one, other in zip(elsewhere, resident, strict=True):
                for values in ("objectives", "heldout"):
                    assert numbers(one.get(values)) == pytest.approx(numbers(other.get(values)), rel=1e-4)
    stored = {offload: load_run(tmp_path / "runs" / offload) for offload in found}
    cut = {offload: run.model(found["disk"]["front"][0]["trial"]).state_dict() for offload, run in stored.items()}
    for offload in ("disk", "gpu"):
        torch.testing.assert_close(cut[offload], cut["none"], rtol=1e-3, atol=1e-4)
    assert {offload: run._rebuilt().loaded.offload for offload, run in stored.items()} == {each: each for each in found}


def test_it_goes_on_with_a_resident_model_and_back(llmbo: Any) -> None:
    for budget, offload in ((4, "disk"), (6, "none"), (8, "disk")):
        done = llmbo(budget=budget, offload=offload)
        assert done.exit_code == 0, done.output
    assert [trial["state"] for trial in llmbo.report()["trials"]] == ["complete"] * 8


@pytest.mark.parametrize("flags", [{"racing": True}, {"objectives": "kl,decode_latency"}, {"text": "self"}], ids=str)
def test_what_runs_models_as_a_whole_is_refused(llmbo: Any, flags: dict[str, object]) -> None:
    done = llmbo(offload="disk", **flags)
    assert done.exit_code == 2 and "runs the model as a whole" in done.output and "--offload none" in done.output
