"""What a checkpoint must be to be pruned, measured or trained. Each check is silent, or says in one line what is wrong."""

import contextlib
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, constants, get_session
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.peft_utils import find_adapter_config_file

from llmbo.errors import ModelError, first_line

# What transformers makes full-precision weights of while it loads, when `dequantize` is set.
DEQUANTISED = ("fp8", "mxfp8", "mxfp4")
# Of other models than masked ones, those that see what comes behind a token as well.
BIDIRECTIONAL = ("bert-generation", "xlnet")
# Buffers that older versions of transformers saved, and that follow from the config.
HARMLESS = re.compile(r"(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")
SIZES = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "n_layer", "n_embd", "n_head", "n_inner", "ffn_dim",
)  # fmt: skip
SHOWN = 3  # names in a line
HUB_PATIENCE = 5.0  # seconds in which the hub has to answer anything at all
ASKED_OFFLINE = constants.HF_HUB_OFFLINE


def look_for_hub() -> None:
    """Where the hub does not answer, let its clients keep to what is cached: each would try again for half a minute."""
    if ASKED_OFFLINE:
        return
    constants.HF_HUB_OFFLINE = False  # it may be back
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:  # whatever the HTTP library of the day calls it
        constants.HF_HUB_OFFLINE = True


def check_no_adapter(name: str, source: str) -> None:
    """Raise ModelError for a PEFT adapter, alone or beside a model, which transformers would put on top unasked."""
    if not Path(source).is_dir():
        look_for_hub()
    try:
        file = find_adapter_config_file(source)
    except OSError:  # the hub is out of reach, which reading the config will say
        return
    if file is None:
        return
    base: Any = "its base model"
    with contextlib.suppress(ValueError, LookupError, TypeError):
        base = json.loads(Path(file).read_bytes())["base_model_name_or_path"]
    raise ModelError(
        f"'{name}' holds a PEFT adapter, of {base}: merge the adapter first (merge_and_unload, then save_pretrained)."
    )


def check_entries(name: str, entries: Any) -> None:
    """Raise ModelError unless `config.json` holds an object that names a model type, with sizes that a decoder can have."""
    if not isinstance(entries, dict):
        found = {type(None): "null", list: "a list", str: "a text"}.get(type(entries), "a number")
        raise ModelError(f"The config.json of '{name}' holds {found} where an object was expected: get a whole copy.")
    kind = entries.get("model_type", "" if "auto_map" in entries else None)
    if not isinstance(kind, str):
        raise ModelError(
            f"The config.json of '{name}' has model_type {kind!r} where a name was expected: get a whole copy."
        )
    for part in _parts(entries):
        sizes = {key: value for key in SIZES if isinstance(value := part.get(key), int)}
        for key, value in sizes.items():
            if value < 1:
                raise ModelError(f"The config.json of '{name}' has {key} {value} where at least 1 was expected.")
        heads, groups = (sizes.get(f"num_{kind}_heads", 1) for kind in ("attention", "key_value"))
        if "num_attention_heads" in sizes and heads % groups:
            raise ModelError(
                f"The config.json of '{name}' has num_attention_heads {heads}, which num_key_value_heads {groups} does not divide."
            )


def dequantised(name: str, source: str, entries: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantisation of a checkpoint whose weights are dequantised while it is loaded; None if it has none.

    Raises:
        ModelError: Its weights stay quantised, and cannot be pruned.
    """
    keys = ("quantization_config", "compression_config")
    found = next((part[key] for part in _parts(entries) for key in keys if part.get(key) is not None), None)
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if isinstance(found, dict) and method in DEQUANTISED:
        try:
            AutoQuantizationConfig.from_dict(found)
        except Exception as error:  # whatever it makes of strange values
            method = f"{method}, damaged: {first_line(error)}"
        else:
            return found | {"dequantize": True}
    old = isinstance(found, dict) and any(str(key).startswith("load_in_") for key in found)
    how = method or ("bitsandbytes" if old else "its config does not say how")
    raise ModelError(
        f"'{name}' is quantised ({how}), and quantised weights cannot be pruned, trained or compared: "
        f"give the full-precision model{_base_model(source, entries)}."
    )


def check_decoder(name: str, config: PretrainedConfig, known: bool = False) -> None:
    """Raise ModelError unless a model with this config predicts each token from those before it, which is what is pruned and measured.

    Args:
        known: Its classes are not those of transformers, so that their tables tell nothing.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{name}' ({kind}) is an encoder-decoder model; llmbo takes decoder-only language models.")
    text = config.get_text_config()
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or kind in BIDIRECTIONAL
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False) if masked else True
    looks_ahead = getattr(text, "use_bidirectional_attention", False) in (True, "all")
    has_head = known or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if not has_head or not causal or looks_ahead or not getattr(text, "is_causal", True):
        raise ModelError(f"'{name}' ({kind}) is no causal language model: llmbo takes decoder-only language models.")


def check_weights(name: str, model: PreTrainedModel, info: Mapping[str, Collection[Any]]) -> None:
    """Raise ModelError unless file and model had the same tensors of the same shapes: what was missing is random now.

    Args:
        info: What `from_pretrained` returns with `output_loading_info`.
    """
    beyond = [key for key in info["unexpected_keys"] if not HARMLESS.search(key)]
    shapes = [f"{key}: {_shape(found)}, not {_shape(own)}" for key, found, own in info["mismatched_keys"]]
    faults = {"missing": info["missing_keys"], "beyond it": beyond, "of another shape": shapes}
    if said := "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names):
        raise ModelError(
            f"The weights of '{name}' do not fit the {type(model).__name__} of its config.json ({said}): "
            "get a whole copy, with the config that belongs to it."
        )


def check_stored(name: str, source: str, model: PreTrainedModel) -> None:
    """Raise ModelError if a local folder stores a parameter in numbers that are no floats. Reads the headers alone."""
    single, index = Path(source, "model.safetensors"), Path(source, "model.safetensors.index.json")
    files = [single] if single.exists() else []
    if index.exists() and not files:
        files = [index.with_name(file) for file in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    prefix = f"{model.base_model_prefix}."  # the file may leave it out
    own = {key.removeprefix(prefix) for key, _ in model.named_parameters()}
    for file in files:
        with safe_open(file, "pt") as stored:
            kinds = {key: stored.get_slice(key).get_dtype() for key in stored.keys() if key.removeprefix(prefix) in own}  # noqa: SIM118
        names = [key for key, kind in kinds.items() if not re.match("B?F[0-9]", kind)]
        if names:
            raise ModelError(
                f"The weights of '{name}' are stored in {kinds[min(names)]} ({_some(names)}), where floats were expected, and "
                "its config.json names no quantisation: give the full-precision model."
            )


def check_values(name: str, model: PreTrainedModel) -> None:
    """Raise ModelError if a weight is NaN, infinite or of 8 bits, or the head is tied in the config alone. Reads every weight once."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False) and head is not None
    if tied and head.weight is not embedding.weight and not torch.equal(head.weight, embedding.weight):
        raise ModelError(
            f"The config.json of '{name}' has tie_word_embeddings true, but its lm_head.weight differs from the embedding: "
            "set tie_word_embeddings to false there, or remove that tensor."
        )
    narrow = [key for key, weight in model.named_parameters() if weight.is_floating_point() and weight.itemsize == 1]
    if narrow:
        raise ModelError(f"The weights of '{name}' are float8 without a scale ({_some(narrow)}): get a whole copy.")
    faults: dict[str, list[str]] = {"NaN": [], "infinite values": []}
    for key, weight in model.named_parameters():
        if weight.numel() and weight.is_floating_point():
            ends = torch.stack(torch.aminmax(weight.detach()))
            if not bool(ends.isfinite().all()):
                faults["NaN" if bool(ends.isnan().any()) else "infinite values"].append(key)
    for what, names in faults.items():
        if names:
            overflow = what != "NaN" and model.dtype == torch.float16
            remedy = "they may not fit float16: try --dtype bfloat16 or float32" if overflow else "get a sound copy"
            raise ModelError(f"The weights of '{name}' hold {what} ({_some(names)}): {remedy}.")


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError for a length that is no number, or no words, which is what some classes make of a folder without its files."""
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise ModelError(
            f"The tokenizer_config.json of '{name}' has model_max_length {longest!r} where a number was expected: "
            "remove that entry, or get a whole copy."
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        raise ModelError(f"The tokenizer of '{name}' has no words: its files are missing, such as tokenizer.json.")


def check_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *ids: Tensor) -> None:
    """Raise ModelError if a text uses tokens that the model's embedding does not have.

    A larger tokenizer alone is no fault: that of Gemma 3 has a token for images, which its text models do not know.
    """
    embedding: Any = model.get_input_embeddings()
    rows, last = len(embedding.weight), max(int(part.max()) for part in ids if part.numel())
    if last >= rows:
        raise ModelError(
            f"The tokenizer of '{model.name_or_path}' has {len(tokenizer)} tokens, the model's embedding {rows} rows, and the text "
            f"uses '{tokenizer.convert_ids_to_tokens(last)}' ({last}): resize the embedding, or bring the model's own tokenizer."
        )


def check_finite(name: str, dtype: str, *values: Tensor | float) -> None:
    """Raise ModelError if what the model computed in this dtype is NaN or infinite somewhere."""
    if all(bool(torch.as_tensor(value).isfinite().all()) for value in values):
        return
    wider = {"float16": "try --dtype bfloat16 or float32", "bfloat16": "try --dtype float32"}
    raise ModelError(
        f"'{name}' computes NaN or infinite numbers in {dtype}: {wider.get(dtype, 'its weights or its config are damaged')}."
    )


def _parts(entries: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The config, and within that of a model of several kinds the language model's."""
    return [part for part in (entries, entries.get("text_config")) if isinstance(part, dict)]


def _base_model(source: str, entries: Mapping[str, Any]) -> str:
    """In brackets, what the model card or the config says that the model was made from."""
    try:
        card = Path(source, "README.md") if Path(source).is_dir() else source
        base = ModelCard.load(card).data.to_dict().get("base_model")
    except Exception:  # no card, no hub, or a card that is none
        base = None
    base = base or entries.get("_name_or_path")
    names = [base] if isinstance(base, str) else base if isinstance(base, list) else []
    return f" ({', '.join(map(str, names))})" if names and source not in names else ""


def _shape(shape: Collection[int]) -> str:
    return " x ".join(map(str, shape)) or "a number"


def _some(names: Collection[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more
