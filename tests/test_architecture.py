"""The house stays in order, and what should be light is.

Who may import whom is checked by import-linter, whose contracts stand in `pyproject.toml`: `make test` runs `lint-imports`.
"""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "botorch", "gpytorch", "optuna", "matplotlib", "pydantic")
LONGEST = 350  # lines of a file; above that it has two jobs
FLOOR = 6  # files at the top level of `llmbo/`: a new one belongs in a room


@pytest.mark.parametrize("module", ["llmbo", "llmbo.cli", "llmbo.config", "pruning"])
def test_it_starts_without_heavy_libraries(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", ["llmbo", "pruning"])
def test_no_file_is_too_long(package: str) -> None:
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / package).rglob("*.py")}
    assert lines and {str(path.relative_to(ROOT)): n for path, n in lines.items() if n > LONGEST} == {}


def test_the_top_level_holds_rooms_and_little_else() -> None:
    assert 0 < len(list((ROOT / "llmbo").glob("*.py"))) <= FLOOR


@pytest.mark.parametrize(
    "folder",
    [p for package in ("llmbo", "pruning") for p in (ROOT / package).rglob("*") if p.is_dir() and any(p.glob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_every_room_says_what_it_is_for(folder: Path) -> None:
    if folder.name != "__pycache__":
        assert (folder / "__init__.py").read_text(encoding="utf-8").startswith('"""')


@pytest.mark.parametrize("package", ["llmbo", "pruning", "experiments"])
def test_every_load_says_whether_foreign_code_may_run(package: str) -> None:
    """Left out, `trust_remote_code` makes transformers ask on the terminal, where a blind "y" runs the code."""
    calls = [
        (path, call)
        for path in (ROOT / package).rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("from_pretrained", "from_config")
    ]
    silent = [
        f"{path.name}:{call.lineno}"
        for path, call in calls
        if not {"trust_remote_code", None} & {word.arg for word in call.keywords}  # None: **source
    ]
    assert calls and not silent


@pytest.mark.parametrize("module", sorted(p.parent.name for p in (ROOT / "experiments").glob("*/__main__.py")))
def test_every_benchmark_finds_what_it_imports(module: str) -> None:
    assert callable(importlib.import_module(f"experiments.{module}.__main__").main)
