"""A fresh process that reads a result back as a stranger would. Importing this file loads neither torch nor transformers."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pruning.errors import ExportFailed

if TYPE_CHECKING:
    from torch import Tensor

Answer = Callable[[], dict[str, "Tensor"]]  # waits for it
Read = Callable[[Path, Mapping[str, "Tensor"]], Answer]  # (result, what is asked of it) -> what it answers, meanwhile


@contextmanager
def reader(program: str) -> Iterator[Read]:
    """What `program`, a file beside this one, computes from a result, once, in a process of its own; it is gone with the context.

    It imports what it needs at once and then waits. Started before there is anything to read, it costs no time later: those imports
    take as long as all else. Should this process be killed, its standard input ends and it goes, too.

    Raises:
        ExportFailed: By the function: the program failed; its last words are told.
    """
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,  # the modelling file is compiled here, not in the user's cache
        }
        with subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name(program))],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        ) as process:
            try:
                yield partial(_ask, process, Path(scratch))
            finally:
                process.kill()


def _ask(process: "subprocess.Popen[str]", scratch: Path, path: Path, given: Mapping[str, "Tensor"]) -> Answer:
    import torch
    from safetensors.torch import save_file

    asked, found = scratch / "asked", scratch / "found"
    save_file(dict(given), asked)
    assert process.stdin is not None  # a pipe
    with suppress(BrokenPipeError):  # it has ended, and its last words say why
        print(json.dumps([str(path), str(asked), str(found), torch.get_num_threads()]), file=process.stdin, flush=True)
    return partial(_answer, process, found)


def _answer(process: "subprocess.Popen[str]", found: Path) -> dict[str, "Tensor"]:
    from safetensors.torch import load_file

    _, stderr = process.communicate()
    if process.returncode != 0:
        said = (stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise ExportFailed(f"The result could not be loaded in a fresh process and was deleted: {said}")
    return load_file(found)
