"""What depends on the device is known: from tables while searching, measured on the finished front."""

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import active_children, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import PreTrainedModel
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.problem import hardware
from llmbo.problem.energy import energy_counter
from llmbo.problem.hardware import MAX_WIDTHS, measured_widths
from llmbo.problem.space import SearchSpace
from pruning import latency as blocks
from pruning.latency import Workload


@pytest.fixture
def times_follow_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine whose times are proportional to the number of parameters, and a cache of its own."""

    def run(model: PreTrainedModel, *others: object) -> dict[str, list[float]]:
        size = sum(parameter.numel() for parameter in model.parameters())
        return {"prefill": [1e-6 * size], "decode": [1e-7 * size] * 4}

    monkeypatch.setattr(blocks, "_run", run)
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def measured(*args: object) -> None:
            raise AssertionError("the table was measured again")

        monkeypatch.setattr(hardware, "measure_table", measured)

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
    for file in (tmp_path / "cache" / "profiles").iterdir():
        file.unlink()
    no_measuring()
    assert llmbo(budget=5, **options).exit_code == 0  # the run keeps its table
    assert [t["objectives"] for t in llmbo.report()["trials"][:4]] == [t["objectives"] for t in report["trials"]]


@pytest.mark.usefixtures("times_follow_size")
def test_a_profile_is_measured_once_and_checked(model_folder: Path, no_measuring: Callable[[], None]) -> None:
    command = ["profile", "--model", str(model_folder), "--context", "16", "--check", "3", "--dtype", "float32"]
    command += ["--latency-target", "cpu", "--measure", "latency"]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    assert first.output.count("mean error 0.0%, rank correlation 1.000") == 2
    no_measuring()
    again = CliRunner().invoke(app, [*command, "--check", "0"])
    assert again.exit_code == 0, again.output
    assert isinstance(CliRunner().invoke(app, [*command, "--fresh"]).exception, AssertionError)
    assert isinstance(CliRunner().invoke(app, [*command, "--serve-batch", "2"]).exception, AssertionError)


def test_a_search_for_peak_memory_keeps_its_limit_and_measures_the_front(
    llmbo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))
    options = {"objectives": "kl,peak_memory", "context": 32, "serve_batch": 2}
    assert llmbo(budget=4, **options).exit_code == 0
    report = llmbo.report()
    for point in (report["dense"], *report["front"]):
        assert point["heldout"]["peak_memory"] == pytest.approx(point["objectives"]["peak_memory"], rel=0.1)
    limit = sorted(trial["objectives"]["peak_memory"] for trial in report["trials"])[1]
    result = llmbo(budget=4, fresh=True, max=f"peak_memory={limit}", **options)
    assert result.exit_code == 0, result.output
    assert all(trial["objectives"]["peak_memory"] <= limit for trial in llmbo.report()["trials"])


@pytest.fixture
def powercap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Two CPU packages whose counters stand in files as the kernel's do, 30 W and 20 W, one with memory of 5 W."""
    cpu = pytest.importorskip("zeus.device.cpu", reason="no zeus here (pip install 'llmbo[energy]')")
    rapl = importlib.import_module("zeus.device.cpu.rapl")
    watts = {"intel-rapl:0": 30.0, "intel-rapl:1": 20.0, "intel-rapl:0/intel-rapl:0:0": 5.0}
    root = tmp_path / "intel-rapl"
    for zone in watts:
        (root / zone).mkdir(parents=True)
        (root / zone / "name").write_text("dram" if zone.count("rapl") > 1 else "package-0")
        (root / zone / "max_energy_range_uj").write_text("262143328850")
        (root / zone / "energy_uj").write_text("0")
    read = rapl.RAPLFile.read

    def renewed(file: Any) -> float:
        zone = Path(file.path).relative_to(root).as_posix()
        with open(
            file.energy_uj_path, "r+"
        ) as counter:  # never empty: to begin a file anew takes the disk milliseconds
            counter.write(f"{int(1e6 * watts[zone] * time.monotonic()):018d}")
        return read(file)

    monkeypatch.setattr(rapl, "RAPL_DIR", str(root))
    forking = get_context("fork")  # what watches a counter would otherwise start as a new Python, for seconds
    monkeypatch.setattr(rapl, "mp", SimpleNamespace(get_context=lambda method: forking))
    monkeypatch.setattr(cpu, "_cpus", None)
    monkeypatch.setattr(rapl.RAPLFile, "read", renewed)
    rapl.rapl_is_available.cache_clear()
    before = set(active_children())
    yield
    for watching in (
        set(active_children()) - before
    ):  # a fork keeps open what was, a browser's end waits for its pipes to close
        watching.terminate()
        watching.join()
    rapl.rapl_is_available.cache_clear()


@pytest.mark.usefixtures("powercap")
def test_energy_is_power_times_time(
    llmbo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Zeus reads the counters; a machine that always draws 55 W spends on each token what it takes in time."""
    counter = energy_counter(torch.device("cpu"))
    first, start, then = time.monotonic(), counter(), time.monotonic()
    time.sleep(0.2)
    last, end, now = time.monotonic(), counter(), time.monotonic()
    assert 0.95 * 55 * (last - then) <= end - start <= 1.05 * 55 * (now - first)

    def run(model: PreTrainedModel, workload: Workload, clock: Callable[[], float]) -> dict[str, list[float]]:
        size = sum(parameter.numel() for parameter in model.parameters())
        unit = 0.0 * clock()  # joules come from the counter, which is asked
        return {"decode": [unit + 1e-7 * size]}

    monkeypatch.setattr(blocks, "_run", run)
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path / "cache"))
    result = llmbo(budget=4, objectives="kl,energy", context=16, serve_batch=2)
    assert result.exit_code == 0, result.output
    for point in (llmbo.report()["dense"], *llmbo.report()["front"]):
        assert point["objectives"]["energy"] == pytest.approx(1e-7 * point["objectives"]["params"] / 2, rel=1e-6)
        assert point["heldout"]["energy"] == pytest.approx(point["objectives"]["energy"], rel=1e-6)


def test_energy_without_counters_is_refused(llmbo: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    zeus = pytest.importorskip("zeus.device.cpu", reason="no zeus here (pip install 'llmbo[energy]')")
    monkeypatch.setattr(zeus, "rapl_is_available", lambda: False)
    monkeypatch.setattr(zeus, "_cpus", None)
    result = llmbo(objectives="kl,energy", context=16)
    assert result.exit_code == 2 and "RAPL" in result.stderr and "Traceback" not in result.stderr
    monkeypatch.setitem(sys.modules, "zeus.device", None)
    result = llmbo(objectives="kl,energy", context=16)
    assert result.exit_code == 2 and "llmbo[energy]" in result.stderr
    assert not list((llmbo.folder / "runs").rglob("*.db"))


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
