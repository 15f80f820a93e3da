"""Accuracy on multiple-choice items is maximised, on one half of the file; the front is judged on the other."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result


@pytest.fixture
def items(tmp_path: Path) -> Path:
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(60)}" for _ in range(n))

    rows = [
        {"question": words(5), "choices": [words(1), words(2), words(2)], "answer": rng.randrange(3)} for _ in range(40)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_a_search_maximises_accuracy(llmbo: Callable[..., Result], items: Path) -> None:
    options = {"objectives": "accuracy,params_share", "items": items, "reference_point": "0.01,1"}
    result = llmbo(budget=14, **options)
    assert result.exit_code == 0, result.output
    report = llmbo.report()
    assert [part["direction"] for part in report["objectives"]] == ["maximize", "minimize"]
    front = sorted(report["front"], key=lambda point: point["objectives"]["params_share"])
    found = [point["objectives"]["accuracy"] for point in front]
    assert found == sorted(set(found)) and all(round(20 * value, 9).is_integer() for value in found)
    assert any(point["heldout"]["accuracy"] != point["objectives"]["accuracy"] for point in front)  # other items
    items.write_text(items.read_text().replace('"answer": 0', '"answer": 1'), encoding="utf-8")
    again = llmbo(budget=15, **options)
    assert again.exit_code == 2 and "items" in again.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"objectives": "accuracy,params"}, "needs --items FILE"),
        ({"items": "none.jsonl"}, "Cannot read the items in 'none.jsonl'"),
        ({"items": ["last.jsonl", "b/last.jsonl"]}, "its column would be called 'last', as that of last.jsonl: rename one"),
        ({"objectives": "accuracy,params", "items": "last.jsonl"}, "--items last.jsonl has last words, which no objective counts"),
        ({"objectives": "accuracy,params", "items": "none.jsonl"}, "Cannot read the items in 'none.jsonl'"),
        ({"objectives": "accuracy,params", "items": "x.jsonl", "maximum": None, "max": "accuracy=0.5"}, "more accuracy is better"),
    ],
)  # fmt: skip
def test_items_that_do_not_fit_are_refused(
    llmbo: Callable[..., Result], options: dict[str, object], expected: str
) -> None:
    for file in ("last.jsonl", "b/last.jsonl"):
        (llmbo.folder / file).parent.mkdir(exist_ok=True)
        (llmbo.folder / file).write_text('{"context": "w1 w2", "continuation": " w3"}')
    result = llmbo(**options)
    assert result.exit_code == 2 and expected in result.stderr
    assert not (llmbo.folder / "runs").exists()
