"""A run on a device without float64, as Apple's GPUs are: nothing of it is ever asked for there, from loading to export."""

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LlamaConfig

from llmbo.models import loading
from llmbo.models.loading import find_prunable
from llmbo.models.placement import choose_device, choose_dtype
from llmbo.models.stored import anatomy_of_config

NAME = "meta"  # torch knows this device everywhere and has no kernels of its own for it


class OnDevice(Tensor):
    """A tensor on the device: its values lie in a CPU tensor that nobody else sees."""

    values: Tensor

    @staticmethod
    def __new__(cls: type["OnDevice"], values: Tensor) -> "OnDevice":
        tensor: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device=torch.device(NAME),
        )  # fmt: skip
        tensor.values = values
        return tensor

    def tolist(self) -> Any:
        return self.values.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = OnDevice(self.values.clone()).requires_grad_(self.requires_grad)
        return memo.setdefault(id(self), copied)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError("The device is gone.")


class Device(TorchDispatchMode):
    """Adds the device to torch for as long as the context lasts: kernels run on the CPU, and none sees or makes `refused` dtypes."""

    def __init__(self, *refused: torch.dtype) -> None:
        super().__init__()
        self.refused = refused or (torch.float64,)

    def put(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dtype in self.refused:
            raise RuntimeError(f"This device has no {leaf.dtype}.")
        return OnDevice(leaf)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        given = (args, dict(kwargs or {}))
        leaves = tree_leaves(given)
        named = [leaf.type == NAME for leaf in leaves if isinstance(leaf, torch.device)]
        there = named[0] if named else any(isinstance(leaf, Tensor) and leaf.device.type == NAME for leaf in leaves)
        args, options = tree_map(_on_cpu, given)
        found = func(*args, **options)
        return tree_map(self.put, found) if there else found


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    if isinstance(leaf, Tensor) and leaf.device.type == NAME:
        # `torch.tensor([], device=...)`, where a cache begins, asks no mode
        assert isinstance(leaf, OnDevice) or not leaf.numel()
        return leaf.values if isinstance(leaf, OnDevice) else torch.empty(leaf.shape, dtype=leaf.dtype)
    return leaf


class Generator(torch.Generator):
    """The stub draws on the CPU."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu" if str(device) == NAME else device)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, model_folder: Path) -> str:
    anatomy = anatomy_of_config(
        find_prunable(str(model_folder))
    )  # made where the stub would take the model for its own
    for room in ("problem.residence", "run.assemble"):
        monkeypatch.setattr(f"llmbo.{room}.anatomy_of_config", lambda found: anatomy)
    monkeypatch.setattr(torch, "Generator", Generator)
    # transformers leaves alone what is to lie on this device
    read = loading._read
    monkeypatch.setattr(loading, "_read", lambda found, dtype, device: read(found, dtype, "cpu").to(device))
    # what wraps a tensor made in inference mode cannot leave it
    monkeypatch.setattr(torch.inference_mode, "__enter__", lambda self: torch.no_grad.__enter__(self))
    monkeypatch.setattr(torch.inference_mode, "__exit__", lambda self, *error: torch.no_grad.__exit__(self, *error))
    return NAME


def test_the_stub_computes_and_refuses_float64() -> None:
    """Or the test below would prove nothing."""
    with Device():
        there = torch.arange(3.0, device=NAME)
        assert isinstance(there, OnDevice) and there.device.type == NAME
        assert (there.cpu().double() + 1).tolist() == [1, 2, 3]
        assert type(copy.deepcopy(there).cpu()) is Tensor
        for forbidden in (
            lambda: there.double(),
            lambda: torch.zeros(2, dtype=torch.float64, device=NAME),
            lambda: torch.zeros(2, dtype=torch.float64).to(NAME),
            lambda: there + torch.zeros(3, dtype=torch.float64),
        ):
            with pytest.raises(RuntimeError, match="float64"):
                forbidden()


def test_a_whole_run_asks_the_device_for_no_float64(llmbo: Any, device: str) -> None:
    """Statistics, scores, refits, sensitivities, exchanges, proxy, races and held-out windows."""
    few = {"neuron_step": 8}  # widths: every operation takes its time here
    with Device():
        done = llmbo(device=device, budget=4, racing=True, **few)  # a cache begins with what asks no mode
        assert done.exit_code == 0, done.output
    assert llmbo.report()["run"]["device"] == device
    assert {trial["state"] for trial in llmbo.report()["trials"]} == {"complete"}


def test_the_best_device_of_a_mac_is_taken_with_a_dtype_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == "mps"
    config = LlamaConfig(hidden_size=32)
    ticks = itertools.chain(*([0.0, 1.0] * 6, [0.0, 0.5] * 6))  # bfloat16 is the faster one
    with Device():
        assert choose_dtype("auto", NAME, config, itertools.accumulate(ticks).__next__) == "bfloat16"
    with Device(torch.float64, torch.bfloat16):  # before macOS 14
        assert choose_dtype("auto", NAME, config) == "float32"


def test_no_table_of_peak_memory_is_made_where_no_allocator_tells_it(llmbo: Any, device: str) -> None:
    with Device():
        done = llmbo(device=device, objectives="kl,peak_memory", context=16, budget=1)
    assert done.exit_code == 2 and f"not on '{device}'" in done.output and "--latency-target cpu" in done.output
