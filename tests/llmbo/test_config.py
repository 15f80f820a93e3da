"""Bad settings are refused with flag and value; what may change between two starts is known."""

import dataclasses
from typing import Any

import pytest

from llmbo.config import RunConfig
from llmbo.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "--budget .* 0"),
        ({"batch": -3}, "--batch .* -3"),
        ({"window": 7}, "--window .* 7"),
        ({"calibration_tokens": 255}, r"--calibration-tokens .*\(256\).* 255"),
        ({"proxy_tokens": 10, "window": 16}, r"--proxy-tokens .*\(16\).* 10"),
        ({"heldout_tokens": 0}, "--heldout-tokens .* 0"),
        ({"seed": -1}, "--seed .* -1"),
        ({"seed": 2**64}, "--seed .* 18446744073709551616"),
        ({"neuron_step": -4}, "--neuron-step .* -4"),
        ({"min_share": 0.0}, "--min-share .* 0.0"),
        ({"min_share": 1.0}, "--min-share .* 1.0"),
        ({"min_share": float("nan")}, "--min-share .* nan"),
        ({"strategy": "greedy"}, "'greedy'.*qnehvi.*threshold.*random"),
        ({"dtype": "int8"}, "'int8'.*float32, bfloat16"),
        ({"objectives": ("kl", "speed")}, "'speed'"),
        ({"objectives": ("kl", "loss", "params"), "strategy": "qnehvi"}, "kl,loss,params"),
        ({"reference_point": (1.0,)}, "--reference-point"),
        ({"name": "a/b"}, "--name .* 'a/b'"),
        ({"name": ".."}, r"--name .* '\.\.'"),
    ],
    ids=str,
)
def test_a_bad_setting_is_named_with_its_value(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RunConfig(**{"model": "llama", **settings})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["llama", "org/name", "/a/folder/", "../up", "..", "~/models/my model", "ünï"])
def test_the_default_name_is_one_folder(model: str) -> None:
    name = RunConfig(model=model).name
    assert name and "/" not in name and name.strip(".") and not name.startswith("-")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(model="llama").budget = 3  # type: ignore[misc]


CHANGED: dict[str, Any] = {
    "model": "other", "batch": 5, "seed": 1, "strategy": "random", "objectives": ("loss", "params"), "reference_point": (1.0, 0.9),
    "compensation": False, "text": "self", "min_share": 0.5, "neuron_step": 32, "calibration_tokens": 5120, "proxy_tokens": 5120,
    "heldout_tokens": 5120, "window": 128, "dtype": "float32", "device": "cpu",
}  # fmt: skip


def test_only_budget_name_and_place_may_change() -> None:
    free = {"budget": 99, "name": "other", "storage": "sqlite:///x.db"}
    assert {*CHANGED, *free} == {
        field.name for field in dataclasses.fields(RunConfig)
    }  # a new setting must take a side
    before = RunConfig(model="llama").settings()
    for key, value in CHANGED.items():
        assert RunConfig(**{"model": "llama", key: value}).settings() != before, key
    assert RunConfig(model="llama", **free).settings() == before


def test_windows_are_whole() -> None:
    config = RunConfig(model="llama", window=100, calibration_tokens=1099, proxy_tokens=100, heldout_tokens=250)
    assert config.windows == {"calibration": 10, "proxy": 1, "heldout": 2}
