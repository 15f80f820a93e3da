"""A run's settings -> its token windows: those of its own text, and those of another domain that judge the finished front."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llmbo.config import RunConfig
from llmbo.models.checks import check_tokens
from llmbo.models.loading import Checkpoint
from pruning.calibration import Dealt, TokenWindows, apportioned, cut_windows, fresh_windows
from pruning.sampling import sample_windows
from pruning.text import read_mix, read_text


def load_windows(config: RunConfig, loaded: Checkpoint) -> TokenWindows:
    """The run's three sets of windows."""
    if config.text == "self":
        return sample_windows(loaded.model, loaded.tokenizer, config.windows, config.window, config.seed)
    text = read_mix(config.text)
    windows = cut_windows(text, loaded.tokenizer, config.windows, config.window, config.seed, config.chat)
    check_tokens(loaded.model, loaded.tokenizer, windows.calibration, windows.proxy, windows.heldout)
    return windows


def load_elsewhere(config: RunConfig, loaded: Checkpoint, data: Mapping[str, Any]) -> TokenWindows | None:
    """As many held-out windows of another text, `heldout` alone; none of them shares a token with the run's own. None if not wanted.

    Args:
        data: Of the run's own text, as `DataPart` has it.
    """
    if config.heldout_text == "none":
        return None
    text, count, seen = read_text(config.heldout_text), config.windows["heldout"], searched(config, data)
    windows = fresh_windows(text, loaded.tokenizer, count, config.window, config.seed, seen, config.chat)
    check_tokens(loaded.model, loaded.tokenizer, windows.heldout)
    return windows


def searched(config: RunConfig, data: Mapping[str, Any]) -> tuple[Dealt, ...]:
    """The windows that a run with this config took from its text, or from each one of its mix.

    Args:
        data: As in `load_elsewhere`.
    """
    alone = {"sha256": data["sha256"], "windows": sum(config.windows.values())}
    texts = data.get("sources") or [alone]
    return tuple(Dealt(text["sha256"], text["windows"], config.window, config.seed) for text in texts)


def judged_by(config: RunConfig, data: Mapping[str, Any], elsewhere: Mapping[str, Any] | None) -> tuple[Dealt, ...]:
    """The windows that such a run judged its finished front by: the held-out ones of `searched`, and those of another text.

    Args:
        data: As in `load_elsewhere`.
        elsewhere: Of the other text, as `ElsewherePart` has it; None where there was none.
    """
    seen, count = searched(config, data), config.windows["heldout"]
    shares = [text["share"] for text in data.get("sources") or [{"share": 1.0}]]
    held = (replace(past, first=past.windows - n) for past, n in zip(seen, apportioned(count, shares), strict=True))
    other = [Dealt(elsewhere["sha256"], count, config.window, config.seed, behind=seen)] if elsewhere else []
    return *held, *other
