"""The house stays in order, and the command line starts without the heavy libraries.

Who may import whom is checked by import-linter, whose contracts stand in `pyproject.toml`: `make test` runs `lint-imports`.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "botorch", "gpytorch", "optuna", "matplotlib", "pydantic")


@pytest.mark.parametrize("module", ["llmbo.cli"])
def test_it_starts_without_heavy_libraries(module: str) -> None:
    program = f"import sys, {module}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
