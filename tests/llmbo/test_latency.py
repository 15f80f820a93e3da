"""Latency is a known objective: summed from a table while searching, measured on the finished front."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmbo import latency
from llmbo.cli import app
from llmbo.latency import MAX_WIDTHS, measured_widths
from llmbo.space import SearchSpace
from pruning import latency as blocks


@pytest.fixture
def times_follow_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose times are proportional to the number of parameters, and a cache of its own."""

    def run(model: PreTrainedModel, *others: object) -> tuple[float, float]:
        size = sum(parameter.numel() for parameter in model.parameters())
        return 1e-6 * size, 1e-7 * size

    monkeypatch.setattr(blocks, "_run", run)
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def measured(*args: object) -> None:
            raise AssertionError("the table was measured again")

        monkeypatch.setattr(latency, "measure_table", measured)

    return forbid


@pytest.mark.usefixtures("times_follow_size")
def test_a_search_sums_latency_and_measures_the_front(llmbo: Callable[..., Result], no_measuring: Callable[[], None],
    tmp_path: Path) -> None:  # fmt: skip
    options = {"objectives": "kl,decode_latency", "context": 16, "serve_batch": 2}
    result = llmbo(budget=4, **options)
    assert result.exit_code == 0, result.output
    report = llmbo.report()
    for point in (report["dense"], *report["front"]):
        assert point["objectives"]["decode_latency"] == pytest.approx(1e-4 * point["objectives"]["params"], rel=1e-6)
        assert point["heldout"]["decode_latency"] == pytest.approx(point["objectives"]["decode_latency"], rel=1e-6)
    for file in (tmp_path / "cache" / "latency").iterdir():
        file.unlink()
    no_measuring()
    assert llmbo(budget=5, **options).exit_code == 0  # the run keeps its table
    assert [t["objectives"] for t in llmbo.report()["trials"][:4]] == [t["objectives"] for t in report["trials"]]


@pytest.mark.usefixtures("times_follow_size")
def test_a_profile_is_measured_once_and_checked(model_folder: Path, no_measuring: Callable[[], None]) -> None:
    command = ["profile", "--model", str(model_folder), "--context", "16", "--check", "3", "--dtype", "float32"]
    command += ["--latency-target", "cpu"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert first.output.count("mean error 0.0%, rank correlation 1.000") == 2
    no_measuring()
    again = CliRunner().invoke(app, [*command, "--check", "0"])
    assert again.exit_code == 0, again.output
    assert isinstance(CliRunner().invoke(app, [*command, "--fresh"]).exception, AssertionError)
    assert isinstance(CliRunner().invoke(app, [*command, "--serve-batch", "2"]).exception, AssertionError)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"context": 60}, "64 positions"),
        pytest.param(
            {"context": 16, "latency_target": "cuda"}, "'cuda' cannot be used here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ({"context": 16, "latency_target": "toaster"}, "'toaster'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("times_follow_size")
def test_what_cannot_be_measured_is_refused(
    llmbo: Callable[..., Result], options: dict[str, object], expected: str
) -> None:
    result = llmbo(objectives="kl,prefill_latency", **options)
    assert result.exit_code == 2
    assert expected in result.stderr and "Traceback" not in result.stderr
    with contextlib.suppress(FileNotFoundError):
        assert not list((llmbo.folder / "runs" / "tiny").iterdir())


def test_many_widths_are_thinned_out(make_space: Callable[..., SearchSpace]) -> None:
    space = make_space(neurons=100, neuron_step=1)
    found = measured_widths(space)["mlp"]
    assert len(found) == MAX_WIDTHS + 1 and found[0] == 0 and found[-1] == 100
    assert measured_widths(space)["attention"] == [0, 1, 2]
