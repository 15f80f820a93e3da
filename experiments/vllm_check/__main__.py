"""Exports for vLLM against vLLM itself: log-probabilities of prompts and greedy generation, in float32 on a CPU.

    python -m experiments.vllm_check --python .venv-vllm/bin/python --out tests/pruning/data/vllm.json

By its DeciLM class (`--format vllm`) SmolLM2 with 30 layers of different size, two of them without attention and one without MLP, and small
random models of every family that is held. By its Transformers backend (`--format hf`) the same SmolLM2 with as many KV groups and query
heads in each layer as may be, and small random models of every family of `pruning.export.vllm.BACKEND`. What is compared with is the same
folder, loaded by transformers. `make test-vllm` sets up the environment and runs this.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmbo.models.loading import load_model
from llmbo.models.silence import silence_libraries
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.export import Pruned
from pruning.export.rebuild import rebuilt
from pruning.export.vllm import BACKEND, decilm
from pruning.shrinking import shrink_to
from pruning.text import read_text
from pruning.widths import attention_width

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
HEADS = {"head_dim": 32}
THREE = {**HEADS, "hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 3}
MHA = SIZES.keys() - {"num_key_value_heads"}
TIED = {"tie_word_embeddings": True}
SLIDING = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
# What families have of their own, beyond sizes, as far as a config may leave it out.
OWN: dict[str, dict[str, Any]] = {
    "llama": {**TIED, "rope_parameters": LLAMA3},
    "mistral": {"sliding_window": 24},
    "qwen2": {"use_sliding_window": True, **SLIDING},
    "gemma2": {
        **TIED, **SLIDING, "query_pre_attn_scalar": 8, "final_logit_softcapping": 20.0, "attn_logit_softcapping": 5.0,
    },
    "gemma3_text": {**TIED, **SLIDING, "query_pre_attn_scalar": 8},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**TIED, **SLIDING, "logit_scale": 0.25},
    "cwm": {**SLIDING, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "ernie4_5": {"use_bias": True},
    "exaone4": SLIDING,
    "glm": {"attention_bias": True},
    "gpt_bigcode": {"n_inner": 96},
    "internlm3": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    "ministral": SLIDING,
    "olmo": {"clip_qkv": 1.0},
    "olmo3": SLIDING,
    "opt": {**TIED, "ffn_dim": 96, "word_embed_proj_dim": 192},
    "seed_oss": {"attention_bias": True},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": 24},
    "vaultgemma": {**SLIDING, "query_pre_attn_scalar": 8},
}  # fmt: skip
ALIKE = ("gpt_bigcode", "gpt_neox", "opt")  # whose configs know neither KV groups nor the size of a head
DECILM: dict[str, PreTrainedConfig] = {
    "llama": CONFIG_MAPPING["llama"](**SIZES, **HEADS, attention_bias=True, mlp_bias=True),
    "llama3": CONFIG_MAPPING["llama"](**SIZES, **HEADS, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "linear": CONFIG_MAPPING["llama"](
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "mistral": CONFIG_MAPPING["mistral"](**SIZES, **HEADS, sliding_window=64),
    "qwen2": CONFIG_MAPPING["qwen2"](**SIZES),
    "phi3": CONFIG_MAPPING["phi3"](**SIZES),
}


@dataclass(frozen=True)
class Case:
    """A model to export, and what to ask of it."""

    name: str
    model: PreTrainedModel
    architecture: Architecture
    prompts: list[list[int]]
    format: str

    def made(self) -> PreTrainedModel:
        """What is exported, as `pruning.export` writes it."""
        anatomy = anatomy_of(self.model)
        pruned = Pruned(shrink_to(self.model, self.architecture), anatomy, self.architecture)
        return decilm(pruned) if self.format == "vllm" else rebuilt(pruned.model, anatomy, self.architecture)


def cases() -> Iterator[Case]:
    smollm2 = load_model("llama", "float32", "cpu")
    ids = smollm2.tokenizer(read_text("builtin").content[: 40 * LENGTH])["input_ids"]
    prompts = [ids[start : start + LENGTH] for start in range(0, PROMPTS * LENGTH, LENGTH)]
    anatomy = anatomy_of(smollm2.model)
    yield Case("SmolLM2-135M", smollm2.model, many_sizes(anatomy, (anatomy.num_key_value_heads,)), prompts, "vllm")
    groups = range(1, anatomy.num_key_value_heads + 1)
    every = [attention_width(kept, lacking) for lacking in range(anatomy.queries_per_group) for kept in groups]
    yield Case("SmolLM2-135M, unequal heads", smollm2.model, many_sizes(anatomy, every), prompts, "hf")
    for name, config in DECILM.items():
        model = random_model(config)
        groups = anatomy_of(model).num_key_value_heads
        architecture = Architecture((0, groups, 0, groups), (64, 0, 0, 40))  # no attention first, no MLP, neither, both
        yield Case(name, model, architecture, random_prompts(), "vllm")
    for name in BACKEND:
        sizes = {key: size for key, size in (SIZES | THREE).items() if name not in ALIKE or key in MHA}
        model = random_model(CONFIG_MAPPING[name](**sizes, **OWN.get(name, {})))
        some = anatomy_of(model).attention
        widths = (attention_width(1, some.queries - 1), 0, some.units, max(1, some.units - 1))
        yield Case(f"{name}, unequal heads", model, Architecture.of(widths, (64, 40, 0, 96)), random_prompts(), "hf")


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at zero and norms at one: make them matter
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def random_prompts() -> list[list[int]]:
    return torch.randint(3, 320, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def many_sizes(anatomy: Anatomy, widths: Sequence[int]) -> Architecture:
    """A different MLP in every layer, attention of these widths in turn, two layers without attention and one without MLP."""
    layers = anatomy.num_hidden_layers
    attention = [widths[layer % len(widths)] for layer in range(layers)]
    neurons = [anatomy.intermediate_size - 32 * layer for layer in range(layers)]
    attention[layers // 3] = attention[layers // 2] = neurons[2 * layers // 3] = 0
    return Architecture.of(attention, neurons)


def compared(case: Case, folder: Path, served: dict[str, Any]) -> dict[str, Any]:
    """How far the log-probabilities of vLLM and transformers are apart, and whether the same tokens follow."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    tokens = torch.tensor(case.prompts)
    with torch.inference_mode():
        logprobs = loaded(tokens).logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        loaded.generation_config.eos_token_id = None  # where a text would end, vLLM goes on too
        ids = loaded.generate(tokens, do_sample=False, max_new_tokens=NEW)[:, tokens.shape[1] :]
    weights = load_file(folder / "model.safetensors")
    return {
        "base": case.model.config.to_diff_dict(),
        "architecture": case.architecture.to_dict(),
        "format": case.format,
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
    with tempfile.TemporaryDirectory() as scratch:
        asked, answers = (Path(scratch, name) for name in ("asked.json", "answers.json"))
        folders = {case.name: (case, Path(scratch, f"model_{number}")) for number, case in enumerate(cases())}
        for case, folder in folders.values():
            case.made().save_pretrained(folder)
        asked.write_text(
            json.dumps(
                {
                    name: {"folder": str(folder), "prompts": case.prompts, "new": NEW}
                    for name, (case, folder) in folders.items()
                }
            )
        )
        serve = Path(__file__).with_name("serve.py")
        subprocess.run([options.python, str(serve), str(asked), str(answers)], check=True)
        served = json.loads(answers.read_text())
        for name, (case, folder) in folders.items():
            if "error" in served[name]:
                raise SystemExit(f"{name}: {served[name]['error']}")
            found[name] = one = compared(case, folder, served[name])
            print(
                f"{name:30} {one['served_as']}: {one['largest_difference']:.1e} nats, generates the same: {one['generated_alike']}",
                flush=True,
            )
    lines = [f"{json.dumps(name)}: {json.dumps(one)}" for name, one in found.items()]
    options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    wrong = [n for n, one in found.items() if one["largest_difference"] > TOLERANCE or not one["generated_alike"]]
    if wrong:
        raise SystemExit(f"vLLM computes something else than transformers for {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
