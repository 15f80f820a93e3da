"""Bad settings are refused with flag and value; what may change between two starts is known."""

import dataclasses
import inspect
from typing import Any

import pytest

from llmbo.cli.optimize import optimize
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
        ({"neuron_multiple": 0}, "--neuron-multiple .* 0"),
        ({"min_share": 0.0}, "--min-share .* 0.0"),
        ({"min_share": 1.0}, "--min-share .* 1.0"),
        ({"min_share": float("nan")}, "--min-share .* nan"),
        ({"strategy": "greedy"}, "'greedy'.*qnehvi.*threshold.*random"),
        ({"strategy": "optuna-tpe-recipes"}, "optuna-tpe-recipes .*--recipe-search"),
        ({"dtype": "int8"}, "'int8'.*float32, bfloat16"),
        ({"objectives": ("kl", "speed")}, "'speed'"),
        ({"objectives": ("kl", "loss", "params"), "racing": True}, "--racing .* kl,loss,params"),
        ({"objectives": ("accuracy", "params")}, "--items FILE"),
        ({"reference_point": (1.0,)}, "--reference-point"),
        ({"name": "a/b"}, "--name .* 'a/b'"),
        ({"name": ".."}, r"--name .* '\.\.'"),
        (
            {"advisor": "heuristik"},
            "'heuristik': did you mean heuristic.*none, random, heuristic, hostile, openai:MODEL",
        ),
        ({"advisor": "openai"}, r"'openai:MODEL\[@BASE_URL\]', got 'openai'"),
        ({"advisor": "openai:@http://h/v1"}, "got 'openai:@http"),
        ({"advisor": "openai:m@http:///v1"}, "needs a server"),
        ({"advisor": "openai:m@http://user:pw@h/v1"}, "OPENAI_API_KEY"),
        ({"advisor": "openai:m@http://h/v1?key=x"}, "OPENAI_API_KEY"),
        ({"advisor": "heuristic:x"}, "'heuristic', got 'heuristic:x'"),
        ({"advisor": "replay"}, "'replay:FILE', got 'replay'"),
        ({"advisor": "heuristic", "strategy": "random"}, "qnehvi only, got 'random'"),
        ({"advisor_hooks": ("propos",)}, "'propos': did you mean propose"),
        ({"advisor_hooks": ()}, "--advisor-hooks"),
        ({"advisor_hooks": ("filter", "filter")}, "'filter,filter'"),
        ({"advisor_share": 1.5}, "--advisor-share .* 1.5"),
        ({"advisor_warm_start": 7}, "--advisor-warm-start .* 7"),
        ({"advisor_context": "fall"}, "'fall': .*one of full, no-tables, no-optimiser, shuffled, partial, none"),
        ({"chat": True, "text": "self"}, "--chat .* --text self"),
        ({"heldout_text": "self"}, "--heldout-text .* one text .* 'self'"),
        ({"heldout_text": "mix:python=1"}, "--heldout-text .* one text .* 'mix:python=1'"),
        ({"advisor_every": 0}, "--advisor-every .* 0"),
        ({"advisor_max_calls": 0}, "--advisor-max-calls .* 0"),
        ({"advisor_max_tokens": -1}, "--advisor-max-tokens .* -1"),
        ({"advisor_max_seconds": float("nan")}, "--advisor-max-seconds .* nan"),
        ({"advisor_deadline": 0.0}, "--advisor-deadline .* 0"),
        ({"advisor_price": (1.0,)}, "--advisor-price"),
        ({"advisor_max_cost": 1.0}, "--advisor-max-cost 1.0 .*--advisor-price"),
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
    "compensation": False, "text": "self", "min_share": 0.5, "neuron_step": 32, "neuron_multiple": 64, "query_heads": True,
    "refit_anchors": 2, "elastic": "adapter", "calibration_tokens": 5120, "proxy_tokens": 5120,
    "heldout_tokens": 5120, "window": 128, "dtype": "float32", "device": "cpu", "advisor": "heuristic",
    "advisor_hooks": ("propose",), "advisor_share": 0.5, "advisor_warm_start": 2,
    "advisor_context": "none", "advisor_every": 1, "maximum": ("kl=0.5",),
    "context": 99, "serve_batch": 2, "quantize": "q4_k_m", "latency_target": "cpu", "racing": True, "items": "x.jsonl",
    "chat": True, "heldout_text": "none", "recipe": "dense-prices", "recipe_search": True, "deploy": ("vllm",),
}  # fmt: skip


def test_only_budget_name_place_and_caps_may_change() -> None:
    free: dict[str, Any] = {
        "budget": 99, "name": "other", "storage": "sqlite:///x.db", "advisor_max_calls": 99, "advisor_max_tokens": 99,
        "advisor_max_cost": 9.0, "advisor_max_seconds": 9.0, "advisor_deadline": 9.0, "advisor_price": (1.0, 2.0),
        "advisor_reply_tokens": 99, "samples": False, "memory": "1GB", "offload": "disk", "refit_front": 3, "artifacts": "there",
    }  # fmt: skip
    assert {*CHANGED, *free} == {
        field.name for field in dataclasses.fields(RunConfig)
    }  # a new setting must take a side
    before = RunConfig(model="llama").settings()
    for key, value in CHANGED.items():
        needed = {"objectives": ("accuracy", "params")} if key == "items" else {}
        assert RunConfig(**{"model": "llama", **needed, key: value}).settings()[key] != before[key], key
    assert RunConfig(model="llama", **free).settings() == before


def test_windows_are_whole() -> None:
    config = RunConfig(model="llama", window=100, calibration_tokens=1099, proxy_tokens=100, heldout_tokens=250)
    assert config.windows == {"calibration": 10, "proxy": 1, "heldout": 2}


def test_the_command_line_has_the_defaults_of_the_config() -> None:
    flags = {name: parameter.default for name, parameter in inspect.signature(optimize).parameters.items()}
    for item in dataclasses.fields(RunConfig):
        if item.name != "model":  # it must be given
            expected = ",".join(item.default) or None if isinstance(item.default, tuple) else item.default
            expected = None if item.name == "items" else expected  # a list, empty
            assert flags[item.name] == expected, item.name
