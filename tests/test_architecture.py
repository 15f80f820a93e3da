"""Imports point one way, and the command line starts without the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file may import only what stands above it; a package's `__init__` goes by the package's name. A new file needs a place here.
ORDER = {
    "pruning": (
        "errors", "modeling_pruned", "projection", "families", "anatomy", "architecture", "masks", "cost", "calibration",
        "likelihood", "choices", "importance", "compensation", "supernet", "narrowing", "moves", "shrink", "latency", "memory",
        "export.rebuild", "export.folder", "export.verify", "export.hf", "export.reload_hf",
        "export.gguf_tokenizer", "export.gguf_tensors", "export.gguf_file", "export.llama_cpp", "export.reload_gguf", "export",
    ),
    "llmbo": (
        "__init__", "errors", "types", "objectives", "advisor", "advisor.spec", "advisor.parts", "config", "models",
        "space", "family", "knapsack", "expansion", "gain", "pareto", "surrogate", "threads", "baselines.designs", "baselines",
        "baselines.local_search", "baselines.nsga2", "baselines.knapsack", "baselines.optuna_samplers",
        "baselines.plain_botorch", "energy", "hardware", "acquisition", "evaluate", "racing",
        "advisor.context", "advisor.replies", "advisor.roles", "advisor.parse", "advisor.render", "advisor.client",
        "advisor.openai_client", "advisor.local", "advisor.llm",
        "advisor.offline", "advisor.ledger", "advisor.replay", "advisor.probe", "advisor.proposer", "advisor.summary",
        "storage", "loop", "report.schema", "report.files", "report.picture", "report.build", "report.table",
        "report.comparison", "report.page", "report.write", "report", "pulse", "assemble_advisor", "advised", "strategies",
        "assemble", "advise", "dashboard", "progress", "card", "rebuilding", "exporting", "checkpoints", "perplexity",
        "tasks", "evaluation", "training", "recovery", "reranking", "comparison", "comparison.config", "comparison.store",
        "comparison.problems", "comparison.recorded", "comparison.runner", "comparison.statistics",
        "comparison.result", "comparison.display", "comparison.page", "comparison.session", "cli.common",
        "cli.advise", "cli.compare", "cli.evaluate", "cli.export", "cli.models", "cli.optimize", "cli.profile", "cli.recover",
        "cli.rerank",
        "cli.report", "cli.watch", "cli", "__main__",
    ),
}  # fmt: skip
FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
FOREIGN_TO_PRUNING = {
    "llmbo",
    "prompts",
    "experiments",
    "botorch",
    "gpytorch",
    "optuna",
    "jinja2",
    "pydantic",
    "typer",
    "rich",
}
HEAVY = ("torch", "transformers", "botorch", "gpytorch", "optuna", "matplotlib", "pydantic")


def imported(path: Path) -> Iterator[str]:
    """Dotted names of everything `path` imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            yield node.module
            if node.module in ORDER:  # `from llmbo import loop` names a file too
                yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name in ORDER[node.module])


def place(path: Path) -> tuple[str, str]:
    """Package and name in ORDER."""
    package, *parts = path.relative_to(ROOT).with_suffix("").parts
    return package, ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_stands_above_it(path: Path) -> None:
    package, own_name = place(path)
    order = ORDER[package]
    assert own_name in order, f"give {path} its place in ORDER"
    above = order[: order.index(own_name)]
    for name in imported(path):
        head, _, rest = name.partition(".")
        if head == package and rest:
            assert rest in above, f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if "pruning" in path.parts], ids=lambda path: path.name)
def test_the_pruning_library_knows_nothing_about_search(path: Path) -> None:
    assert FOREIGN_TO_PRUNING.isdisjoint(name.partition(".")[0] for name in imported(path))


def test_no_listed_file_is_missing() -> None:
    """A row that no file stands for would weaken the order unseen."""
    found = {place(path) for path in FILES}
    assert {(package, name) for package, names in ORDER.items() for name in names} <= found


def test_the_command_line_starts_without_heavy_libraries() -> None:
    program = f"import sys, llmbo.cli; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == ""
