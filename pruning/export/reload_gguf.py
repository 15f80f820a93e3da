"""Load a GGUF file with llama.cpp and compute logits: `python -I reload_gguf.py`, then `[FILE, ASKED, FOUND, THREADS]`.

Started in a fresh process by path, and told on stdin: a fault in native code must not take the exporting process along.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama
from safetensors.numpy import load_file, save_file


def main(path: str, asked: str, out: str, threads: int) -> None:
    """Answer with the logits of `tokens` (`num_windows x length`) and the token ids of `text` (UTF-8 bytes)."""
    given = load_file(asked)
    length = given["tokens"].shape[1]
    model = Llama(path, n_ctx=length, n_batch=length, logits_all=True, n_threads=threads, verbose=False)
    logits = []
    for window in given["tokens"].tolist():
        model.reset()
        model.eval(window)
        logits.append(model.scores[:length].copy())
    ids = model.tokenize(given["text"].tobytes(), add_bos=False, special=False) if given["text"].size else []
    save_file({"logits": np.stack(logits), "ids": np.array(ids, dtype=np.int64)}, out)


if __name__ == "__main__":
    if told := sys.stdin.readline():  # nothing where the export came to nothing
        main(*json.loads(told))
