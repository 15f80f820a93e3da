"""Points of the finished front are refitted in sequence: once, in columns of their own, which exports can be cut for."""

import json
import re
import shutil
import signal
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import llmbo
from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.models.loading import load_model
from llmbo.problem import sequence
from llmbo.problem.sequence import least_tokens
from llmbo.problem.texts import load_windows
from llmbo.run.rebuild import architecture_of
from pruning.architecture import Architecture
from pruning.export import load_pruned
from pruning.likelihood import quality
from pruning.sequential import SequentialRefits, sequential_refit

TOKENS = 192  # the tiny llama's output projections have up to 32 columns
KEPT = "prepared/sequential_*.safetensors"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every refit in sequence that begins its number; the one whose number is put in first is interrupted."""
    begun: list[int] = []

    def counted(*words: Any, **options: Any) -> SequentialRefits:
        begun.append(len(begun))
        if begun[0] == -len(begun):
            raise KeyboardInterrupt
        return sequential_refit(*words, **options)

    monkeypatch.setattr(sequence, "sequential_refit", counted)
    return begun


@pytest.fixture(scope="module")
def refitted(tmp_path_factory: pytest.TempPathFactory, make_llmbo: Any) -> Any:
    """A finished run with three refitted points, of one go. Read it only."""
    made = make_llmbo(tmp_path_factory.mktemp("refitted"))
    flags = {"calibration_tokens": TOKENS, "budget": 8, "refit_anchors": 2}
    text = made.defaults["text"]  # has windows left that the search has not seen
    made = replace(made, defaults={**made.defaults, **flags, "heldout_text": text})
    done = made(refit_front=3)
    assert done.exit_code == 0, done.output
    assert "refitted" in done.stdout and "refits in sequence: " in done.stderr
    return made


def points(report: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The refitted ones by trial."""
    return {point["trial"]: point["refitted"] for point in report["front"] if point["refitted"]}


def export(folder: Path, trial: int, out: Path, *words: str) -> Result:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(folder):
            flags = ["--trial", str(trial), "--format", "hf", "--out", str(out), *words]
            return CliRunner().invoke(app, ["export", "tiny", *flags])
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_goes_on_where_it_was_stopped_and_measures_what_one_go_does(
    refitted: Any, tmp_path: Path, fits: list[int]
) -> None:
    run = replace(refitted, folder=tmp_path)
    assert run().exit_code == 0 and not points(run.report())
    plain = run.report()
    spent = run()
    assert spent.exit_code == 2 and "Raise --budget or --refit-front" in spent.stderr

    fits.append(-3)  # the second
    stopped = run(refit_front=2)
    assert stopped.exit_code == 130 and len(fits) == 3, stopped.output
    assert len(points(run.report())) == 1 and run.report()["run"]["status"] == "interrupted"
    fits[0] = 0
    assert run(refit_front=2).exit_code == 0 and len(fits) == 4
    front = [point["trial"] for point in plain["front"]]
    assert list(points(run.report())) == [front[0], front[-1]]
    assert run(refit_front=3).exit_code == 0 and len(fits) == 5
    assert run(refit_front=3).exit_code == 2 and len(fits) == 5

    whole, report = refitted.report(), run.report()
    assert points(report) == points(whole) and len(points(whole)) == 3 < len(front)
    assert [{**point, "refitted": None} for point in report["front"]] == plain["front"]
    for trial, found in points(report).items():
        point = next(point for point in report["front"] if point["trial"] == trial)
        for part in ("objectives", "heldout", "elsewhere"):
            assert found[part]["params"] == point[part]["params"] and found[part]["kl"] != point[part]["kl"]
        for field in ("noise", "noise_elsewhere"):
            assert found[field]["windows"] == point[field]["windows"]
            assert set(found[field]["not_better_than"]) < points(report).keys()
            assert 0 < found[field]["kl"] != point[field]["kl"] > 0


def test_an_exports_logits_measure_the_column_that_it_names(refitted: Any, tmp_path: Path) -> None:
    shutil.copytree(refitted.folder / "runs" / "tiny", tmp_path / "runs" / "tiny")
    report = refitted.report()
    config = RunConfig.from_settings(report["run"]["settings"], name="tiny")
    windows = load_windows(config, load_model(config.model, "float32", "cpu"))
    point = report["front"][0]
    expected = {"": ("sequential", point["refitted"]), "table": ("table", point)}
    for asked, (name, column) in expected.items():
        out = tmp_path / name
        done = export(tmp_path, point["trial"], out, *(["--refit", asked] if asked else []))
        assert done.exit_code == 0 and f"Refits: {name}." in done.stdout, done.output
        model, told = load_pruned(out), json.loads((out / "llmbo.json").read_text())
        assert told["refit"] == name and told["heldout"] == column["heldout"]
        assert told["objectives"] == column["objectives"] and told["elsewhere"] == column["elsewhere"]
        assert quality(model, windows.proxy).loss == pytest.approx(column["objectives"]["loss"], abs=1e-4)
        assert quality(model, windows.heldout).loss == pytest.approx(column["heldout"]["loss"], abs=1e-4)
        card = (out / "README.md").read_text()
        assert f"--refit {name}" in card and f"{column['heldout']['loss']:.3f}" in card

    # Worked out on demand, once, and the same as what the run works out for itself.
    other = next(entry["trial"] for entry in report["front"] if not entry["refitted"])
    run = llmbo.load_run(tmp_path / "runs" / "tiny", show="nothing")
    assert run._rebuilt().kept
    before = len(list(run.folder.glob(KEPT)))
    model = run.model(other, refit="sequential")
    assert len(list(run.folder.glob(KEPT))) == before + 1
    done = export(tmp_path, other, tmp_path / "demanded", "--refit", "sequential")
    assert done.exit_code == 0 and len(list(run.folder.glob(KEPT))) == before + 1, done.output
    told = json.loads((tmp_path / "demanded" / "llmbo.json").read_text())
    assert told["objectives"]["loss"] == pytest.approx(quality(model, windows.proxy).loss, abs=1e-5)
    assert told["heldout"] is None and told["objectives"]["kl"] != run.report.trials[other].objectives.kl
    text = torch.tensor([[1, 5, 9, 3]])
    logits = {refit: run.model(other, refit)(text).logits for refit in ("", "table", "sequential")}
    assert torch.equal(logits[""], logits["table"]) and torch.equal(logits["sequential"], model(text).logits)

    # Weights that were lost are fitted again, and must measure what the run did.
    shutil.rmtree(run.folder / "prepared")
    path = run.folder / "report.json"
    again = llmbo.load_run(run.folder, show="nothing").model(point["trial"])
    assert quality(again, windows.proxy).loss == pytest.approx(point["refitted"]["objectives"]["loss"], abs=1e-4)
    anchors = list(map(Architecture.from_dict, report["run"]["recipe"]["refit_members"]))
    assert len({anchor.digest for anchor in anchors}) == 2
    assert len(list(run.folder.glob("prepared/at_*.safetensors"))) == 2 * len(anchors[0].neurons)
    run = llmbo.load_run(run.folder, show="nothing")
    refits = run._rebuilt().refits
    taken = {trial.number: refits.serving(architecture_of(trial)) for trial in run.report.trials}
    assert len(set(map(id, taken.values()))) == 3  # the dense model's, too
    for number in {id(table): number for number, table in taken.items()}.values():
        again = run.model(number, "table")
        assert quality(again, windows.proxy).loss == pytest.approx(run.report.trials[number].objectives.loss, abs=1e-4)
    shutil.rmtree(run.folder / "prepared")
    report["front"][0]["refitted"]["objectives"]["loss"] += 1
    path.write_text(json.dumps(report))
    wrong = export(tmp_path, point["trial"], tmp_path / "wrong")
    assert wrong.exit_code == 2 and "rebuilt model's proxy loss is" in wrong.stderr


def test_tables_have_columns_of_their_own(refitted: Any, tmp_path: Path) -> None:
    with chdir(refitted.folder):
        for format in ("csv", "md"):
            out = str(tmp_path / format)
            assert CliRunner().invoke(app, ["report", "tiny", "--format", format, "--out", out]).exit_code == 0
    head, *rows = (line.split("|") for line in (tmp_path / "md").read_text().splitlines())
    at = next(place for place, name in enumerate(head) if name.strip().startswith("refitted held-out kl"))
    report = refitted.report()
    shown = {row[1].strip(): row[at].strip() for row in rows[1:]}
    for point in report["front"]:
        expected = f"{point['refitted']['heldout']['kl']:.4g}" if point["refitted"] else "–"
        assert shown[str(point["trial"])] == expected
    heading = (tmp_path / "csv").read_text().splitlines()[0].split(",")
    assert {f"refitted_{part}_kl" for part in ("objectives", "heldout", "elsewhere")} <= set(heading)
    assert "refitted_heldout_params" not in heading
    frame = llmbo.load_run(refitted.folder / "runs" / "tiny", show="nothing").to_dataframe()
    assert frame["refitted_heldout_kl"].notna().sum() == 3 and "refitted_heldout_params" not in frame


def test_too_little_text_is_refused_before_anything_is_loaded(finished: Any, refitted: Any, tmp_path: Path) -> None:
    front = finished.report()["front"][0]["trial"]  # of a run with 128 tokens
    for asked, says in {
        "sequential": "--refit sequential needs at least 160 calibration tokens.*there are 128.*search with --calibration-tokens 160",
        "best": "--refit.*best.*sequential, table",
    }.items():
        said = export(finished.folder, front, tmp_path / "out", "--refit", asked)
        assert said.exit_code == 2 and re.search(says, said.stderr), said.stderr
        assert not (tmp_path / "out").exists()
    run = replace(refitted, folder=tmp_path)
    for plan, flag in ((None, "refit_front"), (True, "refit_front"), (None, "refit_anchors"), (True, "refit_anchors")):
        said = run(**{"refit_anchors": 0, flag: 1}, calibration_tokens=128, window=24, plan=plan)
        told = f"--{flag.replace('_', '-')}"
        assert said.exit_code == 2 and f"{told} needs at least 160 calibration tokens" in said.stderr
        assert f"Set --calibration-tokens 168, or leave {told} out." in said.stderr  # whole windows
    said = run(refit_anchors=1, no_compensation=True)
    assert said.exit_code == 2 and "--refit-anchors 1 asks for refits: leave out --no-compensation" in said.stderr
    assert not list(tmp_path.iterdir())


def test_the_least_text_of_the_demos_model() -> None:
    class Sizes:
        intermediate_size, num_attention_heads, head_dim = 1536, 9, 64

    assert least_tokens(Sizes()) <= 8192  # type: ignore[arg-type]
