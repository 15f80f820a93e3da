"""`--elastic`: the search takes an adapted model for the dense one, and goes on comparing with the model as it was."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from llmbo.models.adapter import Adapter
from llmbo.models.loading import LoadedModel, fingerprint
from llmbo.problem.texts import searched
from pruning.calibration import TokenWindows, digest_of
from pruning.likelihood import dense_distribution


def heard(windows: TokenWindows, elsewhere: TokenWindows | None) -> list[Tensor]:
    """The windows that a run compares with the dense model on."""
    return [windows.proxy, windows.heldout, *([elsewhere.heldout] if elsewhere else [])]


def adapter_of(config: RunConfig) -> Adapter | None:
    """The one that the settings name.

    Raises:
        ModelError: It is missing or damaged.
    """
    return Adapter.read(config.elastic) if config.elastic else None


def adapted(adapter: Adapter | None, loaded: LoadedModel, *windows: Tensor) -> LoadedModel:
    """The model that is cut: with the adapter in its weights, if there is one. A model that a caller has loaded is copied.

    Args:
        windows: `num_windows x length` token ids each. What the model predicted there before stays known: objectives compare with that.

    Raises:
        ModelError: The adapter is of another model, or damaged.
    """
    if adapter is None:
        return loaded
    adapter.check(loaded)
    model = copy.deepcopy(loaded.model) if loaded.adopted else loaded.model
    known = {digest_of(part): dense_distribution(model, part) for part in windows}
    adapter.merge_into(model)
    return replace(loaded, model=model, known=known, fingerprint=fingerprint(model))


def check_unseen(config: RunConfig, adapter: Adapter, data: Mapping[str, Any], elsewhere: TokenWindows | None) -> None:
    """Refuse windows that the adapter was trained on: what is measured there tells nothing.

    Args:
        data: Of the run's own text, as `DataPart` has it.

    Raises:
        ConfigError: What may be taken instead.
    """
    text = adapter.about["text"]
    reserved, source = text["reserved"], text["source"]
    for dealt in searched(config, data):
        kept = (text["seed"], text["window"]) == (dealt.seed, dealt.length) and not config.chat
        if dealt.sha256 in reserved and not (kept and dealt.windows <= reserved[dealt.sha256]):
            raise ConfigError(
                f"The adapter in '{config.elastic}' was trained on {source}, all but {reserved[dealt.sha256]} windows that are dealt "
                f"first with --seed {text['seed']} --window {text['window']}: take these alone, or another --text."
            )
    if elsewhere and elsewhere.sha256 in reserved:
        raise ConfigError(
            f"The adapter in '{config.elastic}' was trained on {source}: take another --heldout-text than {config.heldout_text}, or none."
        )
