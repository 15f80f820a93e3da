"""Refits in sequence for single trials of a run: kept in its folder, refused where the text is too short for them."""

from collections.abc import Callable

import torch
from torch import Tensor

from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from pruning.anatomy import Sizes
from pruning.architecture import Architecture
from pruning.sequential import TOKENS_PER_COLUMN, SequentialRefits, sequential_refit
from pruning.supernet import Supernet
from pruning.tensor_files import TensorFiles
from pruning.walk import device_of

PHASE = "refits in sequence"


def least_tokens(sizes: Sizes) -> int:
    """Calibration tokens below which a refit in sequence learns its text by heart: five for each column of the widest output projection.

    On SmolLM2, whose widest has 1,536, that is 7,680: with 16,384 tokens refits in sequence take a tenth off the table's KL, with 8,192
    and little ridge they fitted these tokens better and others worse.
    """
    return TOKENS_PER_COLUMN * max(sizes.intermediate_size, sizes.num_attention_heads * sizes.head_dim)


def check_enough(flag: str, tokens: int, window: int, sizes: Sizes, remedy: str) -> None:
    """Refuse refits in sequence on too little text.

    Args:
        flag: What asked for them.
        tokens: For calibration, in windows of `window`.
        remedy: `{enough}` in it are as many tokens as whole windows need.

    Raises:
        ConfigError: See `least_tokens`.
    """
    least = least_tokens(sizes)
    if tokens < least:
        raise ConfigError(
            f"{flag} needs at least {least} calibration tokens, {TOKENS_PER_COLUMN} for each input of the model's widest output "
            f"projection, and there are {tokens}: refits in sequence would learn them by heart. "
            + remedy.format(enough=-(-least // window) * window)
        )


def check_refits(config: RunConfig, sizes: Sizes) -> None:
    """Refuse `refit_front` and `refit_anchors` on too little text.

    Raises:
        ConfigError: See `least_tokens`.
    """
    tokens = config.windows["calibration"] * config.window
    for flag, asked in (("--refit-front", config.refit_front), ("--refit-anchors", config.refit_anchors)):
        if asked:
            remedy = f"Set --calibration-tokens {{enough}}, or leave {flag} out."
            check_enough(flag, tokens, config.window, sizes, remedy)


def beyond(advance: Callable[[int], None], before: int, done: int) -> None:
    """Tell of layers that are done of one model, where so many of others came before."""
    advance(before + done)


def kept_refits(
    files: TensorFiles, trial: int, architecture: Architecture, device: torch.device | str
) -> SequentialRefits | None:
    """What `sequential` has kept of a trial."""
    found = files.get(_name(trial, architecture))
    return None if found is None else SequentialRefits.from_tensors(found, device)


def sequential(
    files: TensorFiles,
    trial: int,
    supernet: Supernet,
    architecture: Architecture,
    windows: Tensor,
    on_layer: Callable[[int], None] | None = None,
) -> SequentialRefits:
    """The refits of a trial: those that were kept, if units are ranked as they were then, or worked out now and kept.

    Args:
        windows: `num_windows x length` token ids.
        on_layer: Called with the number of layers done.
    """
    found = kept_refits(files, trial, architecture, device_of(supernet.model))
    if found and found.ranking.same(supernet.ranking):
        return found
    refits = sequential_refit(supernet, architecture, windows, on_layer=on_layer)
    files.put(_name(trial, architecture), refits.to_tensors())
    return refits


def _name(trial: int, architecture: Architecture) -> str:
    return f"sequential_{trial:03d}_{architecture.digest}"
