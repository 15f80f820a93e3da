"""Exports for vLLM against vLLM itself: log-probabilities of prompts and greedy generation, in float32 on a CPU.

    python -m experiments.vllm_check --python .venv-vllm/bin/python --out tests/pruning/data/vllm.json

SmolLM2 with 30 layers of different size, two of them without attention and one without MLP, and small random models of every family that
is held. What is compared with is the same folder, loaded by transformers. `make test-vllm` sets up the environment and runs this.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.export import Pruned, save_vllm
from pruning.shrinking import shrink_to
from pruning.text import read_text

TOLERANCE = 1e-3  # nats, of any log-probability
PROMPTS, LENGTH, NEW = 4, 48, 12
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "initializer_range": 0.1, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SMALL: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, head_dim=32, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "mistral": MistralConfig(**SIZES, head_dim=32, sliding_window=64),
    "qwen2": Qwen2Config(**SIZES),
    "phi3": Phi3Config(**SIZES),
}


def models() -> Iterator[tuple[str, PreTrainedModel, Architecture, list[list[int]]]]:
    """Name, dense model, what is kept of it, and prompts."""
    smollm2 = load_model("llama", "float32", "cpu")
    ids = smollm2.tokenizer(read_text("builtin").content[: 40 * LENGTH])["input_ids"]
    prompts = [ids[start : start + LENGTH] for start in range(0, PROMPTS * LENGTH, LENGTH)]
    yield "SmolLM2-135M", smollm2.model, many_sizes(anatomy_of(smollm2.model)), prompts
    for name, config in SMALL.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases start at zero and norms at one: make them matter
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        groups = anatomy_of(model).num_key_value_heads
        architecture = Architecture((0, groups, 0, groups), (64, 0, 0, 40))  # no attention first, no MLP, neither, both
        yield name, model, architecture, torch.randint(3, 320, (PROMPTS, LENGTH)).tolist()


def many_sizes(anatomy: Anatomy) -> Architecture:
    """A different MLP in every layer, two layers without attention and one without MLP."""
    layers = anatomy.num_hidden_layers
    groups, neurons = (
        [anatomy.num_key_value_heads] * layers,
        [anatomy.intermediate_size - 32 * n for n in range(layers)],
    )
    groups[layers // 3] = groups[layers // 2] = neurons[2 * layers // 3] = 0
    return Architecture(tuple(groups), tuple(neurons))


def compared(
    python: str, model: PreTrainedModel, architecture: Architecture, prompts: list[list[int]]
) -> dict[str, Any]:
    """Export, serve, load: how far the log-probabilities are apart, and whether the same tokens follow."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, asked, found = (Path(scratch, name) for name in ("folder", "asked", "found"))
        anatomy = anatomy_of(model)
        save_vllm(Pruned(shrink_to(model, architecture), anatomy, architecture), folder)
        asked.write_text(json.dumps({"prompts": prompts, "new": NEW}))
        serve = Path(__file__).with_name("serve.py")
        subprocess.run([python, str(serve), str(folder), str(asked), str(found)], check=True)
        served = json.loads(found.read_text())
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            logprobs = loaded(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
            loaded.generation_config.eos_token_id = None  # where a text would end, vLLM goes on too
            ids = loaded.generate(tokens, do_sample=False, max_new_tokens=NEW)[:, tokens.shape[1] :]
        weights = load_file(folder / "model.safetensors")
        return {
            "base": model.config.to_diff_dict(),
            "architecture": architecture.to_dict(),
            "served_as": served["served_as"],
            "versions": served["versions"],
            "tokens": logprobs.numel(),
            "largest_difference": float((torch.tensor(served["logprobs"]) - logprobs).abs().max()),
            "generated_alike": ids.tolist() == served["generated"],
            "tensors": {name: list(weights[name].shape) for name in sorted(weights)},
        }


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=".venv-vllm/bin/python", help="Of the environment that holds vLLM.")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write.")
    options = parser.parse_args()
    found = {}
    for name, *given in models():
        found[name] = one = compared(options.python, *given)
        print(
            f"{name:13} {one['served_as']}: {one['largest_difference']:.1e} nats, generates the same: {one['generated_alike']}"
        )
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()]
    options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    wrong = [n for n, one in found.items() if one["largest_difference"] > TOLERANCE or not one["generated_alike"]]
    if wrong:
        raise SystemExit(f"vLLM computes something else than transformers for {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
