"""Token windows from the dense model itself: the text source `self`."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruning.calibration import SPLITS, TokenWindows, dealing_order

BATCH = 32  # windows that are written at once


def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    length: int,
    seed: int,
    batch_size: int = BATCH,
    advance: Callable[[int], None] = lambda tokens: None,
    enough: Callable[[int], bool] = lambda windows: False,
) -> TokenWindows:
    """Windows sampled from the dense model itself at temperature 1 (text source `self`), each from its own start.

    Memory: keys and values of `batch_size` windows.

    Args:
        counts: Windows by split.
        length: Tokens of a window.
        advance: Is told behind every step how many tokens there are, of all windows.
        enough: Is asked behind every batch, with the number of windows so far, whether to leave it at these: `calibration` then has what
            is over.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    wanted = [counts[split] for split in SPLITS]
    chunks = []
    rng = torch.Generator(model.device).manual_seed(seed)
    # Not `generate`: it would mix in the sampling settings that chat models ship (repetition penalty and the like).
    with torch.inference_mode():
        for first in range(0, sum(wanted), batch_size):
            window, cache = torch.full((min(batch_size, sum(wanted) - first), 1), start, device=model.device), None
            while window.shape[1] < length:
                advance(first * length + window.numel())
                out = model(window[:, -1:], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                window = torch.cat([window, out.logits[:, -1].float().softmax(-1).multinomial(1, generator=rng)], dim=1)
            chunks.append(window.cpu())
            advance(first * length + window.numel())
            if enough(first + len(window)):
                break
    windows = torch.cat(chunks)
    wanted[0] = len(windows) - sum(wanted[1:])
    hands = dealing_order(len(windows), seed).split(wanted)
    return sampled_windows({split: windows[hand] for split, hand in zip(SPLITS, hands, strict=True)}, seed)


def sampled_windows(parts: Mapping[str, Tensor], seed: int) -> TokenWindows:
    """What `sample_windows` gave, from its windows by split and its seed."""
    dealt = torch.cat([parts[split] for split in SPLITS])
    windows = torch.empty_like(dealt)
    windows[dealing_order(len(dealt), seed)] = dealt  # as they were written
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    calibration, proxy, heldout = (parts[split] for split in SPLITS)
    source = "self (sampled from the dense model)"
    return TokenWindows(calibration, proxy, heldout, source, digest, windows.numel(), bos=True)
