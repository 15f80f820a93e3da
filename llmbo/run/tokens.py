"""How many tokens refits are fitted on, and at how many pruned models, where nobody says: what this machine gets through in a minute."""

from dataclasses import replace

from llmbo.config import RunConfig
from llmbo.models.placement import DTYPES
from llmbo.problem.anchors import PHASE
from llmbo.problem.residence import workload_of
from llmbo.problem.sequence import least_tokens
from llmbo.problem.space import space_of
from llmbo.run.duration import Rates, seconds_by_phase
from llmbo.types import FITTING, WRITING
from pruning.anatomy import Anatomy

CHOICES = (65536, 32768, 16384, 8192)  # beyond the first little is gained, below the last refits fit noise
SECONDS = 60.0  # that ranking and refits may take
WRITING_SECONDS = 120.0  # that the model may write them for, of a run on what it writes
ANCHORS, ANCHOR_SECONDS = (3, 2, 1), 120.0  # and those at pruned members: worth more than twice the evaluations


def settled(config: RunConfig, anatomy: Anatomy, dtype: str, device: str, rates: Rates | None = None) -> RunConfig:
    """The config with its `calibration_tokens` and `refit_anchors`: its own, or the most that are fast enough here.

    Args:
        dtype, device: Of the model.
        rates: What the machine does, instead of measuring it.
    """
    enough = config.compensation and (config.calibration_tokens or CHOICES[0]) >= least_tokens(anatomy)
    if config.refit_anchors is None and not enough:
        config = replace(config, refit_anchors=0)
    if config.calibration_tokens and config.refit_anchors is not None:
        return config
    tried = [config]
    if not config.calibration_tokens:
        tried = [replace(config, calibration_tokens=max(tokens, config.window)) for tokens in CHOICES]
    rates = rates or Rates.measure(anatomy, DTYPES[dtype], device, workload_of(tried[-1], device).batch_tokens)
    space, itemsize = space_of(config, anatomy), DTYPES[dtype].itemsize

    def seconds(one: RunConfig) -> dict[str, float]:
        return seconds_by_phase(one, space, itemsize, False, rates)

    def fast_enough(one: RunConfig) -> bool:
        needed = seconds(one)
        return needed[FITTING] <= SECONDS and needed.get(WRITING, 0.0) <= WRITING_SECONDS

    config = next(filter(fast_enough, tried), tried[-1])
    if config.refit_anchors is not None:
        return config
    if config.calibration_tokens >= least_tokens(anatomy):
        for number in ANCHORS:
            more = replace(config, refit_anchors=number)
            if seconds(more)[PHASE] <= ANCHOR_SECONDS:
                return more
    return replace(config, refit_anchors=0)
