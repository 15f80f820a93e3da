"""The benchmark of the refits runs from end to end, goes on where it was, and takes figures of another order of units for none."""

import json
import sys
from pathlib import Path

import pytest
import torch

from experiments.refit_quality import __main__ as benchmark


def test_every_step_is_measured_once_and_what_another_order_gave_is_measured_anew(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def figures(*words: str) -> dict[str, dict[str, float | str]]:
        monkeypatch.setattr(sys, "argv", ["refit_quality", *flags, *words])
        benchmark.main()
        return json.loads(out.read_text())["figures"]  # type: ignore[no-any-return]

    out = tmp_path / "figures.json"
    flags = [
        "--model",
        f"{model_folder}",
        "--dtype",
        "float32",
        "--text",
        f"text:{text_file}",
        "--out",
        f"{out}",
        "--seeds",
        "2",
    ]
    flags += ["--shares", "0.8,0.65", "--judged", "4"]
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmark, "WINDOW", 16)
    monkeypatch.setattr(benchmark, "TOKENS", 128)
    steps = {name: step._replace(tokens=step.tokens // 128) for name, step in benchmark.STEPS.items()}
    monkeypatch.setattr(benchmark, "STEPS", steps)
    first = figures()
    assert list(benchmark.STEPS) == ["first version", "ridge", "order", "tokens", "sequence"]
    assert first.keys() == {
        f"{seed}/{share}/{step}" for seed in "01" for share in (0.8, 0.65) for step in benchmark.STEPS
    }
    assert all(
        len({first[f"0/0.65/{step}"]["kl"] for step in pair}) == 2
        for pair in (("ridge", "order"), ("tokens", "sequence"))
    )
    stored = json.loads(out.read_text())
    for figure in stored["figures"].values():  # as they were before there was another order
        del figure["order"]
    out.write_text(json.dumps(stored))
    capsys.readouterr()
    assert figures("--show").keys() == first.keys()
    assert capsys.readouterr().out.splitlines()[2].count("| -") == 3
    again = figures()
    assert sum(figure.get("order") == "surgeon" for figure in again.values()) == 12
    assert {key: figure["kl"] for key, figure in again.items()} == {key: figure["kl"] for key, figure in first.items()}
    assert {key.split("/")[2] for key, figure in again.items() if "order" not in figure} == {"first version", "ridge"}


def test_a_curve_is_measured_and_drawn(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines through the mean of the seeds, tokens on the axis; the same figures give the same picture."""
    out, picture = tmp_path / "curve.json", tmp_path / "curve.svg"
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmark, "WINDOW", 16)
    monkeypatch.setattr(benchmark, "TOKENS", 128)
    monkeypatch.setattr(benchmark, "STEPS", dict(benchmark.STEPS))
    where = ["--model", f"{model_folder}", "--text", f"text:{text_file}", "--out", f"{out}", "--picture", f"{picture}"]
    flags = [*where, "--seeds", "2", "--shares", "0.65", "--judged", "4", "--curve", "64,1024"]
    drawn = []
    for words in ((), ("--show",)):
        monkeypatch.setattr(sys, "argv", ["refit_quality", *flags, *words])
        benchmark.main()
        drawn.append(picture.read_bytes())
    figures = json.loads(out.read_text())["figures"]
    assert figures.keys() == {
        f"{seed}/0.65/{kind} {tokens}" for seed in "01" for kind in ("table", "sequence") for tokens in (64, 1024)
    }
    assert drawn[0] == drawn[1] and all(
        text in drawn[0] for text in (b">1,024<", b">0.65 of the blocks, table<", b">0.65 of the blocks, in sequence<")
    )
    figures["0/0.65/table 64"]["kl"] += 1
    assert benchmark.drawn({"figures": figures}) != drawn[0]


def test_every_base_is_a_table_of_its_own_and_built_in_text_takes_the_place_of_own(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bases.json"
    monkeypatch.setenv("LLMBO_CACHE", str(tmp_path))
    monkeypatch.setattr(benchmark, "WINDOW", 16)
    monkeypatch.setattr(benchmark, "TOKENS", 128)
    monkeypatch.setattr(benchmark, "STEPS", dict(benchmark.STEPS))
    where = ["--model", f"{model_folder}", "--dtype", "float32", "--text", f"text:{text_file}", "--out", f"{out}"]
    monkeypatch.setattr(
        sys, "argv", ["refit_quality", *where, "--bases", "--seeds", "1", "--shares", "0.5", "--judged", "4"]
    )
    benchmark.main()
    kls = {key.split("/")[2]: one["kl"] for key, one in json.loads(out.read_text())["figures"].items()}
    assert list(kls) == list(dict(benchmark.bases())) and len(set(kls.values())) == len(kls)
    own, builtin = torch.zeros(8, 16), torch.ones(8, 16)
    parts = {name: benchmark.calibration_of(step, own, builtin)[:, 0].tolist() for name, step in benchmark.bases()}
    assert parts["base"] == 8 * [0]
    assert parts["1 in 4 built-in"] == 6 * [0] + 2 * [1]
    assert parts["built-in beside"] == 8 * [0] + 8 * [1]
