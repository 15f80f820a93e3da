"""Formulas by a language model: what a prompt tells, that each is measured once and for what it is, what is refused, and what judges."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.evolve_formula import __main__ as evolve
from experiments.evolve_formula import control as tuning
from experiments.evolve_formula.scores import SHARES, Bench
from experiments.recipe_quality import Members
from llmbo.comparison.config import read_config
from llmbo.models.loading import load_model

Evolve = Callable[..., None]
NOTHING, CHANGED = ({"formula": "is_mlp * depth", "coefficient": by, "why": f"by {by}"} for by in (0.0, 1.0))
REFUSED = [
    {"formula": "depth.__class__", "coefficient": 0.5},
    {"formula": "width", "coefficient": 0.5},
    {"formula": "depth", "coefficient": 7},
    {"formula": "depth"},
    "depth",
]
SCORE = ("score", "--by", "nobody, today")


@pytest.fixture
def config(tmp_path: Path, model_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a comparison on a tiny llama."""
    monkeypatch.setenv("LLMBO_PREPARED", str(tmp_path / "prepared"))
    file = tmp_path / "tiny.toml"
    file.write_text(
        f'strategies = ["qnehvi"]\n[problem]\nmodel = "{model_folder}"\ntext = "text:{text_file}"\nwindow = 16\n'
        'calibration_tokens = 128\nproxy_tokens = 64\nheldout_tokens = 64\ndtype = "float32"\ndevice = "cpu"\n'
    )
    return file


@pytest.fixture
def evolution(config: Path, tmp_path: Path) -> Evolve:
    """The command, with its results in `tmp_path`."""
    return lambda *words: evolve.main([*words, "--config", str(config), "--out", str(tmp_path)])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever members are measured."""
    calls, of = list[int](), Members.of

    def counted(*args: Any) -> Members:
        calls.append(1)
        return of(*args)

    monkeypatch.setattr(Members, "of", counted)
    return calls


def stored(folder: Path, name: str = "formulas") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


def reply(folder: Path, round: int, *formulas: Any) -> None:
    (folder / f"{round}.json").write_text(f"Here: {json.dumps({'formulas': formulas})}")


def test_each_formula_is_measured_once_and_for_what_it_is(
    evolution: Evolve, tmp_path: Path, measured: list[int]
) -> None:
    """At 0 it is the path itself. A command that was stopped goes on, and what it measures anew has the same values."""
    evolution("ask")
    assert "Nothing has been tried yet" in (tmp_path / "1.md").read_text()
    reply(tmp_path, 1, NOTHING, CHANGED, *REFUSED)
    evolution(*SCORE)
    first = stored(tmp_path)
    nothing, changed, *refused = first["entries"].values()
    assert nothing["log_ratios"] == [0.0] * len(SHARES) and nothing["score"] == nothing["error"] == 0
    assert changed["score"] == pytest.approx(sum(changed["log_ratios"]) / len(SHARES)) and changed["score"] != 0
    assert changed["kl"] != nothing["kl"] and changed["by"] == "nobody, today" and len(changed["prompt"]) == 16
    reasons = [entry["refused"] for entry in refused]
    assert all("score" not in entry for entry in refused) and len(reasons) == len(REFUSED)
    for part, reason in zip(
        ("not in the language", "width", "less than", "required", "dictionary"), reasons, strict=True
    ):
        assert part in reason

    again = (tmp_path / "2.md").read_text()
    assert "by 1.0" in again and "by 0.0" in again and reasons[0] in again
    assert (again.index("by 1.0") < again.index("by 0.0")) == (changed["score"] < 0)

    kept = first["entries"] | {}
    del kept["1.2"]
    (tmp_path / "formulas.json").write_text(json.dumps(first | {"entries": kept}))
    measured.clear()
    evolution(*SCORE)
    assert len(measured) == 2 and stored(tmp_path)["entries"] == first["entries"]  # the path, and what was missing


def test_the_best_of_either_kind_are_judged_along_paths_of_their_own(
    evolution: Evolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many recipes as formulas, by chance and by the process; a formula that changes nothing is the path on the other text, too."""
    monkeypatch.setattr(tuning, "RANDOM", 2)
    evolution("ask")
    reply(tmp_path, 1, NOTHING, NOTHING, {**NOTHING, "why": "once more"}, *REFUSED)
    evolution(*SCORE)
    evolution("control")
    recipes = list(stored(tmp_path, "recipes")["entries"].values())
    assert len(recipes) == 3 and len({json.dumps(entry["recipe"]) for entry in recipes}) == 3
    evolution("judge", "--on", "builtin")
    judged = stored(tmp_path, "judged")["entries"]
    assert [*judged] == [f"builtin {name}" for name in ("path", "formula", "recipe")]
    path, formula, recipe = judged.values()
    assert len(path["kl"]) == len(path["shares"]) == 8 and {len(row) for row in path["kl"]} == {4}
    assert formula == path and recipe["kl"] != path["kl"]
    *_, formula_row, recipe_row, between = capsys.readouterr().out.splitlines()
    assert "formula over path" in formula_row and formula_row.endswith("1.000 (1.000 to 1.000)")
    assert "recipe over path" in recipe_row and "formula over recipe" in between


def test_the_process_believes_what_was_measured_and_asks_for_something_else(config: Path) -> None:
    """Scores of what was tried are predicted about as they were, and more surely than those of a recipe far from them."""
    problem = read_config(config).arms[0].problem
    with Bench.opened(problem, load_model(problem.run.model, problem.run.dtype, problem.run.device)) as bench:
        kl = torch.tensor([[1.2], [0.8], [0.3]], dtype=torch.float64)
        bench = replace(bench, reference=replace(bench.reference, kl=kl.expand(3, 4)))
        own = bench.family.recipe
        recipes = [replace(own, mlp_slope=slope, attention=-slope) for slope in (-1.0, -0.5, 0.8, 1.0)]
        tried = []
        for recipe, change in zip(recipes, (0.4, 0.2, -0.2, -0.3), strict=True):
            made = Members(
                bench.problem.space.share(bench.problem.prices.members_of(recipe, SHARES)), kl * math.exp(change)
            )
            tried.append(tuning.Tried(recipe, made.kl[:, 0].tolist(), float(made.log_ratios(bench.reference).mean())))
        far = replace(own, mlp_curve=1.0, attention_curve=-1.0, mlp_first=-1.5, mlp_last=1.5)
        mean, deviation = tuning.predicted(bench, tried, [*recipes, far])
        scores = torch.tensor([one.score for one in tried], dtype=torch.float64)
        assert (mean[:-1] - scores).abs().max() < 0.1 and scores.argsort().tolist() == mean[:-1].argsort().tolist()
        assert deviation[-1] > deviation[:-1].max() > 0
        assert tuning.next_recipe(bench, tried * 2) not in recipes


def test_what_its_user_can_mend_is_one_line(
    evolution: Evolve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            evolution(*words)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "1.json" in told(*SCORE) and "ask first" not in told("score")
    reply(tmp_path, 1, CHANGED)
    assert "1.md" in told(*SCORE)
    assert "No formula" in told("control")
    assert "0 formulas" in told("judge", "--on", "builtin")
    evolution("ask")
    (tmp_path / "1.md").write_text("?")
    evolution(*SCORE)
    assert "other settings" in told("ask", "--text", "builtin")


def test_pseudo_values_vary_as_the_mean_does() -> None:
    """Windows alike: all are the mean. A window that is worse than others raises its own most, and the reference's lowers it."""
    shares = torch.tensor([0.5, 0.8], dtype=torch.float64)
    kl = torch.tensor([[0.5], [0.2]], dtype=torch.float64).expand(2, 6).clone()
    path, better = Members(shares, kl), Members(shares, 0.9 * kl)
    alike = better.pseudo_values(path)
    torch.testing.assert_close(alike, better.log_ratios(path).mean().expand(6))
    assert alike[0] < 0
    worse = kl.clone()
    worse[:, 2] *= 1.5
    raised, lowered = Members(shares, worse).pseudo_values(path), path.pseudo_values(Members(shares, worse))
    assert raised.argmax() == lowered.argmin() == 2
    assert float(raised.mean()) == pytest.approx(float(Members(shares, worse).log_ratios(path).mean()), abs=0.01)
