"""What can become of a model, told by its config and tokenizer alone: no weights are read."""

from collections.abc import Iterator, Sequence
from pkgutil import resolve_name

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config import RunConfig
from llmbo.config.formats import FORMATS, Format
from llmbo.models.loading import find_prunable, load_tokenizer
from llmbo.models.stored import model_of_config
from llmbo.problem.engines import check_engines
from llmbo.problem.space import attention_ladder, space_of
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import PruningError
from pruning.widths import lacking_of, units_of


def findings(name: str, deploy: Sequence[str] = ()) -> Iterator[str]:
    """What of a model can be searched, and which export formats hold the results, one line for each.

    Args:
        name: Alias, local folder or hub name.
        deploy: Engines that are to run the results.

    Raises:
        LlmboError, PruningError: It cannot be pruned, or an engine cannot run what is left of it.
    """
    config = RunConfig(name, deploy=tuple(deploy))
    found = find_prunable(name)
    tokenizer = load_tokenizer(found)
    model = model_of_config(found)
    anatomy = anatomy_of(model)
    family = anatomy.family
    yield f"family: {family.model_type} ({family.models}), {model.num_parameters():,} parameters in {anatomy.num_hidden_layers} layers"
    engines = check_engines(config, model, tokenizer)
    widths = space_of(config, anatomy).widths
    equal = config.strategy == "uniform"
    groups, levels = sorted({*map(units_of, widths["attention"][equal:])}), len(widths["mlp"])
    queries, lacking = anatomy.queries_per_group, max(map(lacking_of, widths["attention"]))
    heads = f"with {queries - lacking} to {queries} of its {queries}" if lacking else f"of {queries}"
    several = (
        f"{groups[0]} to {groups[-1]}"
        if len(groups) == groups[-1] - groups[0] + 1 > 2
        else " or ".join(map(str, groups))
    )
    yield (
        f"search: every layer keeps {several} of its KV groups, each {heads} query heads, and 0 to "
        f"{anatomy.intermediate_size} neurons in {levels} levels{', all layers the same' if equal else ''}"
    )
    yield from found.notes
    yield f"engines: {engines}"
    for format in FORMATS.values():
        yield f"--format {format.name}: {_held(format, model, tokenizer, anatomy)}"


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
    fewer, narrower = groups - 1 or attention_ladder(anatomy.attention)[0], max(1, neurons // 2)
    return {
        "layers of any size": Architecture.of(
            (fewer, *(groups,) * (layers - 1)), (narrower, *(neurons,) * (layers - 1))
        ),
        "layers with all heads or none, and MLPs of any size": Architecture(
            (0, *(groups,) * (layers - 1)), (narrower, *(neurons,) * (layers - 1))
        ),
        "equal layers": Architecture.of((fewer,) * layers, (narrower,) * layers),
        "equal layers with all heads": Architecture((groups,) * layers, (narrower,) * layers),
    }
