"""Every command in the documentation is one that the command line understands."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from llmbo.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```(?:sh|console|bash|)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Placeholders; and `--install-completion` would act while it is parsed.
NOT_PARSED = re.compile(r"…|\.\.\.|-completion| N( |$)")


def commands(page: Path) -> Iterator[str]:
    for block in CODE.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.strip().removeprefix("$ ").partition(" | ")[0]
            if command.startswith("llmbo ") and not NOT_PARSED.search(command):
                yield command


FOUND = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]


def test_the_documentation_has_commands() -> None:
    assert len(FOUND) > 15


@pytest.mark.parametrize(("page", "command"), FOUND, ids=[" ".join(pair) for pair in FOUND])
def test_commands_in_the_documentation_are_understood(page: str, command: str) -> None:
    """Parsed to the end as typed, not run: an unknown command, option or a value of the wrong type is an error."""
    words = shlex.split(command.split(" > ")[0].split(" 2> ")[0], comments=True)[1:]
    group = typer.main.get_command(app)
    try:
        group: Any = typer.main.get_command(app)
        context = group.make_context("llmbo", words)
        name, subcommand, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        subcommand.make_context(name, rest, parent=context)
    except (SystemExit, typer.Exit) as ended:  # --help
        assert getattr(ended, "code", 0) == 0


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_in_its_help(name: str) -> None:
    assert f"llmbo {name}" in COMMANDS[name].help, f"`llmbo {name} --help` has no example"
