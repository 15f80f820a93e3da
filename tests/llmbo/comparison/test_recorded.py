"""The recorded benchmark: the table says what it was given, the surrogate knows what it learnt, and no model is needed."""

import json
import signal
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.comparison.recorded import FIT, Recording, Surrogate, find_recorded
from llmbo.errors import StorageError
from llmbo.problem.family import Expansions

FOLDER = Path(__file__).parents[3] / "experiments" / "problem_r_surrogate"


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.read(FOLDER)


@pytest.fixture(scope="module")
def fit() -> dict:
    return json.loads((FOLDER / FIT).read_text(encoding="utf-8"))


def test_a_recording_reads_back_what_was_written(recording: Recording, tmp_path: Path) -> None:
    config = json.loads((FOLDER / "problem.json").read_text(encoding="utf-8"))["config"]
    some = torch.rand(2, recording.space.d, 13, dtype=torch.float64).mul(1e6).round().div(1e6)
    known = Expansions(torch.tensor([0.5, 1.0], dtype=torch.float64), some)
    recording = replace(recording, family=replace(recording.family, expansions=known))
    recording.write(tmp_path, config)
    again = Recording.read(tmp_path)
    assert again.points == recording.points and again.origins == recording.origins and again.dense == recording.dense
    for name, values in recording.values.items():
        np.testing.assert_array_equal(again.values[name], values)
    for name in ("family", "threshold_family", "fisher_family", "taylor_family"):
        assert torch.equal(getattr(again, name).path, getattr(recording, name).path)
    assert again.threshold_family.expansions is None and again.family.expansions is not None
    assert torch.equal(again.family.expansions.changes, some)
    assert torch.equal(again.family.expansions.shares, known.shares)


def test_recorded_architectures_are_legal_and_distinct(recording: Recording) -> None:
    assert recording.space.legal(torch.tensor(recording.points, dtype=torch.float64)).all()
    assert len(set(recording.points)) == len(recording.points)
    assert not np.isnan(recording.values["kl"]).any()


def test_the_surrogate_knows_what_it_has_seen_and_what_it_has_not(recording: Recording, fit: dict) -> None:
    measured = recording.values["kl"]
    near = measured < 1.2
    seen = Surrogate(recording, fit["theta"])(recording.points)["kl"]
    assert np.abs(seen - measured)[near].max() < 0.1
    unseen = np.arange(len(measured)) % 5 == 0
    guessed = Surrogate(recording, fit["theta"], ~unseen)(recording.points)["kl"]
    error = np.sqrt(np.mean((guessed - measured)[unseen & near] ** 2))
    assert error < 2 * fit["errors"]["kl"]["front_rmse"]


def test_the_stated_rank_correlation_is_good_enough_to_compare_strategies(fit: dict) -> None:
    assert fit["errors"]["kl"]["front_spearman"] >= 0.97


def compared(folder: Path, config: str) -> dict:
    """What `llmbo compare` on the recorded benchmark writes for a config."""
    (folder / "some.toml").write_text(config, encoding="utf-8")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(folder):
            answer = CliRunner().invoke(app, ["compare", "some.toml", "--problem", "problem-r-surrogate"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert answer.exit_code == 0, answer.output
    return json.loads((folder / "comparisons" / "some" / "comparison.json").read_text(encoding="utf-8"))


def test_a_comparison_on_it_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "empty"))
    result = compared(tmp_path, 'strategies = ["threshold", "random"]\nseeds = [0]\ncheckpoints = [4, 8]\n')
    final = {arm["label"]: arm["checkpoints"][-1] for arm in result["arms"]}
    assert final["threshold"]["hypervolume"] > final["random"]["hypervolume"] > 0
    assert final["threshold"]["heldout_hypervolume"] > 0
    assert not (tmp_path / "empty").exists()


def test_advised_arms_share_the_design_up_to_the_places_that_the_advisor_fills(tmp_path: Path) -> None:
    arms = ["random", "heuristic", "hostile"]
    lines = [f'{{strategy = "advised", label = "{by}", by = "{by}", context_level = "partial"}}' for by in arms]
    result = compared(tmp_path, f'strategies = ["qnehvi", {", ".join(lines)}]\nseeds = [0]\ncheckpoints = [16]\n')
    assert [arm["label"] for arm in result["arms"]] == ["qnehvi", *arms]
    assert all(arm["checkpoints"][-1]["hypervolume"] > 0 for arm in result["arms"])


@pytest.mark.parametrize("damage", ["evaluations.csv", "problem.json"])
def test_a_damaged_recording_is_one_line(recording: Recording, tmp_path: Path, damage: str) -> None:
    for name in ("evaluations.csv", "problem.json", FIT):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    (tmp_path / damage).write_text("x,origin\n?,?\n", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be read"):
        Recording.read(tmp_path)


def test_an_unknown_recording_is_refused() -> None:
    with pytest.raises(StorageError, match="nowhere"):
        find_recorded("nowhere")
