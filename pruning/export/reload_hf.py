"""Load a checkpoint folder as a stranger would and compute logits: `python -I reload_hf.py`, then `[FOLDER, ASKED, FOUND, THREADS]`.

Started in a fresh process by path, maybe before there is a folder: what to read is told on stdin. Neither `pruning` nor `llmbo` can be
imported here, so a folder that needs them fails.
"""

import gc
import json
import sys
from pathlib import Path

gc.disable()  # a million objects are imported, all to stay: not to look for garbage among them saves a third of the time
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    PreTrainedModel,  # most of what loading a model imports
)

gc.freeze()
gc.enable()


def main(folder: str, asked: str, out: str, threads: int) -> None:
    """Write the float32 logits of the token ids in `asked` to `out`. Code in the folder runs only if its config asks for it."""
    torch.set_num_threads(threads)
    sys.modules["pruning"] = sys.modules["llmbo"] = None  # type: ignore[assignment]
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    dtype = torch.promote_types(getattr(torch, config["dtype"]), torch.float32)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code="auto_map" in config, dtype=dtype
    ).eval()
    with torch.inference_mode():
        logits = model(load_file(asked)["tokens"], use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, out)


if __name__ == "__main__":
    if told := sys.stdin.readline():  # nothing where the export came to nothing
        main(*json.loads(told))
