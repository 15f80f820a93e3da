"""How many tokens refits are fitted on where nobody says: as many as this machine gets through in a minute."""

from dataclasses import replace

from llmbo.config import RunConfig
from llmbo.models.placement import DTYPES
from llmbo.problem.residence import workload_of
from llmbo.problem.space import space_of
from llmbo.run.duration import Rates, seconds_by_phase
from llmbo.types import FITTING
from pruning.anatomy import Anatomy

CHOICES = (65536, 32768, 16384, 8192)  # beyond the first little is gained, below the last refits fit noise
SECONDS = 60.0  # that ranking and refits may take


def settled(config: RunConfig, anatomy: Anatomy, dtype: str, device: str, rates: Rates | None = None) -> RunConfig:
    """The config with its `calibration_tokens`: its own, or the most that are fast enough here.

    Args:
        dtype, device: Of the model.
        rates: What the machine does, instead of measuring it.
    """
    if config.calibration_tokens:
        return config
    tried = [replace(config, calibration_tokens=max(tokens, config.window)) for tokens in CHOICES]
    rates = rates or Rates.measure(anatomy, DTYPES[dtype], device, workload_of(tried[-1]).batch_tokens)
    space, itemsize = space_of(config, anatomy), DTYPES[dtype].itemsize
    fast = (one for one in tried if seconds_by_phase(one, space, itemsize, False, rates)[FITTING] <= SECONDS)
    return next(fast, tried[-1])
