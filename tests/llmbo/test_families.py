"""Every supported kind of decoder goes through the whole command, and the documentation lists exactly these."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from llmbo.models import loading as models
from pruning.families import FAMILIES

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
NAMES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "gpt2", "opt")


@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_optimized(
    llmbo: Any,
    build: Callable[[str], PreTrainedModel],
    model_folder: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # For a Qwen2 model AutoTokenizer takes Qwen2's own tokenizer, whatever the folder says, and it has no words of ours.
    monkeypatch.setattr(models, "AutoTokenizer", PreTrainedTokenizerFast)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model = build(name).float()
    model.save_pretrained(folder)
    result = llmbo(model=folder, budget=4)
    assert result.exit_code == 0, result.output
    report = llmbo.report()
    assert report["model"]["model_type"] == model.config.model_type
    assert report["model"]["params"] == model.num_parameters()
    assert [trial["state"] for trial in report["trials"]] == ["complete"] * 4
    assert report["front"] and all(point["heldout"]["kl"] > 0 for point in report["front"])


def test_no_family_is_left_out(build: Callable[[str], PreTrainedModel]) -> None:
    assert {build(name).config.model_type for name in NAMES} == set(FAMILIES)


def test_the_documentation_lists_the_supported_families() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert rows == [(family.model_type, family.models) for family in FAMILIES.values()]
