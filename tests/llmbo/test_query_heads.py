"""A search whose levels of attention lack query heads, from its flag to the files that people load."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import llmbo as package
from pruning.architecture import Architecture
from pruning.export import load_pruned


@pytest.fixture
def grouped(llmbo: Any, model_folder: Path, tmp_path: Path) -> Path:
    """A tiny llama of two KV groups of four query heads."""
    config = LlamaConfig.from_pretrained(model_folder)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 4, "initializer_range": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | sizes)).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_query_heads_from_the_flag_to_the_folder(llmbo: Any, grouped: Path, tmp_path: Path) -> None:
    options = {"model": grouped, "query_heads": True, "objectives": "kl,params,kv_bytes", "neuron_step": 8}
    result = llmbo(**options)
    assert result.exit_code == 0, result.output
    first = llmbo.report()["trials"]
    result = llmbo(**options, budget=14)  # what was stored is read back
    assert result.exit_code == 0, result.output
    report = llmbo.report()
    assert report["trials"][: len(first)] == first and report["space"]["kv_group_levels"] == [0, 1, 2]
    lacking = [trial for trial in report["trials"] if "fewer_queries" in trial["architecture"]]
    assert lacking and "fewer_queries" not in report["dense"]["architecture"]
    trial = max(lacking, key=lambda trial: len(set(trial["architecture"]["fewer_queries"])))
    run = package.load_run(tmp_path / "runs" / "tiny")
    model = run.model(trial["number"])
    assert model.num_parameters() == trial["objectives"]["params"]
    out = tmp_path / "out"
    run.export(trial["number"], out)
    tokens = torch.arange(24)[None] % 16
    with torch.no_grad():
        torch.testing.assert_close(load_pruned(out)(tokens).logits, model(tokens).logits, rtol=0, atol=1e-4)
    table = (out / "README.md").read_text()
    architecture = Architecture.from_dict(trial["architecture"])
    for layer, (groups, neurons) in enumerate(zip(architecture.kv_groups, architecture.neurons, strict=True)):
        heads = groups * (4 - (architecture.fewer_queries or (0,) * 9)[layer])
        assert f"| {layer} | " + (f"{groups} | {heads} | {neurons} |" if groups or neurons else "dropped") in table
    other = llmbo(
        **options | {"query_heads": None}, budget=14
    )  # another search, which must not go on in this one's folder
    assert other.exit_code == 2 and "query_heads" in other.stderr
