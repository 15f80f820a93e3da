"""What the benchmark of vLLM's two routes compares: members that both hold, and times that processes tell in turn."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.vllm_speed import __main__ as benchmark
from pruning.anatomy import anatomy_of
from pruning.cost import cost_of

SPOKEN = """
import json, sys
print("a line of vLLM's own")
print(json.dumps({"ready": "TheClass"}), flush=True)
for number, _ in enumerate(sys.stdin):
    print("[W1127 a warning", file=sys.stderr)
    print(json.dumps([1.5 + number, 0.25]), flush=True)
"""


@pytest.mark.parametrize("share", [0.8, 0.65, 0.5])
def test_a_member_is_held_by_both_routes_and_no_larger_than_asked(share: float) -> None:
    config = LlamaConfig(
        num_hidden_layers=30, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536
    )
    with torch.device("meta"):
        anatomy = anatomy_of(AutoModelForCausalLM.from_config(config))
    found = benchmark.member(anatomy, share)
    assert share - 0.04 < cost_of(anatomy, found).share <= share
    assert set(found.kv_groups) == {0, 3} and len(set(found.neurons)) == 1


def test_a_process_is_asked_again_and_again_and_its_end_is_told() -> None:
    def started(program: str) -> "subprocess.Popen[str]":
        words = [sys.executable, "-c", program]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    process = started(SPOKEN)
    timed = benchmark.Timed(process)
    assert timed.served_as == "TheClass" and [timed.run(), timed.run()] == [(1.5, 0.25), (2.5, 0.25)]
    process.kill()
    process.wait()
    with pytest.raises(SystemExit, match="vLLM ended with 3"):
        benchmark.Timed(started("raise SystemExit(3)"))
