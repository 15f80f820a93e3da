"""Do the tests find planted faults? Each is planted in a copy of the tree, and the tests of its file must then fail.

    python -m experiments.mutants                    the kept list, `kept.toml`: one survivor fails
    python -m experiments.mutants --sampled 200      faults that Cosmic Ray plants (pip install '.[mutants]'), and the share found

Survivors are printed as they come. Every fault costs the start of pytest, and its tests up to the first that fails.
"""

import argparse
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = ("llmbo", "pruning", "prompts", "tests", "experiments", "docs", "pyproject.toml")
SECONDS = 240  # that tests may take on a fault: it may have made an endless loop
FAILED = (1, 2)  # what pytest returns for failed tests, and for a module that cannot be imported

# Where the search's and the pruning library's substance is, and the tests that speak of it, the quickest first.
CORE: dict[str, tuple[str, ...]] = {
    "llmbo/search/acquisition.py": ("llmbo/search/test_posterior.py", "llmbo/search/test_acquisition.py", "llmbo/search/test_proposers.py"),
    "llmbo/search/gain.py": ("llmbo/search/test_gain.py", "llmbo/search/test_surrogate.py"),
    "llmbo/search/loop.py": ("llmbo/search/test_loop.py",),
    "llmbo/search/pareto.py": ("llmbo/search/test_pareto.py", "llmbo/search/test_acquisition.py"),
    "llmbo/search/pool.py": ("llmbo/search/test_pool.py", "llmbo/search/test_acquisition.py"),
    "llmbo/search/posterior.py": ("llmbo/search/test_posterior.py", "llmbo/search/test_acquisition.py"),
    "llmbo/search/racing.py": ("llmbo/search/test_racing.py",),
    "llmbo/search/soundness.py": ("llmbo/search/test_soundness.py",),
    "llmbo/search/surrogate.py": ("llmbo/search/test_surrogate.py", "llmbo/search/test_posterior.py", "llmbo/search/test_racing.py"),
    "llmbo/problem/depth.py": ("llmbo/search/test_depth.py", "llmbo/search/test_surrogate.py"),
    "llmbo/problem/expansion.py": ("llmbo/problem/test_expansion.py", "llmbo/problem/test_path.py"),
    "llmbo/problem/family.py": ("llmbo/problem/test_family.py", "llmbo/problem/test_expansion.py", "llmbo/problem/test_path.py"),
    "llmbo/problem/knapsack.py": ("llmbo/problem/test_expansion.py",),
    "llmbo/problem/space.py": ("llmbo/problem/test_space.py", "llmbo/problem/test_family.py"),
    "pruning/compensation.py": ("pruning/test_compensation.py",),
    "pruning/cost.py": ("pruning/test_cost.py",),
    "pruning/exchanges.py": ("pruning/test_exchanges.py", "llmbo/problem/test_path.py"),
    "pruning/importance.py": ("pruning/test_importance.py",),
    "pruning/likelihood.py": ("pruning/test_likelihood.py", "pruning/test_sensitivity.py"),
    "pruning/masks.py": ("pruning/test_masks.py",),
    "pruning/sensitivity.py": ("pruning/test_sensitivity.py",),
    "pruning/shrinking.py": ("pruning/test_shrink.py",),
    "pruning/statistics.py": ("pruning/test_importance.py", "pruning/test_compensation.py"),
    "pruning/supernet.py": ("pruning/test_supernet.py", "pruning/test_exchanges.py"),
    "pruning/surgeon.py": ("pruning/test_surgeon.py", "pruning/test_refits.py"),
}  # fmt: skip

# Cosmic Ray's operators that leave code which still runs: `>>` between floats or a type's `|` says nothing about tests.
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{a}_{b}" for a in ("Add", "Sub", "Mul", "Div") for b in ("Add", "Sub", "Mul", "Div") if a != b),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for a, b in (
        ("Eq", "NotEq"), ("NotEq", "Eq"), ("Lt", "LtE"), ("Lt", "Gt"), ("LtE", "Lt"), ("LtE", "GtE"),
        ("Gt", "GtE"), ("Gt", "Lt"), ("GtE", "Gt"), ("GtE", "LtE"),
    )),
    "core/ReplaceUnaryOperator_Delete_USub", "core/ReplaceUnaryOperator_Delete_Not", "core/AddNot",
    "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue", "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd",
    "core/ReplaceBreakWithContinue", "core/ReplaceContinueWithBreak", "core/NumberReplacer", "core/ZeroIterationForLoop",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Args:
        file: Relative to the root.
        source: The whole file with the fault in it.
        tests: Arguments for pytest.
    """

    name: str
    file: str
    source: str
    tests: tuple[str, ...]


def kept() -> list[Mutant]:
    """The list in `kept.toml`.

    Raises:
        ValueError: A line is not there, or not once, or its tests are not there.
    """
    return [
        _planted(**row)
        for row in tomllib.loads((Path(__file__).parent / "kept.toml").read_text(encoding="utf-8"))["mutant"]
    ]


def _planted(name: str, file: str, before: str, after: str, tests: Sequence[str]) -> Mutant:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines(keepends=True)
    found = [number for number, line in enumerate(lines) if line.strip() == before]
    if len(found) != 1:
        raise ValueError(f"{name}: {file} holds this line {len(found)} times, once was expected: {before}")
    missing = [test for test in tests if not (ROOT / test.partition("::")[0]).exists()]
    if missing:
        raise ValueError(f"{name}: there is no {missing[0]}")
    lines[found[0]] = lines[found[0]].replace(before, after)
    return Mutant(name, file, "".join(lines), tuple(tests))


def sampled(count: int, seed: int) -> list[Mutant]:
    """Distinct faults of `OPERATORS` in the files of `CORE`, all equally likely."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    places = []
    for file in CORE:
        nodes = list(ast_nodes(get_ast((ROOT / file).read_text(encoding="utf-8"))))
        for name in OPERATORS:
            operator = get_operator(name)()
            number = sum(len(list(operator.mutation_positions(node))) for node in nodes)
            places += [(file, name, occurrence) for occurrence in range(number)]
    mutants: dict[str, Mutant] = {}
    for file, name, occurrence in random.Random(seed).sample(places, len(places)):
        before = (ROOT / file).read_text(encoding="utf-8")
        after = mutate_code(before, get_operator(name)(), occurrence)
        if after is None or after == before:
            continue
        # Axis -1 as axis 1 is the same axis, and what was 0 as -1 mostly is as good.
        if before.count("-1") == after.count("-1"):
            tests = tuple(f"tests/{test}" for test in CORE[file])
            mutants.setdefault(after, Mutant(f"{name.partition('/')[2]} {occurrence}", file, after, tests))
        if len(mutants) == count:
            break
    return list(mutants.values())


def outcome(tree: Path, tests: Sequence[str], seconds: int | None = SECONDS) -> int | None:
    """What pytest returns in a copy of the tree; None if it takes too long."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    path = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=tree, env={**os.environ, **path}, timeout=seconds, check=False, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def survivors(mutants: Sequence[Mutant]) -> list[Mutant]:
    """Those whose tests still pass.

    Raises:
        SystemExit: Tests fail without any fault, or do not run.
    """
    alive = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder)
        for name in TREES:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            copy(source, tree / name)
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        if outcome(tree, tests, seconds=None) != 0:
            sys.exit(f"Without any fault these tests should pass, and do not: {' '.join(tests)}")
        for number, mutant in enumerate(mutants, 1):
            file, start = tree / mutant.file, time.perf_counter()
            original = file.read_text(encoding="utf-8")
            file.write_text(mutant.source, encoding="utf-8")
            code = outcome(tree, mutant.tests)
            file.write_text(original, encoding="utf-8")
            if code not in (0, None, *FAILED):
                sys.exit(f"pytest returned {code} on {' '.join(mutant.tests)}")
            said = "SURVIVED" if code == 0 else "endless" if code is None else "found"
            print(
                f"{number:4}/{len(mutants)} {time.perf_counter() - start:5.0f} s  {said:8}  {mutant.file}: {mutant.name}",
                flush=True,
            )
            if code == 0:
                alive.append(mutant)
                lines = difflib.unified_diff(original.splitlines(), mutant.source.splitlines(), n=0, lineterm="")
                print("\n".join(f"      {line}" for line in lines if not line.startswith(("---", "+++"))), flush=True)
    return alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sampled", type=int, default=0, metavar="N", help="faults from Cosmic Ray in place of the kept list"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    options = parser.parse_args()
    mutants = sampled(options.sampled, options.seed) if options.sampled else kept()
    alive = survivors(mutants)
    print(f"{len(mutants) - len(alive)} of {len(mutants)} faults were found.")
    if alive and not options.sampled:
        sys.exit(1)


if __name__ == "__main__":
    main()
