"""What `--plan` says before anything is loaded: figures that follow from the config, this machine's rates, and whether it fits."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

import llmbo as face
from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from llmbo.models.loading import find_prunable, load_model
from llmbo.models.placement import DTYPES
from llmbo.models.stored import anatomy_of_config, stored_weights
from llmbo.problem.preparation import prepared
from llmbo.problem.residence import Machine, placed, residence_of
from llmbo.problem.sequence import PHASE
from llmbo.problem.space import SearchSpace, space_of
from llmbo.problem.texts import load_windows
from llmbo.run.duration import Rates, Work, seconds_by_phase
from llmbo.run.plan import Plan, plan_of
from llmbo.types import WRITING
from pruning.anatomy import anatomy_of
from pruning.compensation import solved_values
from pruning.sequential import sequential_refit

RATES = Rates(matmul=3e14, single=5e13, passes=1e12, link=2e10)
CARD = Machine("cuda", 24 * 10**9, 10**12)
DISK = 10**11  # free wherever a plan looks
SHAPES: dict[str, Any] = {
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 28672},
}


@pytest.fixture(scope="module")
def anatomies() -> dict[str, Any]:
    """Those that were read already, by folder name: a model of 80 layers takes a moment even without weights."""
    return {}


@pytest.fixture
def planned(tmp_path: Path, anatomies: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """(Llama-3.1's size, settings) -> its plan on a card of 24 GB and a disk of 100; there is a config, and no weights."""

    def read_once(found: Any) -> Any:
        name = Path(found.name).name
        anatomies[name] = anatomies.get(name) or anatomy_of_config(found)
        return anatomies[name]

    def make(size: str, machine: Machine = CARD, devices: Sequence[str] = (), **settings: Any) -> Plan:
        config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=131072, **SHAPES[size])
        if not (tmp_path / size).is_dir():
            config.save_pretrained(tmp_path / size)
        settings = {"dtype": "bfloat16", "device": "cpu"} | settings
        return plan_of(RunConfig(str(tmp_path / size), **settings), RATES, machine, devices)

    monkeypatch.setattr("llmbo.run.plan.anatomy_of_config", read_once)
    monkeypatch.setattr("llmbo.run.disk.shutil.disk_usage", lambda path: SimpleNamespace(free=DISK))
    return make


def test_a_config_alone_tells_the_sizes(planned: Callable[..., Plan]) -> None:
    """The published numbers of parameters; refits of all widths as `docs/scaling.md` has them. Nothing is allocated."""
    for size, parameters, refits, levels in (("8B", 8.03e9, 25.9e9, 13), ("70B", 70.55e9, 273e9, 14)):
        plan = planned(size)
        assert plan.parameters == pytest.approx(parameters, rel=1e-3) and plan.stored is None
        assert plan.disk["refits"].needed == pytest.approx(refits, rel=0.01)
        assert plan.levels == {"attention": 9, "mlp": levels} and 0.4 <= plan.smallest_share < 0.41
        assert plan.residences["none"].footprint.weights == 2 * plan.parameters
        assert plan.residences["none"].footprint.peak <= 1.25 * 2 * plan.parameters
        assert "sizes from the config" in str(plan)
    assert plan.chosen is not None and plan.chosen.offload == "cpu"  # 70B on 24 GB, one layer at a time
    assert planned("8B").chosen == planned("8B").residences["none"]


def test_what_does_not_fit_says_what_would(planned: Callable[..., Plan]) -> None:
    plan = planned("70B", offload="none")
    assert not plan.fits and plan.chosen is None and "--offload auto fits" in plan.refused
    assert planned("70B", memory="10GB").refused.endswith("MB fits.")
    assert not (crowded := planned("70B", neuron_step=64)).fits  # refits of so many widths fit neither disk nor host
    assert "--neuron-step" in crowded.refused and crowded.chosen is not None
    assert "--racing runs the model as a whole" in planned("70B", racing=True).refused


def test_other_gpus_are_told_where_they_would_spare_the_host(planned: Callable[..., Plan]) -> None:
    """And nobody asks them where the model fits by itself."""
    beside = replace(CARD, cards={"cuda:1": 80 * 10**9, "cuda:2": 80 * 10**9})
    told = planned("70B", beside)
    assert told.chosen == told.residences["cpu"]
    assert "\n            71.9 GB on cuda:1, 65.0 GB on cuda:2; --offload gpu would do, faster than the host\n" in str(
        told
    )
    taken = planned("70B", beside, offload="gpu")
    assert taken.chosen == taken.residences["gpu"]
    assert re.search(
        r"from other GPUs: peak .* on the host  <- chosen\n +71.9 GB on cuda:1, 65.0 GB on cuda:2\n", str(taken)
    )
    assert planned("70B", offload="gpu").refused.startswith(
        f"'{taken.config.model}' has 136.9 GB of layers, and there is no GPU"
    )
    short = planned("70B", replace(beside, cards={"cuda:1": 80 * 10**9}), offload="gpu")
    assert not short.fits and "71.9 GB on cuda:1, no room for 65.0 GB\n" in str(short)
    unasked = replace(beside)
    assert "gpu" not in planned("8B", unasked).residences and "others" not in vars(unasked)


def test_refits_are_counted_where_they_go(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run's folder as well, where that is on another disk."""
    monkeypatch.setenv("LLMBO_PREPARED", str(tmp_path / "prepared"))
    monkeypatch.setattr("llmbo.run.plan.Disk.shares", lambda disk, other: True)
    linked = planned("8B").disk
    monkeypatch.setattr("llmbo.run.plan.Disk.shares", lambda disk, other: False)
    assert linked["refits"].place == tmp_path / "prepared"
    assert planned("8B").disk["run"].needed == linked["run"].needed + linked["refits"].needed


def test_advice_costs_no_more_than_its_caps(planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    many = {"advisor": "openai:some", "advisor_max_tokens": 10**6}
    priced, capped = (
        planned("8B", **many, advisor_price=(1.0, 4.0), **more).advice for more in ({}, {"advisor_max_cost": 0.01})
    )
    assert (
        priced and priced.tokens == 8 * (8700 + 4000) and priced.dollars == pytest.approx(8 * (8700 + 4 * 4000) / 1e6)
    )
    assert capped and capped.dollars == 0.01
    told = str(planned("8B", advisor="mail:letters", advisor_share=0.29, budget=100))
    assert "advice    in at most 29 of 100 trials" in told and "at most 8 calls" in told and "price unknown" in told
    few = planned("8B", **many | {"advisor_max_tokens": 5000}).advice
    assert few and few.tokens == 5000 and few.calls == 8 and few.dollars is None


def test_the_command_says_it_in_a_screen_and_writes_nothing(llmbo: Any) -> None:
    before = llmbo.files()
    result = llmbo(plan=True)
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and llmbo.files() == before and "Report:" not in result.stdout
    assert len(lines) <= 24 and lines[-1].split() == ["fits", "yes"]
    settings = {name: value if isinstance(value, int) else str(value) for name, value in llmbo.defaults.items()}
    settings["samples"] = not settings.pop("no_samples")
    plan = face.plan(**settings)
    timed = ("time", "disk", "memory")  # as free memory and the machine's rates change
    told = [line for line in str(plan).splitlines() if line.split()[0] in ("model", "weights", "shapes", "smallest")]
    assert len(told) == 4 and all(line in lines for line in told) and {line.split()[0] for line in lines} >= {*timed}
    assert plan.fits and plan.stored and plan.stored.here
    refused = llmbo(plan=True, memory="1KB")
    assert refused.exit_code == 2 and refused.stdout.splitlines()[-1].split() == ["fits", "no"]
    assert (
        len(refused.stderr.splitlines()) == 1 and refused.stderr.startswith("error: ") and "--memory" in refused.stderr
    )
    with pytest.raises(ConfigError, match="budgets"):
        face.plan("tiny", budgets=3)
    strange = shutil.copytree(llmbo.defaults["model"], llmbo.folder / "strange") / "config.json"
    strange.write_text(json.dumps(json.loads(strange.read_text()) | {"dtype": "int7"}))
    for flags, says in (
        ({"model": "strange"}, "Cannot load 'strange': "),
        ({"window": 65, "calibration_tokens": 650, "proxy_tokens": 65, "heldout_tokens": 65}, "longer than the 64 positions"),
        ({"items": "none.jsonl"}, "Cannot read the items in 'none.jsonl'"),
        ({"text": "text:none.txt"}, "none.txt"),
    ):  # fmt: skip
        refused = llmbo(plan=True, **flags)
        assert refused.exit_code == 2 and refused.stderr.startswith("error: ") and says in refused.stderr


def test_mapped_weights_stay_in_the_dtype_of_their_files(
    planned: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the plan as in the run, unless the settings name one; here on a machine whose products are faster in the other."""
    for user in ("llmbo.run.plan", "llmbo.problem.residence"):
        monkeypatch.setattr(f"{user}.choose_dtype", lambda dtype, *_: "float32" if dtype == "auto" else dtype)
    planned("70B")
    entries = json.loads((tmp_path / "70B" / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "70B" / "config.json").write_text(json.dumps(entries))
    found = find_prunable(str(tmp_path / "70B"))
    monkeypatch.setattr("llmbo.problem.residence.anatomy_of_config", lambda _: planned("70B").anatomy)
    large = Machine("cuda", 40 * 10**9, 10**12, {"cuda:1": 160 * 10**9})
    alone = Machine("cpu", 60 * 10**9, 60 * 10**9)  # files are all that is left to it
    for machine, settings, dtype in (
        (large, {"offload": "cpu"}, "float32"),
        (large, {"offload": "disk"}, "bfloat16"),
        (large, {"offload": "disk", "dtype": "float16"}, "float16"),
        (large, {"offload": "gpu"}, "bfloat16"),
        (alone, {}, "bfloat16"),
    ):
        settings = {"dtype": "auto", **settings}
        plan = planned("70B", machine, **settings)
        assert plan.dtype == dtype and plan.chosen and f", {dtype} on cpu\n" in str(plan), str(plan)
        size = DTYPES[dtype].itemsize
        assert plan.chosen == residence_of(plan.config, plan.anatomy, size, machine, plan.chosen.offload)
        monkeypatch.setattr(Machine, "of", lambda _, machine=machine: machine)
        assert placed(plan.config, found, settings["dtype"], "cpu") == (dtype, "cpu", plan.chosen.offload)
    refused = planned("70B", offload="disk", dtype="auto", memory="1GB")
    assert not refused.chosen and refused.dtype == "bfloat16"


def test_stored_weights_are_counted_by_files_or_by_the_index(model_folder: Path, tmp_path: Path) -> None:
    whole = stored_weights(str(model_folder))
    assert (
        whole and whole.files == 1 and whole.here and whole.bytes == (model_folder / "model.safetensors").stat().st_size
    )
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    parts = stored_weights(str(tmp_path / "parts"))
    assert parts and parts.files > 2 and parts.here
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_bytes())
    next((tmp_path / "parts").glob("model-00001-*")).unlink()
    torn = stored_weights(str(tmp_path / "parts"))
    assert torn and not torn.here and torn.bytes == index["metadata"]["total_size"] < parts.bytes
    shutil.copy(model_folder / "config.json", tmp_path)
    assert stored_weights(str(tmp_path)) is None


def test_a_hub_name_is_looked_up_in_the_cache(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, as the hub is: with the config alone nothing is known, with the weights beside it they are here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    shutil.copy(model_folder / "config.json", snapshot)
    assert stored_weights("org/tiny") is None
    shutil.copy(model_folder / "model.safetensors", snapshot)
    assert stored_weights("org/tiny") == stored_weights(str(model_folder))


class Counting(TorchDispatchMode):
    """Phases that count operations instead of seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.found = 0, dict[str, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:  # a product may hide in it
                result = func.decompose(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {})) if result is NotImplemented else result
        result = func(*args, **(kwargs or {}))
        self.total += count(*args, **(kwargs or {}), out_val=result)
        return result

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        before = self.total
        yield lambda done: None
        self.found[name] = self.total - before

    def note(self, text: str) -> None:
        pass


def test_operations_are_those_that_torch_counts(model_folder: Path, text_file: Path) -> None:
    """Phase by phase within a factor of 2: torch counts no factorisations, no products in place, and attention not everywhere."""
    config = RunConfig(
        str(model_folder),
        text=f"text:{text_file}",
        window=8,  # attention is next to nothing
        calibration_tokens=128,
        proxy_tokens=64,
        heldout_tokens=64,
        refit_front=1,
    )
    loaded = load_model(config.model, "float32", "cpu")
    windows = load_windows(config, loaded)
    with Counting() as counting, prepared(config, loaded, windows, counting) as problem:
        space = problem.space
        with counting.phase(PHASE):
            refits = sequential_refit(problem.supernet, space.decode(problem.family.at(0.7)), windows.calibration)
            for each in (windows.proxy, windows.heldout):
                problem.supernet.using(refits).quality(space.decode(problem.family.at(0.7)), each)
    one = Rates(matmul=1.0, single=1.0, passes=float("inf"))
    expected = seconds_by_phase(config, space, 4, False, one)
    later = ("allocation", "width exchanges", "dense model", PHASE)
    found = {name: counting.found.pop(name) for name in later} | {"importance and refits": sum(counting.found.values())}
    ratios = {name: expected[name] / count for name, count in found.items()}
    assert all(0.5 < ratio < 2 for ratio in ratios.values()), ratios


def test_writing_a_text_counts_where_the_model_writes_it(model_folder: Path) -> None:
    config = RunConfig(str(model_folder), text="self", window=8, calibration_tokens=128)
    loaded = load_model(config.model, "float32", "cpu")
    with Counting() as counting:
        load_windows(config, loaded, phases=counting)
    one = Rates(matmul=1.0, single=1.0, passes=float("inf"))
    space = space_of(config, anatomy_of(loaded.model))
    assert 0.5 < seconds_by_phase(config, space, 4, False, one)[WRITING] / counting.found[WRITING] < 2
    assert WRITING not in seconds_by_phase(replace(config, text="builtin"), space, 4, False, one)


def test_seconds_follow_settings_and_rates(planned: Callable[..., Plan]) -> None:
    plan = partial(planned, calibration_tokens=16384)
    base = plan("8B").seconds
    assert plan("8B", budget=120, batch=8).seconds["search"] > 1.5 * base["search"]
    first = "importance and refits"
    assert planned("8B", calibration_tokens=65536).seconds[first] > 1.5 * base[first]
    assert plan("8B", compensation=False).seconds[first] < base[first]
    one, three = (planned("8B", calibration_tokens=131072, refit_front=number) for number in (1, 3))
    assert PHASE not in base and three.seconds[PHASE] == pytest.approx(3 * one.seconds[PHASE])
    assert {**three.seconds, PHASE: 0} == {**one.seconds, PHASE: 0}
    assert "refits in sequence of 3 models" in str(three) and "refits in sequence" not in str(plan("8B"))
    waiting = plan("8B", offload="cpu").seconds
    walk = 2 * 6.98e9 / RATES.link + 3 * 6.98e9 / RATES.passes  # type: ignore[operator]
    # A walk for each round of four.
    assert waiting["search"] - base["search"] == pytest.approx(15 * walk, rel=0.01)
    assert Work(3.0, 4.0, 5.0, 6.0).seconds(Rates(3.0, 2.0, 1.0, 6.0)) == 1 + 2 + 5 + 1


def test_several_processes_share_a_host_and_the_search(planned: Callable[..., Plan]) -> None:
    """Two cards halve the search and not the preparation; two processes on one processor halve nothing but its memory."""
    one, cards = planned("8B"), planned("8B", devices=("cuda:0", "cuda:1"))
    assert cards.seconds["search"] == one.seconds["search"] / 2
    assert {**cards.seconds, "search": 0} == {**one.seconds, "search": 0}
    assert (cards.machine.free, cards.machine.host) == (CARD.free, CARD.host // 2) and "cuda:0, cuda:1" in str(cards)
    alone, host = planned("8B", Machine("cpu", 10**11, 10**11)), Machine("cpu", 35 * 10**9, 35 * 10**9)
    two = planned("8B", Machine("cpu", 10**11, 10**11), ("cpu", "cpu"))
    assert two.seconds == alone.seconds and two.machine.free == two.machine.host == 10**11 // 2
    assert planned("8B", host, offload="none").fits and not planned("8B", host, ("cpu", "cpu"), offload="none").fits


def test_rates_are_measured_by_the_clock(planned: Callable[..., Plan]) -> None:
    """Operations over seconds, whatever the clock says; on a CPU nothing is moved."""
    ticks = iter(range(10**6))
    sizes = replace(planned("8B").anatomy, hidden_size=8, intermediate_size=16)
    rates = Rates.measure(sizes, torch.float32, "cpu", 4, clock=lambda: float(next(ticks)))
    assert rates == Rates(2 * 4 * 8 * 16, 2 * 4 * 8 * 16, 2 * 4 * 16)


def test_refits_on_disk_are_the_ones_that_are_solved(model_folder: Path) -> None:
    plan = face.plan(str(model_folder), dtype="float32", window=16, refit_anchors=2)
    space = SearchSpace(anatomy_of(AutoModelForCausalLM.from_pretrained(model_folder)))
    assert plan.disk["refits"].needed == 3 * 4 * solved_values(space.anatomy, space.widths)
