"""The recorded benchmark: the table says what it was given, the surrogate knows what it learnt, and no model is needed."""

import json
import signal
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from botorch.models import SingleTaskGP
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.comparison.config import ProblemConfig, read_config
from llmbo.comparison.gaussian_process import (
    gaussian_process,
    hyperparameters_of,
    posterior_mean,
    with_hyperparameters,
)
from llmbo.comparison.recorded import (
    FIT,
    TARGETS,
    Array,
    Recording,
    Surrogate,
    find_recorded,
    fit_process,
    open_recorded,
)
from llmbo.config import RunConfig
from llmbo.errors import ConfigError, StorageError
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


@pytest.fixture(scope="module")
def few(recording: Recording) -> Recording:
    """A hundred rows that know every target."""
    return some_rows(recording, np.flatnonzero(~np.isnan(recording.values["heldout_kl"]))[:100])


def some_rows(recording: Recording, rows: NDArray[np.int64]) -> Recording:
    return replace(
        recording,
        points=tuple(recording.points[row] for row in rows),
        origins=tuple(recording.origins[row] for row in rows),
        values={name: values[rows] for name, values in recording.values.items()},
    )


def test_the_surrogate_is_within_its_noise_of_what_it_has_seen_and_as_good_as_stated_elsewhere(
    recording: Recording, fit: dict
) -> None:
    known = {name: process_of(recording, fit, name) for name in TARGETS}
    for name, process in known.items():
        X, Y = recording.training_data(name)
        rest = posterior_mean(process, X[::4]) - Y[::4].squeeze(-1).numpy()
        noise = process.likelihood.noise.item() ** 0.5 * Y.std().item()
        assert np.sqrt(np.mean(rest**2)) < noise, name
    unseen = np.arange(len(recording.points)) % 5 == 0
    near = unseen & (recording.values["kl"] < 1.2)
    points = [point for point, wanted in zip(recording.points, near, strict=True) if wanted]
    guessed = Surrogate(recording, {"kl": fit["hyperparameters"]["kl"]}, ~unseen)(points)["kl"]
    error = np.sqrt(np.mean((guessed - recording.values["kl"][near]) ** 2))
    stated = fit["errors"]["kl"]["front_rmse"]
    assert stated / 2 < error < 2 * stated  # rows that were seen after all would be far better


def process_of(recording: Recording, fit: dict, name: str) -> SingleTaskGP:
    return with_hyperparameters(gaussian_process(*recording.training_data(name)), fit["hyperparameters"][name])


def test_predictions_are_the_textbooks_posterior_mean(recording: Recording, fit: dict) -> None:
    """k(x, X) (K + s^2 I)^-1 (y - m) + m of standardised targets, with more rows than GPyTorch solves exactly without BoTorch."""
    some = some_rows(recording, np.arange(1000))
    values = fit["hyperparameters"]["kl"]
    noise, mean, a2, length, b2, offset = (values[name] for name in NAMES)
    X, Y = (part.numpy() for part in some.training_data("kl"))
    x = some.features([some.space.max_levels, *recording.points[1000:1003]])

    def kernel(A: Array, B: Array) -> Array:
        r = np.sqrt(5) * cdist(A, B) / length
        return a2 * (1 + r + r**2 / 3) * np.exp(-r) + b2 * (A @ B.T + offset)

    center, scale = Y.mean(), Y.std(ddof=1)
    weights = np.linalg.solve(kernel(X, X) + noise * np.eye(len(X)), (Y - center) / scale - mean)
    expected = center + scale * (mean + kernel(x, X) @ weights).squeeze(-1)
    np.testing.assert_allclose(posterior_mean(process_of(some, fit, "kl"), torch.from_numpy(x)), expected, atol=1e-9)


NAMES = (
    "likelihood.noise_covar.noise",
    "mean_module.constant",
    "covar_module.kernels.0.outputscale",
    "covar_module.kernels.0.base_kernel.lengthscale",
    "covar_module.kernels.1.outputscale",
    "covar_module.kernels.1.base_kernel.offset",
)


def test_the_order_of_the_table_changes_nothing(few: Recording, fit: dict) -> None:
    shuffled = some_rows(few, np.random.default_rng(0).permutation(len(few.points)))
    assert shuffled.points != few.points
    first, second = (Surrogate(some, fit["hyperparameters"])(few.points) for some in (few, shuffled))
    for name in TARGETS:
        np.testing.assert_array_equal(first[name], second[name])
    assert hyperparameters_of(fit_process(few, "kl")) == hyperparameters_of(fit_process(shuffled, "kl"))


def test_a_saved_fit_predicts_what_the_fitted_process_did(few: Recording) -> None:
    fitted = fit_process(few, "kl")
    saved = json.loads(json.dumps(hyperparameters_of(fitted)))
    assert set(saved) == set(NAMES)
    X, _ = few.training_data("kl")
    log_kl = posterior_mean(fitted.eval(), X)
    loaded = Surrogate(few, {"kl": saved})(sorted(few.points))["kl"]
    np.testing.assert_allclose(loaded, np.exp(log_kl) - 0.02, atol=1e-9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values: values.pop("mean_module.constant"), ["expected", "mean_module.constant"]),
        (lambda values: values.update(lengthscale=1.0), ["got", "lengthscale"]),
        (lambda values: values.update({NAMES[0]: -1.0}), [NAMES[0], "-1.0", "range"]),
        (lambda values: values.update({NAMES[3]: 0.0}), [NAMES[3], "0.0", "range"]),
        (lambda values: values.update({NAMES[0]: None}), [NAMES[0], "None", "range"]),
    ],
)
def test_a_damaged_fit_is_one_line_with_its_remedy(tmp_path: Path, fit: dict, change: Any, words: list[str]) -> None:
    for name in ("evaluations.csv", "problem.json"):
        (tmp_path / name).write_bytes((FOLDER / name).read_bytes())
    damaged = json.loads(json.dumps(fit))
    change(damaged["hyperparameters"]["kl"])
    (tmp_path / FIT).write_text(json.dumps(damaged), encoding="utf-8")
    with pytest.raises(StorageError) as error:
        open_recorded(ProblemConfig(RunConfig("any"), recorded=str(tmp_path)), 1.0, True)
    (line,) = str(error.value).splitlines()
    assert all(word in line for word in [*words, FIT, "--refit"])


def test_the_stated_rank_correlation_is_good_enough_to_compare_strategies(fit: dict) -> None:
    assert fit["errors"]["kl"]["front_spearman"] >= 0.97


def test_a_comparison_on_it_needs_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of advised arms too, which share the design up to the places that the advisor fills, or it would be refused."""
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "empty"))
    advised = ["random", "heuristic", "hostile"]
    arms = [f'{{strategy = "advised", label = "by {by}", by = "{by}", context_level = "partial"}}' for by in advised]
    strategies = f'["threshold", "random", "qnehvi", {", ".join(arms)}]'
    config = f"strategies = {strategies}\nseeds = [0]\ncheckpoints = [12, 16]\n"
    (tmp_path / "some.toml").write_text(config, encoding="utf-8")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(tmp_path):
            answer = CliRunner().invoke(app, ["compare", "some.toml", "--problem", "problem-r-surrogate"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert answer.exit_code == 0, answer.output
    result = json.loads((tmp_path / "comparisons" / "some" / "comparison.json").read_text(encoding="utf-8"))
    labels = ["threshold", "random", "qnehvi", *(f"by {by}" for by in advised)]
    assert [arm["label"] for arm in result["arms"]] == labels
    first, final = ({arm["label"]: arm["checkpoints"][place] for arm in result["arms"]} for place in (0, -1))
    assert first["threshold"]["hypervolume"] > first["random"]["hypervolume"] > 0
    assert all(arm["hypervolume"] > 0 for arm in final.values())
    assert final["threshold"]["heldout_hypervolume"] > 0
    assert not (tmp_path / "empty").exists()


def test_what_was_not_recorded_is_refused(tmp_path: Path) -> None:
    problem = 'recorded = "problem-r-surrogate"\nobjectives = ["kl", "decode_latency"]\n'
    (tmp_path / "some.toml").write_text(f'strategies = ["random"]\n[problem]\n{problem}', encoding="utf-8")
    with pytest.raises(ConfigError, match="does not know decode_latency: expected some of kl, loss, params"):
        read_config(tmp_path / "some.toml")


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
