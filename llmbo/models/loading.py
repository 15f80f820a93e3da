"""Model names -> loaded models and tokenizers: dense ones, and what `llmbo export` made of them."""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmbo.errors import ConfigError, ModelError, first_line, out_of_memory, unknown
from llmbo.models.aliases import ALIASES, resolve
from llmbo.models.checks import (
    check_decoder,
    check_entries,
    check_no_adapter,
    check_stored,
    check_tokenizer,
    check_values,
    check_weights,
    dequantised,
)
from llmbo.models.mapping import is_mapped, mapped_copy
from llmbo.models.placement import DTYPES, MAPPED, OFFLOADS, cards_for, choose_device, choose_dtype, leave_layers
from pruning.anatomy import anatomy_of, family_of, sizes_of
from pruning.errors import UnsupportedModel
from pruning.export.rebuild import cast, local_class
from pruning.likelihood import DenseDistribution


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model, dense or pruned.

    Args:
        name: What the user asked for.
        source: The folder or hub name it was loaded from.
        device: Where it computes.
        notes: What a user should know of it, each in a line.
        offload: Where the parameters of its decoder layers wait, as in `load_model`.
    """

    name: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: str
    device: str
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    offload: str = field(default="none", kw_only=True)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class LoadedModel(Checkpoint):
    """A model ready to be pruned.

    Args:
        fingerprint: Digest of some weights of every tensor, so that a resumed run notices another model.
        adopted: The caller has loaded it, and gets it back as it was.
        known: What it predicted on some windows before it was adapted, see `pruning.supernet.Supernet`.
    """

    fingerprint: str
    adopted: bool = field(default=False, kw_only=True)
    known: Mapping[str, DenseDistribution] = field(default_factory=dict, kw_only=True)

    @property
    def resident(self) -> bool:
        """Whether its layers stay on the device."""
        return self.offload == "none"


@dataclass(frozen=True)
class Found:
    """A checkpoint that is there, nothing read but its config. `loader` is the class that it is loaded with."""

    name: str
    source: str
    config: PretrainedConfig
    loader: Any
    trust_remote_code: bool
    notes: tuple[str, ...]

    @property
    def quantised(self) -> bool:
        """Whether its weights are dequantised while they are loaded."""
        return getattr(self.config, "quantization_config", None) is not None


def find_checkpoint(name: str, trust_remote_code: bool = False) -> Found:
    """Look at the config alone, and refuse what it tells; code from the folder runs only on request.

    A folder that `llmbo export` wrote needs none of its own code: the same classes are here.

    Raises:
        ModelError: Not found, hub out of reach, no causal language model, quantised, an adapter, or a config that makes no sense.
    """
    source = resolve(name)
    folder = Path(source)
    local = folder.is_dir()
    with told(name, source, "the config.json of "):
        check_no_adapter(name, source)
        entries = (
            json.loads((folder / "config.json").read_bytes()) if local else PretrainedConfig.get_config_dict(source)[0]
        )
        check_entries(name, entries)
    with told(name, source):
        own = local_class(folder) if local else None
        quantisation = dequantised(name, source, entries)
        config_class: Any = own.config_class if own else AutoConfig
        config = config_class.from_pretrained(source, trust_remote_code=trust_remote_code)
        if own is None:
            check_decoder(name, config, trust_remote_code and "auto_map" in entries)
    config.return_dict = True  # what reads the outputs calls them by name
    notes: tuple[str, ...] = ()
    if quantisation:
        config.quantization_config = quantisation
        notes = (f"The weights of '{name}' are stored in {quantisation['quant_method']} and dequantised.",)
    return Found(name, source, config, own or AutoModelForCausalLM, trust_remote_code and own is None, notes)


def load_checkpoint(
    name: str, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Load a dense model, by alias, hub name or folder, or a folder that was exported or recovered.

    Raises:
        ModelError: It cannot be loaded, or is not what its config says.
        ConfigError: The device is not there.
    """
    return _loaded(find_checkpoint(name, trust_remote_code), dtype, device)


def load_tokenizer(found: Found) -> PreTrainedTokenizerBase:
    """The tokenizer alone.

    Raises:
        ModelError: It is missing, damaged or empty.
    """
    with told(found.name, found.source, "the tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(
            found.source, config=found.config, trust_remote_code=found.trust_remote_code
        )
    check_tokenizer(found.name, tokenizer)
    return tokenizer


def find_prunable(name: str) -> Found:
    """As `find_checkpoint`, so that a model that cannot be pruned is refused before its weights are loaded.

    Raises:
        ModelError: As `find_checkpoint`, or an unsupported family, or pruned already.
    """
    found = find_checkpoint(name)
    if found.loader is not AutoModelForCausalLM:
        raise ModelError(f"Cannot prune '{name}': it is pruned already, give the dense model that it was made from.")
    try:
        family_of(found.config)
    except UnsupportedModel as error:
        raise ModelError(f"Cannot prune '{name}'. {error}") from error
    return replace(found, notes=found.notes + _single_head(name, found.config))


def load_model(name: str, dtype: str = "auto", device: str = "auto", offload: str = "none") -> LoadedModel:
    """Load a model that can be pruned and its tokenizer for inference.

    Memory: the weights once, in the dtype asked for; none for what is mapped, which is all that is on the CPU in the dtype that it
    is stored in, and with `offload="disk"` the decoder layers whatever they are stored in; with "gpu" these go from mapped files to their
    cards. Mapped weights must not be changed in place: each page that is written becomes memory of its own.

    Args:
        name: An alias, a local folder, or a name on the Hugging Face hub.
        dtype: "auto" or a key of `DTYPES`.
        device: "auto" or what torch calls the device.
        offload: Where the parameters of the decoder layers wait: "none" on the device, "gpu" on the machine's other CUDA devices, "cpu" in
            the host's memory (pinned for CUDA), "disk" in the files, of which a copy is made in the cache where they cannot be mapped.
            All else is on the device.

    Raises:
        ModelError: The model cannot be loaded, or is not what its config says.
        ConfigError: The device is not there, or other devices have no room for the layers.
    """
    checkpoint = _loaded(find_prunable(name), dtype, device, offload)
    return LoadedModel(**vars(checkpoint), fingerprint=fingerprint(checkpoint.model))


def adopt_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, name: str = "") -> LoadedModel:
    """A model that the caller has loaded, as `load_model` would give it. Nothing is copied.

    Args:
        name: How it is called in reports; by default where it came from.

    Raises:
        ModelError: It cannot be pruned, or its dtype cannot be measured in.
        ConfigError: There is no tokenizer.
    """
    name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    check_decoder(name, model.config, known=True)
    entries = model.config.to_dict()
    if (entries.get("quantization_config") or {}).get(
        "quant_method"
    ) != "gguf":  # dequantised, though it says otherwise
        dequantised(name, name, entries)
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
    check_values(name, model)
    return LoadedModel(
        *(name, name, model, tokenizer, dtype, str(model.device), fingerprint(model)),
        notes=_single_head(name, model.config),
        adopted=True,
    )


def max_positions(model: PreTrainedModel) -> int:
    """How many tokens the model can take at a time; without a limit the largest number there is."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def _single_head(name: str, config: PretrainedConfig) -> tuple[str, ...]:
    """What the search cannot do where no head of a layer can leave without the others."""
    sizes = sizes_of(config)
    if sizes.num_attention_heads == config.num_attention_heads > 1:
        return ()
    why = "normalises all heads together" if config.num_attention_heads > 1 else "has one head in a layer"
    return (f"'{name}' {why}: a layer keeps all of its attention or none.",)


def _loaded(found: Found, dtype: str, device: str, offload: str = "none") -> Checkpoint:
    """What is cheapest to refuse comes first."""
    if offload not in OFFLOADS:
        raise ConfigError(unknown("--offload", offload, OFFLOADS))
    device = choose_device(device)
    tokenizer = load_tokenizer(found)
    notes = found.notes
    if offload in MAPPED:
        model, dtype, told = _mapped(found, dtype, tokenizer)
        notes += told
    else:
        dtype = choose_dtype(dtype, device, found.config.get_text_config())
        model = _read(found, DTYPES[dtype], device if offload == "none" else "cpu")
    check_values(found.name, model)
    if found.quantised:
        cast(model, DTYPES[dtype])  # what was not quantised comes as it is stored, whatever was asked for
    if offload == "gpu":
        leave_layers(model, device, cards=cards_for(found.name, model, device))
    elif offload != "none":
        leave_layers(model, device, pinned=offload == "cpu" and torch.device(device).type == "cuda")
    return Checkpoint(found.name, found.source, model.eval(), tokenizer, dtype, device, notes=notes, offload=offload)


def _read(found: Found, dtype: torch.dtype | str, device: str, folder: Path | None = None) -> PreTrainedModel:
    """From its own place or a copy's, tensor by tensor to the device: none lies on the host as well."""
    with told(found.name, found.source):
        model, info = found.loader.from_pretrained(
            folder or found.source,
            config=found.config,
            dtype=dtype,
            trust_remote_code=found.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_weights` says which
            device_map=None if device == "cpu" else {"": device},
        )
    check_weights(found.name, model, info)
    if not found.quantised:
        check_stored(found.name, found.source, model)
    return model


def _mapped(
    found: Found, dtype: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, str, tuple[str, ...]]:
    """The model in files, its dtype, and what was done for it. Without another wish, the dtype is the one that it is stored in."""
    if found.quantised:
        raise ModelError(
            f"The weights of '{found.name}' are dequantised while they are loaded, so they cannot be mapped: use --offload cpu."
        )
    model = _read(found, "auto", "cpu")
    stored = str(model.dtype).removeprefix("torch.")
    dtype = (
        stored if dtype == "auto" and stored in DTYPES else choose_dtype(dtype, "cpu", found.config.get_text_config())
    )
    if dtype == stored and is_mapped(model):
        return model, dtype, ()
    folder = mapped_copy(model, tokenizer, found.source, DTYPES[dtype])
    del model
    model = _read(found, DTYPES[dtype], "cpu", folder)
    model.name_or_path = model.config.name_or_path = found.source
    why = f"are stored in {stored}" if dtype != stored else "cannot be mapped from their files"
    return model, dtype, (f"The weights of '{found.name}' {why}: a copy of them in {dtype} is kept in {folder}.",)


@contextlib.contextmanager
def told(name: str, source: str, part: str = "") -> Iterator[None]:
    """Whatever libraries make of a strange file becomes one line."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ModelError) or out_of_memory(error):
            raise
        reason = first_line(error).rstrip(".,")
        if "trust_remote_code" in str(error):
            reason = "it brings its own code, which runs only in `llmbo evaluate`, with --trust-remote-code."
        elif isinstance(error, UnpicklingError):
            reason = "its weights are pickled with code, which is never run: save them as safetensors."
        elif name in ALIASES:
            reason += f". Remove the folder '{source}' from the model cache, and it is made anew."
        elif Path(source).is_dir():
            reason += ". Expected the files that `save_pretrained` writes: get a whole copy."
        elif isinstance(error, OSError):
            reason = f"it is no local folder, and the model hub cannot be reached or does not have it ({reason})."
        raise ModelError(f"Cannot load {part}'{name}': {reason}") from error


def fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """Digest of some weights of every tensor; with `dtype`, as they would be in it."""
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 64)].to(dtype or values.dtype).float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
