"""How the speed of models that took turns is told: prefill and decode, each beside the dense model's in the same repetition."""

import statistics
from collections.abc import Sequence

Times = tuple[float, float]  # seconds of one prefill, and of one decoded token


def cells(dense: Sequence[Times], own: Sequence[Times], prompt: int) -> str:
    """Tokens a second and speed-up, of prefills of `prompt` tokens and of decoding, as cells of a Markdown row."""
    prefill, decode = (statistics.median(part) for part in zip(*own, strict=True))
    faster = [_spread([of[part] / by[part] for of, by in zip(dense, own, strict=True)]) for part in (0, 1)]
    return f"{prompt / prefill:.0f} | {faster[0]} | {1 / decode:.1f} | {faster[1]}"


def _spread(ratios: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"
