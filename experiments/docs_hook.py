"""MkDocs hook: the order of the pages, the command reference from `--help`, and the table of families from their rows."""

from pathlib import Path
from typing import Any

from pruning.families import FAMILIES

FIRST = ("index.md", "tutorial.md", "notebook.ipynb")
UNDERSTAND = ("explanation.md", "glossary.md")
LOOK_UP = ("reference/cli.md", "reference/api.md")
COMMANDS_MARKER = "<!-- the output of --help for every command -->"
FAMILIES_MARKER = "<!-- the rows of pruning/families.py -->"


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
    for marker, text in ((COMMANDS_MARKER, command_reference), (FAMILIES_MARKER, family_table)):
        if marker in markdown:
            markdown = markdown.replace(marker, text())
    return markdown


def family_table() -> str:
    """The built-in families, as a Markdown table."""
    rows = [f"| `{family.model_type}` | {family.models} | {family.notes} |" for family in FAMILIES.values()]
    return "\n".join(["| model_type | models | what is particular |", "|---|---|---|", *rows])


def command_reference() -> str:
    """All commands with their options, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from llmbo.cli import app

    command = typer.main.get_command(app)
    return get_docs_for_click(obj=command, ctx=typer.Context(command), name="llmbo")
