"""Which engines can run what a search may find, told by probing the widest shapes of its space."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pkgutil import resolve_name

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.config import RunConfig
from llmbo.config.formats import ENGINES, Engine
from llmbo.errors import ConfigError
from llmbo.problem.space import SearchSpace, space_of
from pruning.anatomy import anatomy_of
from pruning.architecture import Architecture
from pruning.errors import PruningError


def check_engines(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Which engines can run all that the search may find, in a line.

    Args:
        model: The dense one; its weights are not looked at.

    Raises:
        ConfigError: One that the settings name cannot. It says why, and which engines can.
    """
    reasons = {name: _refusal(engine, config, model, tokenizer) for name, engine in ENGINES.items()}
    for name in config.deploy:
        if reasons[name]:
            can = [each for each, other in ENGINES.items() if _could(other, config, model, tokenizer)]
            raise ConfigError(
                f"--deploy {name} cannot run what is searched of '{config.model}'. {reasons[name]} "
                f"What can: --deploy {', '.join(can) or 'nothing'}."
            )
    found = [name for name, reason in reasons.items() if not reason]
    more = [] if config.deploy else [name for name in ENGINES if name not in found]
    told = f"All that is searched runs in {', '.join(found) or 'no engine known here'}"
    return told + (f"; for {' or '.join(more)} name it with --deploy." if more else ".")


def _could(engine: Engine, config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it can run what a search for it alone may find."""
    with suppress(ConfigError):
        return not _refusal(engine, replace(config, deploy=(engine.name,)), model, tokenizer)
    return False


def _refusal(engine: Engine, config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why it cannot; empty if it can."""
    space = space_of(config, anatomy_of(model))
    for architecture in _widest(space, config.strategy == "uniform"):
        try:
            resolve_name(engine.check)(model, tokenizer, architecture)
        except PruningError as error:
            return str(error)
    return ""


def _widest(space: SearchSpace, equal: bool) -> Iterator[Architecture]:
    """Shapes that say of all others of the space whether an engine can hold them.

    Args:
        equal: Whether layers are equal, so that every width of attention is another case.
    """
    layers, neurons, (_, *groups) = space.num_layers, space.widths["mlp"], space.widths["attention"]
    narrow = neurons[1] if len(neurons) > 2 else 0
    if equal:
        yield from (Architecture.of((kept,) * layers, (narrow or neurons[-1],) * layers) for kept in groups)
        return
    for kept in {groups[0], groups[-1]}:
        yield Architecture.of((kept, *groups[-1:] * (layers - 1)), (narrow, *neurons[-1:] * (layers - 1)))
