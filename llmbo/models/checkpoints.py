"""Dense models and exported ones alike: anything with a language-model head -> model and tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
)

from llmbo.errors import ModelError, first_line
from llmbo.models.loading import DTYPES, Checkpoint, choose_device, choose_dtype, resolve
from pruning.export.rebuild import local_class

LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there, nothing read but its config. `options` are what `loader` needs."""

    source: str
    config: PreTrainedConfig
    loader: Any
    options: dict[str, Any]


def find_checkpoint(name: str, trust_remote_code: bool = False) -> Found:
    """Look at the config alone; code from the folder runs only on request.

    A folder that `llmbo export` wrote needs none of its own code: the same classes are here.

    Raises:
        ModelError: Not found, or no causal language model.
    """
    source = resolve(name)
    try:
        own = local_class(Path(source)) if Path(source).is_dir() else None
        if own is not None:
            return Found(source, own.config_class.from_pretrained(source), own, {})
        options = {"trust_remote_code": trust_remote_code}
        return Found(source, AutoConfig.from_pretrained(source, **options), AutoModelForCausalLM, options)
    except LOADING_ERRORS as error:
        raise ModelError(_reason(name, error)) from error


def load_checkpoint(
    name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Load a dense model, by alias, hub name or folder, or a folder that was exported or recovered.

    Raises:
        ModelError: It cannot be loaded.
        ConfigError: The device is not there.
    """
    found = find_checkpoint(name, trust_remote_code)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device, found.config.get_text_config())
    try:
        model = found.loader.from_pretrained(found.source, dtype=DTYPES[dtype], **found.options).eval().to(device)
        # With the config at hand it does not look for one itself, and ask whether the folder's code may run.
        tokenizer = AutoTokenizer.from_pretrained(found.source, config=found.config, **found.options)
    except LOADING_ERRORS as error:
        raise ModelError(_reason(name, error)) from error
    return Checkpoint(name, found.source, model, tokenizer, dtype, device)


def _reason(name: str, error: Exception) -> str:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        reason = "it brings its own code, which runs only with --trust-remote-code"
    return f"Cannot load '{name}': {reason}"
