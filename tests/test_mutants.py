"""The kept list of faults (`make mutants`) stays in step with the code: planting and finding them takes minutes and is not done here."""

import ast
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS: dict[str, Any] = runpy.run_path(str(ROOT / "experiments" / "mutants" / "__main__.py"))


def test_every_kept_fault_can_be_planted() -> None:
    """Its line stands just once in its file, its tests are there, and what comes out is Python."""
    kept = MUTANTS["kept"]()
    assert len({(mutant.file, mutant.source) for mutant in kept}) == len(kept) == 24
    for mutant in kept:
        assert ast.dump(ast.parse(mutant.source)) != ast.dump(
            ast.parse((ROOT / mutant.file).read_text(encoding="utf-8"))
        )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"before": "no such line"}, "holds this line 0 times"),
        ({"before": "@pytest.fixture", "file": "tests/conftest.py"}, r"holds this line \d\d times"),
        ({"tests": ["tests/test_nothing.py::test_it"]}, "there is no tests/test_nothing.py"),
    ],
)
def test_a_list_that_is_out_of_step_is_refused(row: dict[str, Any], expected: str) -> None:
    sound = {
        "name": "x",
        "file": "tests/test_mutants.py",
        "before": "import runpy",
        "after": "",
        "tests": ["tests/test_mutants.py"],
    }
    with pytest.raises(ValueError, match=expected):
        MUTANTS["_planted"](**sound | row)


def test_core_files_and_their_tests_are_there() -> None:
    missing = [file for file in MUTANTS["CORE"] if not (ROOT / file).is_file()]
    missing += [test for tests in MUTANTS["CORE"].values() for test in tests if not (ROOT / "tests" / test).is_file()]
    assert not missing
