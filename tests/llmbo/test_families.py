"""Every structure of decoders goes through the whole command."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PersimmonConfig, PreTrainedModel, PreTrainedTokenizerFast

from llmbo.models import loading as models
from pruning.families import FAMILIES

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "families.md"


@pytest.fixture
def saved(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[PreTrainedModel], Path]:
    """Any tiny model -> its folder, with a tokenizer of our words."""

    def save(model: PreTrainedModel) -> Path:
        # For a Qwen2 model AutoTokenizer takes Qwen2's own tokenizer, whatever the folder says, and it has no words of ours.
        monkeypatch.setattr(models, "AutoTokenizer", PreTrainedTokenizerFast)
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        model.save_pretrained(folder)
        return folder

    return save


def check(llmbo: Any, model: PreTrainedModel, folder: Path) -> None:
    result = llmbo(model=folder, budget=4)
    assert result.exit_code == 0, result.output
    report = llmbo.report()
    assert report["model"]["model_type"] == model.config.model_type
    assert report["model"]["params"] == model.num_parameters()
    assert [trial["state"] for trial in report["trials"]] == ["complete"] * 4
    assert report["front"] and all(point["heldout"]["kl"] > 0 for point in report["front"])


def test_every_family_is_optimized(
    llmbo: Any, family_model: PreTrainedModel, saved: Callable[[PreTrainedModel], Path]
) -> None:
    model = family_model.float()
    check(llmbo, model, saved(model))


def test_no_family_is_left_out(tested_families: set[str]) -> None:
    assert tested_families == set(FAMILIES)


def tiny_persimmon() -> PreTrainedModel:
    config = PersimmonConfig(
        vocab_size=97, hidden_size=32, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def example() -> tuple[str, str]:
    """Entry points and code of the package in the documentation."""
    toml, code = re.findall(r"```(?:toml|python)\n(.+?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    point = re.search(r"^persimmon = \"(.+)\"$", toml, flags=re.MULTILINE)
    assert point
    return f"[llmbo.families]\npersimmon = {point[1]}\n", code


def test_the_documented_plugin_is_optimized(
    llmbo: Any, saved: Callable[[PreTrainedModel], Path], install: Callable[..., None]
) -> None:
    model = tiny_persimmon()
    folder = saved(model)
    refused = llmbo(model=folder, budget=4)
    assert refused.exit_code == 2 and "'persimmon' is not supported" in refused.output
    points, code = example()
    install("my_package", code, points)
    check(llmbo, model, folder)


def test_a_broken_plugin_is_refused_in_one_line_and_disturbs_no_other_model(
    llmbo: Any, saved: Callable[[PreTrainedModel], Path], install: Callable[..., None]
) -> None:
    install("my_package", "", "[llmbo.families]\npersimmon = my_package:GONE\n")
    result = llmbo(model=saved(tiny_persimmon()), budget=4, name="refused")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert (
        "error: Cannot use 'persimmon = my_package:GONE' of the package 'my_package'" in result.output.splitlines()[-1]
    )
    assert llmbo(budget=4).exit_code == 0
