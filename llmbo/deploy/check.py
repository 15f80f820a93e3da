"""What can become of a model, told by its config and tokenizer alone: no weights are read."""

from collections.abc import Iterator
from pkgutil import resolve_name

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config.formats import FORMATS, Format
from llmbo.errors import ModelError, first_line
from llmbo.models.loading import load_config, resolve
from llmbo.problem.space import SearchSpace
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import PruningError


def findings(name: str) -> Iterator[str]:
    """What of a model can be searched, and which export formats hold the results, one line for each.

    Args:
        name: Alias, local folder or hub name.

    Raises:
        LlmboError, PruningError: It cannot be pruned.
    """
    model, tokenizer = _outline(name)
    anatomy = anatomy_of(model)
    family = anatomy.family
    yield f"family: {family.model_type} ({family.models}), {model.num_parameters():,} parameters in {anatomy.num_hidden_layers} layers"
    levels = SearchSpace(anatomy).widths
    yield (
        f"search: every layer keeps 0 to {anatomy.num_key_value_heads} of its KV groups, each of "
        f"{anatomy.queries_per_group} query heads, and 0 to {anatomy.intermediate_size} neurons in {len(levels['mlp'])} levels"
    )
    if anatomy.num_key_value_heads == 1:
        yield "search: with one KV group the attention of a layer stays whole or goes whole"
    for format in FORMATS.values():
        yield f"--format {format.name}: {_held(format, model, tokenizer, anatomy)}"


def _outline(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model without its weights, and its tokenizer."""
    config, source = load_config(name), resolve(name)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return model, AutoTokenizer.from_pretrained(source, config=config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"Cannot load '{name}': {first_line(error)}") from error


def _held(format: Format, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, anatomy: Anatomy) -> str:
    """The widest kind of pruned model that the format can hold, and why no wider one."""
    reason = ""
    for kind, architecture in _kinds(anatomy).items():
        try:
            resolve_name(format.check_model)(model, tokenizer, architecture)
        except PruningError as error:
            reason = reason or str(error)
        else:
            return kind + (f", no others: {reason}" if reason else "")
    return f"none: {reason}"


def _kinds(anatomy: Anatomy) -> dict[str, Architecture]:
    """From what every search finds to what a format may ask for."""
    layers, groups, neurons = anatomy.num_hidden_layers, anatomy.num_key_value_heads, anatomy.intermediate_size
    fewer, narrower = max(1, groups - 1), max(1, neurons // 2)
    return {
        "layers of any size": Architecture((fewer, *(groups,) * (layers - 1)), (narrower, *(neurons,) * (layers - 1))),
        "equal layers": Architecture((fewer,) * layers, (narrower,) * layers),
        "equal layers with all heads": Architecture((groups,) * layers, (narrower,) * layers),
    }
