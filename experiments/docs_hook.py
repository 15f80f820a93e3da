"""MkDocs hook: the order of the pages, and the command reference from `--help`."""

from pathlib import Path
from typing import Any

FIRST = ("index.md", "tutorial.md", "notebook.ipynb")
UNDERSTAND = ("explanation.md", "glossary.md")
LOOK_UP = ("reference/cli.md", "reference/api.md")
MARKER = "<!-- the output of --help for every command -->"


def on_config(config: Any) -> Any:
    """Every page is in the menu: a new `docs/<topic>.md` becomes a guide without being listed anywhere."""
    docs = Path(config.docs_dir)
    placed = {*FIRST, *UNDERSTAND, *LOOK_UP}
    guides = sorted(path.name for path in docs.glob("*.md") if path.name not in placed)
    config.nav = [
        *FIRST,
        {"Guides": guides},
        {"Understand": list(UNDERSTAND)},
        {"Look up": list(LOOK_UP)},
    ]
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(MARKER, command_reference()) if MARKER in markdown else markdown


def command_reference() -> str:
    """All commands with their options, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from llmbo.cli import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="llmbo")
