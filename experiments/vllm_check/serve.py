"""What vLLM makes of exported folders: `python serve.py ASKED FOUND`, in an environment that holds neither llmbo nor pruning.

`ASKED` holds, by name, a folder, prompts as token ids and how many tokens are to follow. `FOUND` gets the log-probability of each token of
a prompt, given those before it, and what is generated next; or the error, in a line.
"""

import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def served(folder: str, prompts: list[list[int]], new: int) -> dict[str, object]:
    """In float32, without compilation."""
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=max(map(len, prompts)) + new,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=new, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = model.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return {
        "served_as": model.llm_engine.model_config.architecture,
        "logprobs": [
            [step[token].logprob for step, token in zip(out.prompt_logprobs[1:], ids[1:], strict=True)]
            for out, ids in zip(outputs, prompts, strict=True)
        ],
        "generated": [list(out.outputs[0].token_ids) for out in outputs],
        "versions": {package: version(package) for package in ("vllm-cpu", "torch", "transformers")},
    }


def main(asked: Path, found: Path) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    answers = {}
    for name, one in json.loads(asked.read_text()).items():
        try:
            answers[name] = served(**one)
        except Exception as error:  # whatever vLLM does with a model that it cannot take
            answers[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        gc.collect()
        cleanup_dist_env_and_memory()
        found.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
