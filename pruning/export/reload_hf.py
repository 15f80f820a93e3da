"""Load a checkpoint folder as a stranger would and compute logits: `python -I reload_hf.py FOLDER TOKENS OUT`.

Started in a fresh process by path. Neither `pruning` nor `llmbo` can be imported here, so a folder that needs them fails.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sys.modules["pruning"] = sys.modules["llmbo"] = None  # type: ignore[assignment]


def main(folder: str, tokens: str, out: str) -> None:
    """Write the logits of the token ids in `tokens` to `out`. Code in the folder runs only if its config asks for it."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="auto_map" in config)
    with torch.inference_mode():
        logits = model.eval()(load_file(tokens)["tokens"], use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
