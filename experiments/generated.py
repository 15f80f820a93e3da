"""What in `docs/` follows from the code: the format of reports, the table of objectives. `make generated` writes it, a test compares."""

import re
from collections.abc import Callable
from pathlib import Path

from llmbo.config.objectives import objectives_table
from llmbo.report import json_schema

DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- `make generated` writes this table -->\n\n).*?(?=\n\n)", re.DOTALL)

# file in `docs/` -> what makes its new content out of the present one
GENERATED: dict[str, Callable[[str], str]] = {
    "report.schema.json": lambda _: json_schema(),
    "objectives.md": lambda page: TABLE.sub(lambda found: found[1] + objectives_table(), page),
}

if __name__ == "__main__":
    for name, generate in GENERATED.items():
        file = DOCS / name
        file.write_text(generate(file.read_text(encoding="utf-8")), encoding="utf-8")
