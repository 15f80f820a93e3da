"""A run's settings -> its token windows: those of its own text, and those of another domain that judge the finished front."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmbo.config import RunConfig
from llmbo.models.checks import check_tokens
from llmbo.models.loading import Checkpoint
from llmbo.types import WRITING, Phases
from pruning.calibration import Dealt, TokenWindows, apportioned, cut_windows, fresh_windows
from pruning.sampling import sample_windows, sampled_windows
from pruning.tensor_files import TensorFiles
from pruning.text import read_mix, read_text

WRITTEN = "written"  # windows, of a run whose text is `self`


def load_windows(
    config: RunConfig, loaded: Checkpoint, own: TensorFiles | None = None, phases: Phases | None = None
) -> TokenWindows:
    """The run's three sets of windows.

    Args:
        own: What the run has kept, for windows that the dense model wrote: another device would write others.
        phases: Are told while it writes.
    """
    if config.text == "self":
        counts, length = config.windows, config.window
        like = {name: torch.empty(count, length, dtype=torch.long, device="meta") for name, count in counts.items()}
        if own and (found := own.get(WRITTEN, like, finite=True)):
            return sampled_windows(found, config.seed)
        told = phases.phase(WRITING, length * sum(counts.values())) if phases else nullcontext(lambda done: None)
        with told as advance:
            return sample_windows(loaded.model, loaded.tokenizer, counts, length, config.seed, advance=advance)
    text = read_mix(config.text)
    windows = cut_windows(text, loaded.tokenizer, config.windows, config.window, config.seed, config.chat)
    check_tokens(loaded.model, loaded.tokenizer, windows.calibration, windows.proxy, windows.heldout)
    return windows


def keep_written(config: RunConfig, windows: TokenWindows, own: TensorFiles) -> None:
    """Leave windows that the dense model wrote for whoever goes on with the run, works for it or exports of it."""
    if config.text == "self":
        own.once(WRITTEN, lambda: windows.parts, windows.parts)


def written_files(config: RunConfig, own: TensorFiles) -> dict[str, Path]:
    """The file of such windows by its name, where the disk has taken it."""
    there = config.text == "self" and own.get(WRITTEN) is not None
    return {WRITTEN: own.path(WRITTEN)} if there else {}


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
