"""Where the layers wait: the fastest place with enough room, or one line that says what would do."""

import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from experiments.gpu_check.__main__ import check, end_to_end
from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from llmbo.models.loading import find_prunable
from llmbo.models.placement import SPARE
from llmbo.problem.residence import Machine, choose_residence, placed, placed_to_cut, refit_cache, residence_of
from pruning.anatomy import Anatomy, anatomy_of
from pruning.compensation import CACHE_BYTES

CONFIG = RunConfig("big", calibration_tokens=65536)
PLENTY = 10**13


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    """Llama-3.1-8B."""
    shape = LlamaConfig(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336,
    )  # fmt: skip
    with torch.device("meta"):
        return anatomy_of(AutoModelForCausalLM.from_config(shape))


def chosen(anatomy: Anatomy, machine: Machine, **settings: Any) -> str:
    return choose_residence(replace(CONFIG, **settings), anatomy, 2, machine).offload


def test_more_room_never_chooses_a_slower_place(anatomy: Anatomy) -> None:
    """Each place is taken from exactly the bytes on that it needs."""
    order = ("none", "cpu", "disk")
    rich = {place: residence_of(CONFIG, anatomy, 2, Machine("cuda", PLENTY, PLENTY), place) for place in order}
    assert rich["none"].needed > rich["cpu"].needed == rich["disk"].needed
    assert rich["cpu"].host - rich["disk"].host == pytest.approx(2 * 6.98e9, rel=0.01)  # the layers
    whole, part = rich["none"].needed, rich["cpu"].needed
    assert chosen(anatomy, Machine("cuda", whole, PLENTY)) == "none"
    assert chosen(anatomy, Machine("cuda", whole - 1, PLENTY)) == "cpu"
    assert chosen(anatomy, Machine("cuda", PLENTY, PLENTY), memory=str(whole - 1)) == "cpu"
    assert chosen(anatomy, Machine("cuda", part, rich["cpu"].host)) == "cpu"
    assert chosen(anatomy, Machine("cuda", part, rich["cpu"].host - 1)) == "disk"
    assert chosen(anatomy, Machine("cuda", PLENTY, PLENTY), offload="disk") == "disk"


def test_other_gpus_are_taken_only_when_named_and_byte_by_byte(anatomy: Anatomy) -> None:
    layer = 2 * anatomy.layer_parameters
    enough = {"cuda:1": round(20.5 * layer / SPARE), "cuda:3": round(12 * layer / SPARE) + 1}
    part = residence_of(CONFIG, anatomy, 2, Machine("cuda", PLENTY, PLENTY), "disk")
    machine = Machine("cuda", part.needed, PLENTY, enough)
    assert chosen(anatomy, machine) == "cpu" and chosen(anatomy, machine, offload="gpu") == "gpu"
    found = residence_of(CONFIG, anatomy, 2, machine, "gpu")
    assert found.cards == {"cuda:1": 20 * layer, "cuda:3": 12 * layer} and not found.homeless
    assert (found.needed, found.host) == (part.needed, part.host)
    for cards, homeless, said in (
        (enough | {"cuda:3": enough["cuda:3"] - 2}, 1, "8.9 GB on cuda:1, 5.2 GB on cuda:3: --offload auto fits"),
        ({}, 32, "there is no GPU beside cuda for them to wait on: --offload auto fits"),
    ):
        machine = Machine("cuda", PLENTY, PLENTY, cards)
        assert residence_of(CONFIG, anatomy, 2, machine, "gpu").homeless == homeless * layer
        with pytest.raises(ConfigError, match=rf"^'big' has 14\.0 GB of layers, and .*{said}\.$"):
            chosen(anatomy, machine, offload="gpu")
    with pytest.raises(ConfigError, match="--racing runs the model as a whole, but its layers wait on other GPUs"):
        chosen(anatomy, Machine("cuda", PLENTY, PLENTY, enough), offload="gpu", racing=True)


def test_a_refusal_names_other_gpus_where_they_would_do(anatomy: Anatomy) -> None:
    for cards, gpu in (({"cuda:1": 10**10, "cuda:3": 10**10}, True), ({"cuda:1": 10**10}, False), ({}, False)):
        machine = Machine("cuda", 10**10, PLENTY, cards)
        with pytest.raises(ConfigError, match="--offload auto fits") as caught:
            chosen(anatomy, machine, offload="none")
        assert ("and so does --offload gpu, on cuda:1 and cuda:3." in str(caught.value)) == gpu
        if gpu:
            assert chosen(anatomy, machine, offload="gpu") == "gpu"


def test_refits_fill_what_a_gpu_has_left_and_no_more(anatomy: Anatomy) -> None:
    """Within nine tenths of the limit, what is needed counted; a model with no room to spare keeps what is needed alone."""
    needed = residence_of(CONFIG, anatomy, 2, Machine("cuda", PLENTY, PLENTY), "none").needed
    for limit in (needed, 24 * 10**9, 80 * 10**9):
        allowed = replace(CONFIG, memory=str(limit))
        cached = refit_cache(allowed, anatomy, 2, Machine("cuda", PLENTY, PLENTY), "none").most
        assert cached == refit_cache(CONFIG, anatomy, 2, Machine("cuda", limit, PLENTY), "none").most >= CACHE_BYTES
        assert (cached > CACHE_BYTES) == (0.9 * limit > needed) and needed - CACHE_BYTES + cached <= max(
            needed, 0.9 * limit
        )
    assert (
        cached > 40 * 10**9
        and refit_cache(CONFIG, anatomy, 2, Machine("cpu", PLENTY, PLENTY), "none").most == CACHE_BYTES
    )


def test_on_a_cpu_what_waits_is_in_the_same_memory_unless_it_is_mapped(anatomy: Anatomy) -> None:
    machine = Machine("cpu", PLENTY, PLENTY)
    whole, mapped = (residence_of(CONFIG, anatomy, 2, machine, place) for place in ("none", "disk"))
    assert whole.needed == whole.footprint.peak + whole.host and mapped.needed == mapped.footprint.peak + mapped.host
    assert chosen(anatomy, Machine("cpu", whole.needed, whole.needed)) == "none"
    assert chosen(anatomy, Machine("cpu", whole.needed - 1, whole.needed - 1)) == "disk"
    assert chosen(anatomy, machine, offload="cpu") == "none"  # there it is on the device


def test_what_a_refusal_proposes_is_taken(anatomy: Anatomy) -> None:
    """From one byte too little down to almost nothing, under all settings: one line, and the change it names would do."""
    cases = [
        (Machine("cuda", PLENTY, PLENTY), {"memory": "3GB"}),
        (Machine("cuda", 18 * 10**9, PLENTY), {"offload": "none"}),
        (Machine("cuda", 8 * 10**9, 10**12), {"window": 8192, "proxy_tokens": 8192, "heldout_tokens": 8192}),
        (Machine("cuda", 10**10, 10**9), {}),
        (Machine("cpu", 9 * 10**9, 9 * 10**9), {"memory": "1GB"}),
        (Machine("cpu", 10**9, 10**9), {}),
        (Machine("cuda", 8 * 10**9, 10**12), {"window": 8192, "offload": "none", "proxy_tokens": 8192, "heldout_tokens": 8192}),
        (Machine("cuda", PLENTY, PLENTY), {"memory": "3GB", "offload": "none"}),
        (Machine("cuda", 18 * 10**9, PLENTY), {"racing": True}),
        (Machine("cuda", PLENTY, PLENTY), {"memory": "3GB", "racing": True}),
        (Machine("cuda", PLENTY, PLENTY), {"memory": "3GB", "text": "self", "offload": "none"}),
    ]  # fmt: skip
    said = []
    for machine, settings in cases:
        config = replace(CONFIG, **settings)
        with pytest.raises(ConfigError) as caught:
            choose_residence(config, anatomy, 2, machine)
        message = str(caught.value)
        assert "\n" not in message and re.match("'big' needs .* GB|--racing runs the model as a whole", message)
        changes = dict(re.findall(r"--([a-z-]+) (\w+)(?= .*fits)", message.rpartition(": ")[2]))
        said.append(" ".join(changes) or "nothing")
        if changes:
            named: dict[str, Any] = {
                name.replace("-", "_"): int(value) if value.isdigit() else value for name, value in changes.items()
            }
            choose_residence(replace(config, **named), anatomy, 2, machine)
        else:
            assert "smaller model" in message or "leave it out" in message
    half = residence_of(CONFIG, anatomy, 2, Machine("cuda", PLENTY, PLENTY), "disk").needed
    with pytest.raises(ConfigError, match="--dtype bfloat16 fits"):
        choose_residence(CONFIG, anatomy, 4, Machine("cuda", half, PLENTY))
    assert said == [
        *("memory", "offload", "window", "calibration-tokens", "memory", "nothing"),
        *("offload window", "offload memory", "nothing", "memory", "offload memory"),
    ]


def test_a_tiny_model_is_placed_here(model_folder: Path) -> None:
    found = find_prunable(str(model_folder))
    assert placed(RunConfig(found.name), found, "float32", "cpu") == ("float32", "cpu", "none")
    assert placed(RunConfig(found.name, offload="disk"), found, "bfloat16", "cpu") == ("bfloat16", "cpu", "disk")
    with pytest.raises(ConfigError, match=r"--memory allows: --memory \d+MB fits"):
        placed(RunConfig(found.name, memory="1KB"), found, "float32", "cpu")
    for settings, offload in (
        ({}, "none"), ({"offload": "gpu"}, "none"),
        ({"offload": "disk"}, "disk"), ({"memory": "1KB"}, "disk"), ({"memory": "1KB", "offload": "none"}, "none"),
        ({"memory": "1KB", "racing": True}, "none"),
    ):  # fmt: skip
        config = RunConfig(found.name, **settings)
        assert placed_to_cut(config, found, "bfloat16", "cpu") == ("bfloat16", "cpu", offload)


def test_where_layers_wait_may_change_between_two_starts(llmbo: Any, finished: Any) -> None:
    """Neither setting changes a result: a run goes on with its layers in files. What fits nowhere leaves it as it was."""
    shutil.copytree(finished.folder, llmbo.folder, dirs_exist_ok=True)
    before = llmbo.files()
    refused = llmbo(budget=19, memory="1KB", heldout_text="python")
    said = refused.stderr.splitlines()[-1]
    assert refused.exit_code == 2 and said.startswith("error: ") and "--memory allows: --memory" in said
    assert llmbo.files() == before
    result = llmbo(budget=19, offload="disk", memory="1GB", heldout_text="python")
    assert result.exit_code == 0, result.output
    old, new = finished.report(), llmbo.report()
    assert new["dense"] == old["dense"] and new["trials"][:18] == old["trials"]
    assert (new["run"]["settings"]["offload"], new["run"]["settings"]["memory"]) == (
        "disk",
        "1GB",
    )  # for what is cut later


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_what_a_large_model_takes_is_measured_by_a_script_that_runs_anywhere(
    model_folder: Path, text_file: Path, tmp_path: Path, offload: str
) -> None:
    options = Namespace(
        model=model_folder, tokens=128, proxy_tokens=64, window=16, candidates=2, memory=["1GB", "2GB"], offload=offload, device="cpu",
    )  # fmt: skip
    found = check(options, tmp_path)
    assert found["layers wait"] == offload and found["tokens"] == 128
    for memory in options.memory:
        assert 0 <= found[f"--memory {memory}, peak, GB"] <= found["peak by the formula, GB"] + 0.001 < 0.01
        assert all(
            float(found[f"--memory {memory}, a candidate, {when}"].split()[0]) > 0 for when in ("first", "again")
        )
    assert found["preparation, seconds"] > 0
    small = {"window": 16, "calibration_tokens": 128, "proxy_tokens": 64, "heldout_tokens": 64, "heldout_text": "none"}
    own = {"text": f"text:{text_file}", "budget": 3, "device": "cpu", "offload": offload, "samples": False}
    whole = end_to_end(str(model_folder), tmp_path, **small, **own)
    assert whole["candidates"].startswith("3, ") and whole["hypervolume"] >= 0
