"""One exported folder in vLLM, timed on request: `python timed.py FOLDER SETTINGS`, in an environment that holds neither llmbo nor pruning.

Tells "ready" with what it is served as; then, for each line that comes, seconds of one prefill and of one decoded token. Between lines it
waits and takes no time from others.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main(folder: str, settings: dict[str, object]) -> None:
    from vllm import LLM, SamplingParams

    prompt, tokens = settings["prompt"], settings["tokens"]
    model = LLM(
        folder,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype=settings["dtype"],
        enforce_eager=settings["eager"],
        enable_prefix_caching=False,  # or a prompt that comes again would cost nothing
        max_model_len=prompt + tokens + 1,
    )

    def seconds(new: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        model.generate([{"prompt_token_ids": [7 + i for i in range(prompt)]}], sampling, use_tqdm=False)
        return time.perf_counter() - start

    print(json.dumps({"ready": model.llm_engine.model_config.architecture}), flush=True)
    for _ in sys.stdin:
        first = seconds(1)
        print(json.dumps([first, (seconds(1 + tokens) - first) / tokens]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
