"""Rotary scalings that change with the length of a text: a reloaded model of unequal layers turns by the same angles."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.export import load_pruned
from pruning.export.rebuild import rebuilt
from pruning.masks import PruningMask
from pruning.shrinking import shrink

UNEQUAL = Architecture((2, 1, 0, 1, 2), (24, 0, 7, 12, 5))
ORIGINAL = 16  # positions before the scaling
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "longrope": {"factor": 4.0, "original_max_position_embeddings": ORIGINAL},
}  # fmt: skip
# Rows of `CONFIGS` and the share of a head that turns. Of the other families positions are learned.
ROWS = {
    "llama": 1.0, "mistral": 1.0, "qwen2-sliding": 1.0, "qwen3": 1.0, "gemma2": 1.0, "gemma3": 1.0, "phi3": 1.0, "phi3 in part": 0.5,
    "gpt-neox": 0.5, "gpt-neox all": 1.0,
}  # fmt: skip
CASES = [
    (row, kind) for row in ROWS for kind in KINDS if not row.startswith("phi3") or kind in ("default", "longrope")
]  # all it takes


@pytest.fixture
def turning(build: Callable[[str], PreTrainedModel]) -> Callable[[str, str], PreTrainedModel]:
    """(row, kind) -> a float32 model of it with this rotary scaling."""

    def make(row: str, kind: str) -> PreTrainedModel:
        config = copy.deepcopy(build(row.split()[0]).config)
        head_dim, share = config.hidden_size // config.num_attention_heads, ROWS[row]
        rope = {"rope_type": kind, "rope_theta": 100.0, "partial_rotary_factor": share, **KINDS[kind]}
        if kind == "longrope":
            places = range(round(head_dim * share) // 2)
            rope |= {
                "short_factor": [1.0 + place / 8 for place in places],
                "long_factor": [2.0 + place for place in places],
            }
        nested = row == "gemma3"  # one scaling for each kind of layer
        config.rope_parameters = {name: dict(rope) for name in set(config.layer_types)} if nested else rope
        config.original_max_position_embeddings = ORIGINAL  # where Phi-3 keeps it
        config.max_position_embeddings = ORIGINAL if kind == "dynamic" else 4 * ORIGINAL
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.mark.parametrize(("row", "kind"), CASES)
def test_a_reloaded_model_turns_by_the_same_angles(
    row: str, kind: str, turning: Any, random_ranking: Any, logits: Any, tmp_path: Path
) -> None:
    """Within the original context, beyond it and back again, by this package's code and by the folder's own."""
    dense = turning(row, kind)
    anatomy = anatomy_of(dense)
    small = shrink(dense, PruningMask.from_architecture(UNEQUAL, random_ranking(anatomy, 0)))
    made = rebuilt(small, anatomy, UNEQUAL)
    made.save_pretrained(tmp_path)
    tokens = torch.randint(dense.config.vocab_size, (2, 3 * ORIGINAL), generator=torch.Generator().manual_seed(1))
    texts = [tokens[:, :length] for length in (ORIGINAL // 2, 3 * ORIGINAL, ORIGINAL // 2, 2 * ORIGINAL)]
    expected = [logits(small, text) for text in texts]
    assert torch.equal(expected[0], expected[2])
    if kind in ("dynamic", "longrope"):  # the same words mean something else in a long text
        start = expected[0].shape[1]
        assert not torch.allclose(expected[1][:, :start], expected[0], atol=1e-3)
    found = load_pruned(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(own) is not type(found) and type(own).__name__ == type(found).__name__
    for model in (made, found, own, copy.deepcopy(found)):
        assert all(torch.equal(logits(model, text), values) for text, values in zip(texts, expected, strict=True))


@pytest.mark.parametrize(("row", "kind"), [("llama", "dynamic"), ("phi3 in part", "longrope"), ("gpt-neox", "yarn")])
def test_generation_grows_beyond_the_original_context(
    row: str, kind: str, turning: Any, random_ranking: Any, tmp_path: Path
) -> None:
    dense = turning(row, kind)
    anatomy = anatomy_of(dense)
    small = shrink(dense, PruningMask.from_architecture(UNEQUAL, random_ranking(anatomy, 0)))
    rebuilt(small, anatomy, UNEQUAL).save_pretrained(tmp_path)

    def words(model: PreTrainedModel) -> Tensor:
        prompt = torch.arange(3, ORIGINAL)[None]
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=8)

    assert torch.equal(words(load_pruned(tmp_path)), words(small)) and words(small).shape[1] > ORIGINAL
