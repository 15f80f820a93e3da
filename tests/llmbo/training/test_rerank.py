"""A front before and after the same short training: laws of the comparison, and the command on a tiny run."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from llmbo.problem.texts import load_windows
from llmbo.training import rerank as reranking
from llmbo.training.plan import Plan
from llmbo.training.rerank import Orders, Point, Reranking
from pruning.calibration import TokenWindows

Rerank = Callable[..., Result]


def points(*losses: tuple[float, float]) -> Reranking:
    """Points of sizes 1, 2, .. with these losses before and after; KL is the loss less 1."""
    return Reranking(
        tuple(
            Point(10 + n, n + 1, {"loss": b, "kl": b - 1}, {"loss": a, "kl": a - 1}, 1)
            for n, (b, a) in enumerate(losses)
        )
    )


def test_equal_orders_agree_and_opposite_ones_disagree() -> None:
    assert Orders.of({1: 0.1, 2: 0.2, 3: 0.3}, {1: 5.0, 2: 6.0, 3: 7.0}) == Orders((1, 2, 3), (1, 2, 3), 1.0)
    assert Orders.of({1: 0.1, 2: 0.2, 3: 0.3}, {1: 7.0, 2: 6.0, 3: 5.0}) == Orders((1, 2, 3), (3, 2, 1), -1.0)
    assert Orders.of({1: 0.1, 2: 0.2, 3: 0.3}, {1: 5.0, 2: 7.0, 3: 6.0}).tau == pytest.approx(1 / 3)
    assert Orders.of({1: 0.1}, {1: 0.2}).tau is None and Orders.of({}, {}).tau is None
    assert Orders.of({1: 0.1, 2: 0.1}, {1: 0.1, 2: 0.2}).tau is None  # nothing to order


def test_at_equal_size_a_straight_front_has_no_better_points() -> None:
    straight = points((5, 3), (4, 2.5), (3, 2), (2, 1.5))
    for values in (straight.before, straight.after):
        assert straight.excess(values) == pytest.approx({11: 0.0, 12: 0.0})
    shifted = points((5, 3), (4, 2.2), (3, 2.3), (2, 1.5))
    assert shifted.excess(shifted.after)[11] == pytest.approx(2.2 - (3 + 2.3) / 2)
    assert shifted.excess(shifted.after)[12] == pytest.approx(2.3 - (2.2 + 1.5) / 2)
    assert shifted.orders["equal_size"].after == (11, 12)


def test_a_point_that_training_leaves_behind_is_off_the_front() -> None:
    found = points((5, 3.0), (4, 3.1), (3, 2.0))
    assert found.front(found.before) == [10, 11, 12] and found.front(found.after) == [10, 12]
    assert found.orders["loss"] == Orders((12, 11, 10), (12, 10, 11), pytest.approx(1 / 3))
    assert found.to_dict()["front"] == {"before": [10, 11, 12], "after": [10, 12]}


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    """The finished run in a working directory of one's own."""
    shutil.copytree(finished.folder / "runs" / "tiny", tmp_path / "runs" / "tiny")
    return tmp_path


@pytest.fixture
def rerank(copied: Path) -> Rerank:
    def call(run: str = "tiny", *words: object) -> Result:
        common = ("--steps", 4, "--batch", 2, "--heldout", 4, "--lr", "3e-3")
        given = [
            str(word)
            for word in (*words, *(w for i in range(0, 8, 2) if common[i] not in words for w in common[i : i + 2]))
        ]
        with chdir(copied):
            return CliRunner().invoke(app, ["rerank", run, *given], env={"COLUMNS": "200"})

    return call


def test_the_front_is_trained_and_compared(rerank: Rerank, copied: Path, finished: Any) -> None:
    result = rerank("tiny", "--top", 3)
    assert result.exit_code == 0, result.output
    file = copied / "runs" / "tiny" / "rerank.json"
    found = json.loads(file.read_text())
    front = [point["trial"] for point in finished.report()["front"]]
    trials = [point["trial"] for point in found["points"]]
    assert len(trials) == 3 and {front[0], front[-1]} <= set(trials) <= set(front)  # the smallest and the largest too
    sizes = {point["trial"]: point["objectives"]["params"] for point in finished.report()["front"]}
    for point in found["points"]:
        assert point["params"] == sizes[point["trial"]] and point["before"]["kl"] > 0
        assert point["after"] != point["before"] or point["step"] == 0
        for values in (point["before"], point["after"]):
            assert f"{values['loss']:.3f}" in result.stdout
    assert "Kendall's tau" in result.stdout
    assert not (copied / "runs" / "tiny" / "rerank").exists()  # no checkpoints are left
    again = rerank("tiny", "--top", 3)  # nothing is trained again
    assert again.stdout == result.stdout and json.loads(file.read_text()) == found


def test_it_trains_on_nothing_that_the_run_was_judged_by(
    rerank: Rerank, finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt: list[TokenWindows] = []
    loaded: list[Any] = []
    load_base, unseen_windows = reranking.load_base, reranking.unseen_windows

    def stop(*given: Any) -> TokenWindows:
        dealt.append(unseen_windows(*given))
        raise ConfigError("seen enough")

    def load(*given: Any) -> Any:
        loaded.append(load_base(*given))
        return loaded[-1]

    monkeypatch.setattr(reranking, "unseen_windows", stop)
    monkeypatch.setattr(reranking, "load_base", load)
    assert "seen enough" in rerank("tiny", "--top", 3).stderr
    ((model, _),) = loaded
    of_run = load_windows(RunConfig.from_settings(finished.report()["run"]["settings"]), model)
    trained, judged, ranked = (
        set(map(tuple, part.tolist())) for part in (dealt[0].calibration, of_run.heldout, of_run.calibration)
    )
    assert judged and not trained & judged and trained & ranked  # what it was ranked by may be trained on


def test_an_interrupted_comparison_goes_on_with_the_next_point(
    rerank: Rerank, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rerank("tiny", "--top", 3)
    file = copied / "runs" / "tiny" / "rerank.json"
    expected = json.loads(file.read_text())
    file.unlink()
    train, trained = reranking.train, []

    def second_is_interrupted(*args: Any, **options: Any) -> Any:
        trained.append(args[3].name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setattr(reranking, "train", second_is_interrupted)
    stopped = rerank("tiny", "--top", 3)
    assert stopped.exit_code == 130 and "goes on from" in stopped.stderr
    assert len(json.loads(file.read_text())["points"]) == 1
    result = rerank("tiny", "--top", 3)
    assert result.exit_code == 0 and result.stdout == whole.stdout
    assert len(trained) == 4 and trained[1] == trained[2]
    assert json.loads(file.read_text()) == expected


def test_halving_trains_the_better_half_to_where_it_would_have_ended(
    rerank: Rerank, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = rerank("tiny", "--top", 5, "--steps", 8)
    assert whole.exit_code == 0, whole.output
    file = copied / "runs" / "tiny" / "rerank.json"
    expected = {point["trial"]: point for point in json.loads(file.read_text())["points"]}
    assert rerank("tiny", "--top", 5, "--steps", 8, "--halving").exit_code == 2  # other settings
    file.unlink()
    train, untils = reranking.train, []

    def fifth_is_interrupted(*args: Any, until: int) -> Any:
        untils.append(until)
        if len(untils) == 5:
            raise KeyboardInterrupt
        return train(*args, until=until)

    monkeypatch.setattr(reranking, "train", fifth_is_interrupted)
    assert rerank("tiny", "--top", 5, "--steps", 8, "--halving").exit_code == 130
    halved = rerank("tiny", "--top", 5, "--steps", 8, "--halving")
    assert halved.exit_code == 0, halved.output
    count = len(expected)
    alive = [count, 2 + -(-(count - 2) // 2)]
    alive.append(2 + -(-(alive[1] - 2) // 2))
    assert untils == [2] * 4 + [2] * (count - 3) + [4] * alive[1] + [8] * alive[2]  # one of them twice
    found = json.loads(file.read_text())
    assert len(found["points"]) == alive[2] and len(found["left"]) == count - alive[2]
    assert "Left behind" in halved.stdout and not file.with_name("rerank").exists()
    entries = sorted((*found["points"], *found["left"]), key=lambda point: point["params"])
    firsts = Reranking(tuple(Point(**entry | {"rungs": tuple(entry["rungs"])}) for entry in entries))
    assert {p.trial for p in firsts.points if len(p.rungs) > 1} == reranking.survivors(firsts.points, 0)
    excess = firsts.excess([point.rungs[0] for point in firsts.points])
    stay, leave = (
        [excess[p.trial] for p in firsts.points if p.trial in excess and (len(p.rungs) > 1) == on]
        for on in (True, False)
    )
    assert max(stay) <= min(leave)
    ended = [point for point in found["points"] if point["step"] == expected[point["trial"]]["step"] == 8]
    assert ended
    for point in ended:
        assert (point["before"], point["after"]) == tuple(
            expected[point["trial"]][when] for when in ("before", "after")
        )


@pytest.mark.parametrize("halving", [False, True])
def test_a_training_that_fails_is_told_of_and_not_compared(
    rerank: Rerank, copied: Path, monkeypatch: pytest.MonkeyPatch, halving: bool
) -> None:
    words = ("--top", 4, "--steps", 8, *["--halving"] * halving)
    rate, train, trained, notes = Plan.lr_at, reranking.train, list[str](), list[Any]()

    def second_fails(*args: Any, **options: Any) -> Any:
        trained.append(args[3].name)
        notes.append(args[6])
        with monkeypatch.context() as patch:
            if len(trained) > 1 and args[3].name == trained[1]:
                patch.setattr(Plan, "lr_at", lambda plan, step: rate(plan, step) * (float("nan") if step else 1))
            return train(*args, **options)

    monkeypatch.setattr(reranking, "train", second_fails)
    result = rerank("tiny", *words)
    assert result.exit_code == 0, result.output
    failed = int(trained[1].removeprefix("trial-"))
    assert f"Trial {failed} is not compared: the loss is no longer a number between steps 0 and" in result.stdout
    found = json.loads((copied / "runs" / "tiny" / "rerank.json").read_text())
    assert [point["trial"] for point in found["failed"]] == [failed] and trained.count(trained[1]) == 1
    assert failed not in found["orders"]["loss"]["before"] and failed not in found["front"]["after"]
    assert len(found["points"]) + len(found["left"]) == 3 and len(found["points"]) >= 2
    assert all(note.__name__ == "note" for note in notes)  # what else a training has to tell is shown, too
    again = rerank("tiny", *words)
    assert again.stdout == result.stdout and trained.count(trained[1]) == 1


@pytest.mark.parametrize(
    ("run", "words", "says"),
    [
        ("nowhere", (), "There is no run 'nowhere'.*Known runs: tiny"),
        ("tiny", ("--top", 1), "--top must be at least 2.*got 1"),
        ("tiny", ("--lora", "--rank", 0), "--rank must be at least 1, got 0"),
        ("tiny", ("--steps", 0), "--steps must be at least 1"),
        ("tiny", ("--heldout", 0), "--heldout must be at least 1"),
        ("tiny", ("--text", "text:no.txt"), "no.txt"),
        ("tiny", ("--batch", 500), "tokens"),
        ("tiny", ("--heldout", 40), "holds 1200 tokens, at least 1536 are needed.*256 tokens that the search used"),
        ("tiny", ("--model", "/no/such/model"), "no model folder '/no/such/model'"),
    ],
)
def test_bad_input_is_one_line(rerank: Rerank, copied: Path, run: str, words: tuple[Any, ...], says: str) -> None:
    result = rerank(run, *words)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert re.search(says, line), line
    assert not (copied / "runs" / "tiny" / "rerank.json").exists()


def test_other_settings_and_damaged_files_are_refused(rerank: Rerank, copied: Path) -> None:
    file = copied / "runs" / "tiny" / "rerank.json"
    file.write_text(json.dumps({"settings": {}, "points": []}))
    assert "other settings" in rerank().stderr
    file.write_text("{")
    assert "damaged" in rerank().stderr
    report = copied / "runs" / "tiny" / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"front": []}))
    assert "has 0 points" in rerank().stderr
