"""What in `docs/` follows from the code: the format of reports, the tables of rows. `make generated` writes it, a test compares."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from llmbo.config.formats import FORMATS
from llmbo.config.objectives import objectives_table
from llmbo.report import json_schema
from pruning.families import FAMILIES

DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- `make generated` writes this table -->\n\n).*?(?=\n\n)", re.DOTALL)


def markdown(*rows: Sequence[str]) -> str:
    """Rows as a Markdown table, the headings first."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def families_table() -> str:
    rows = [(f"`{family.model_type}`", family.models, family.notes) for family in FAMILIES.values()]
    return markdown(("model_type", "models", "what is particular"), *rows)


def formats_table() -> str:
    rows = [
        (f"`{row.name}`", row.description, row.loads_with, ", ".join(f"`{dtype}`" for dtype in row.choices))
        for row in FORMATS.values()
    ]
    return markdown(("`--format`", "result", "loads with", "`--dtype`, the default first"), *rows)


def with_table(table: Callable[[], str], page: str) -> str:
    return TABLE.sub(lambda found: found[1] + table(), page)


# file in `docs/` -> what makes its new content out of the present one
GENERATED: dict[str, Callable[[str], str]] = {
    "report.schema.json": lambda _: json_schema(),
    "objectives.md": partial(with_table, objectives_table),
    "families.md": partial(with_table, families_table),
    "export.md": partial(with_table, formats_table),
}

if __name__ == "__main__":
    for name, generate in GENERATED.items():
        file = DOCS / name
        file.write_text(generate(file.read_text(encoding="utf-8")), encoding="utf-8")
