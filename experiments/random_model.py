"""A checkpoint of Llama's shape with random weights, for what is measured in bytes and seconds and not in quality.

    python -m experiments.random_model --preset 1.5b --out /tmp/random

Written tensor by tensor into shards, so that it needs the memory of one shard, whatever the model's size. Its tokenizer is SmolLM2's.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerBase

from llmbo.models.loading import find_checkpoint, load_tokenizer
from llmbo.models.placement import DTYPES

GB = 10**9
PRESETS: dict[str, dict[str, Any]] = {
    "1.5b": {"hidden": 2048, "layers": 24, "heads": 16, "kv_heads": 4, "neurons": 8192},
    "llama-3.1-8b": {
        "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "neurons": 14336, "vocab": 128256, "tied": False,
    },
    "llama-3.1-70b": {
        "hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "neurons": 28672, "vocab": 128256, "tied": False,
    },
}  # fmt: skip


def random_config(
    hidden: int, layers: int, heads: int, kv_heads: int, neurons: int, vocab: int = 49152, tied: bool = True
) -> LlamaConfig:
    """`vocab` must hold the 49,152 tokens of SmolLM2's tokenizer."""
    return LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=neurons, tie_word_embeddings=tied, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def write_random_model(
    config: LlamaConfig,
    folder: Path,
    dtype: str = "bfloat16",
    device: str = "cpu",
    shard_bytes: int = GB,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int:
    """Matrices are normal with the config's `initializer_range`, norms are 1.

    Args:
        device: Where the numbers are drawn: a GPU is faster, and draws others.
        shard_bytes: No file holds more, but for one tensor that is larger.
        tokenizer: By default SmolLM2's.

    Returns:
        The bytes of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], trust_remote_code=False)
    shards = list(_shards(dict(model.named_parameters()), shard_bytes))  # a tied head is named once
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weights = {key: _draw(weight, config.initializer_range, generator) for key, weight in shard.items()}
        save_file(weights, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
        del weights
    size = sum(weight.nbytes for shard in shards for weight in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    model.config.save_pretrained(folder)
    (tokenizer or load_tokenizer(find_checkpoint("llama"))).save_pretrained(folder)
    return size


def _shards(weights: dict[str, Tensor], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for key, weight in weights.items():
        if shard and sum(other.nbytes for other in shard.values()) + weight.nbytes > most:
            yield shard
            shard = {}
        shard[key] = weight
    yield shard


def _draw(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
    weight = torch.empty(like.shape, dtype=like.dtype, device=generator.device)
    return (weight.fill_(1) if like.dim() == 1 else weight.normal_(0, std, generator=generator)).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--preset", choices=PRESETS, default="1.5b", help="sizes; the next ones change some of them")
    for size in ("hidden", "layers", "heads", "kv-heads", "neurons", "vocab"):
        parser.add_argument(f"--{size}", type=int)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, help="the head is the embedding")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn")
    parser.add_argument("--shard-gb", type=float, default=1, help="GB in a file at most")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    changes = {key: options[key] for key in PRESETS["llama-3.1-8b"] if options[key] is not None}
    config = random_config(**PRESETS[options["preset"]] | changes)
    shard_bytes = round(options["shard_gb"] * GB)
    size = write_random_model(config, options["out"], options["dtype"], options["device"], shard_bytes, options["seed"])
    print(f"{options['out']}: {size / GB:.2f} GB of weights")


if __name__ == "__main__":
    main()
