"""Every number that can be typed refuses what is none, or nonsense: one line with the option's name, exit code 2, before any work.

The walk is over the options that the commands declare, so a new one joins by itself.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

import llmbo
from llmbo.cli import app
from llmbo.comparison.config import read_config
from llmbo.config import RunConfig
from llmbo.errors import ConfigError

NONSENSE = ("nan", "inf", "-inf", "-1", "1e308", str(10**30), "")
# What else each command wants. Nothing of it exists: whatever looks there before it looks at the number fails the test.
NEEDED = {
    "optimize": ["--model", "./nowhere"],
    "profile": ["--model", "./nowhere"],
    "evaluate": ["./nowhere"],
    "elastic": ["--model", "./nowhere", "--out", "made", "--steps", "1"],
    "recover": ["./nowhere", "--out", "made", "--steps", "1"],
    "rerank": ["./nowhere"],
    "export": ["./nowhere", "--trial", "0", "--format", "hf", "--out", "made"],
    "watch": ["./nowhere"],
    "worker": ["./nowhere"],
    "advise": ["./nowhere"],
    "report": ["./nowhere"],
    "compare": ["./nowhere.toml"],
    "models": [],
    "cache": [],
}
# Numbers inside words: (command, option) -> how one is written.
WRITTEN = {
    ("optimize", "--reference-point"): ("{},1", "1,{}"),
    ("optimize", "--max"): ("kl={}", "params={}"),
    ("optimize", "--advisor-price"): ("{},1", "1,{}"),
    ("optimize", "--memory"): ("{}GB",),
    ("compare", "--seeds"): ("{}",),
    ("export", "--max-shard-size"): ("{}", "{}GB"),
    ("export", "--fit"): ("params<={}",),
}


def is_number(hint: Any) -> bool:
    return bool({int, float} & {hint, *getattr(hint, "__args__", ())})


def numeric_options() -> list[tuple[str, str]]:
    """Every command and every option of it whose type is a number."""
    commands = {
        str(command.name or getattr(command.callback, "__name__", "")): command.callback
        for command in app.registered_commands
    }
    assert {*NEEDED} == {*commands}
    return [
        (name, f"--{parameter.replace('_', '-')}")
        for name, function in commands.items()
        for parameter, hint in get_type_hints(function).items()
        if is_number(hint)
    ]


def refused(command: str, option: str, value: str) -> str:
    answer = CliRunner().invoke(app, [command, *NEEDED[command], option, value])
    said = f"{command} {option} {value!r}: {answer.output or answer.exception!r}"
    assert answer.exit_code == 2 and answer.stdout == "" and "Traceback" not in answer.output, said
    assert len(answer.stderr.splitlines()) == 1 and answer.stderr.startswith("error: ") and option in answer.stderr, (
        said
    )
    return answer.stderr


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path) -> Iterator[None]:
    with contextlib.chdir(tmp_path):
        yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "option"), numeric_options())
def test_an_option_refuses_nonsense(command: str, option: str) -> None:
    for value in NONSENSE:
        refused(command, option, value)


@pytest.mark.parametrize(("command", "option"), list(WRITTEN))
def test_numbers_inside_words_are_checked_as_well(command: str, option: str) -> None:
    for form in WRITTEN[command, option]:
        for value in NONSENSE:
            refused(command, option, form.format(value))


@pytest.mark.parametrize(
    ("command", "field"),
    [("optimize", name) for name, hint in get_type_hints(RunConfig).items() if is_number(hint)],
)
def test_a_keyword_refuses_nonsense(command: str, field: str) -> None:
    """Before the model: there is none."""
    whole = get_type_hints(RunConfig)[field] is int
    values: list[Any] = [
        float("nan"),
        float("inf"),
        -float("inf"),
        -1,
        1e308,
        10**30,
        "",
        "3",
        *([2.5] if whole else []),
    ]
    for value in values:
        with pytest.raises(ConfigError, match=f"--{field.replace('_', '-')} ") as caught:
            llmbo.optimize("./nowhere", show="nothing", **{field: value})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["seeds", "checkpoints", "batch", "judged_points", "margin"])
def test_a_key_of_a_comparison_refuses_nonsense(key: str, tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    for value in ("nan", "inf", "-inf", "-1", "1e308", str(10**30), '""'):
        listed = f"[{value}]" if key in ("seeds", "checkpoints") else value
        file.write_text(f'strategies = ["threshold"]\n{key} = {listed}\n[problem]\nrecorded = "problem-r-surrogate"\n')
        with pytest.raises(ConfigError, match=key) as caught:
            read_config(file)
        assert "\n" not in str(caught.value)
    file.unlink()
