"""What the method must beat, one idea per file. Every baseline is a proposer like any other.

Only the designs that other proposers start from are named here: the rest bring heavy libraries along.
"""

from llmbo.search.baselines.designs import RandomProposer, ThresholdProposer

__all__ = ["RandomProposer", "ThresholdProposer"]
