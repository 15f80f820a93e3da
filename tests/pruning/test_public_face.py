"""`from pruning import …` gives everything a user of the library needs, and takes nothing heavy to get there."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import pruning

ROOT = Path(pruning.__file__).parent


def test_every_public_name_is_there() -> None:
    for file in ROOT.rglob("*.py"):  # an imported module becomes an attribute, which must not hide a name
        if not file.stem.startswith(("_", "reload_")):
            __import__(".".join(("pruning", *file.relative_to(ROOT).with_suffix("").parts)))
    for name in pruning.__all__:
        found = getattr(pruning, name)
        assert not isinstance(found, ModuleType) and found.__name__ == name
        assert found.__module__.startswith("pruning.") and inspect.getdoc(found)


def test_type_checkers_see_the_same_names() -> None:
    seen = re.findall(r"^    from [\w.]+ import (\w+) as \1$", inspect.getsource(pruning), flags=re.MULTILINE)
    assert sorted(seen) == sorted(pruning.__all__) and len(set(seen)) == len(seen)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(ImportError, match="cannot import name 'shrunk'"):
        exec("from pruning import shrunk")
    assert {"shrink", "Supernet"} < set(dir(pruning))


def test_the_package_alone_loads_no_heavy_library() -> None:
    program = "import sys, pruning; pruning.PruningError; print(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("model", ["llama", "phi3"], indirect=True)
def test_the_example_cuts_a_model(model: PreTrainedModel, windows: Tensor) -> None:
    """The model that comes out is what the example measured before it cut it."""
    lines = re.findall(r"^    (.+)", str(pruning.__doc__), flags=re.MULTILINE)
    names = {"model": model, "windows": windows, **{name: getattr(pruning, name) for name in pruning.__all__}}
    exec("\n".join(lines), names)
    small, measured = names["small"], names["measured"]
    assert small.num_parameters() < model.num_parameters()
    assert pruning.quality(small, windows).loss == pytest.approx(measured.loss, abs=1e-9)
    with torch.no_grad():
        assert pruning.quality(model, windows).loss != pytest.approx(measured.loss, abs=1e-3)
