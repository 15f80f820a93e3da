"""BoTorch's qLogNEHVI, without the C++ kernel that BoTorch 0.18 would compile at first use.

The compilation is half a minute of silence, and a process killed meanwhile leaves a lock on which every later one waits for ever.
The kernel is worth nothing for a shortlist of a few dozen candidates. BoTorch has no public switch for it (0.18.1), only a mark that
the attempt has been made; `tests/llmbo/search/test_acquisition.py` tells when that mark is gone or no longer heeded.
"""

from botorch.acquisition.multi_objective import logei

logei._load_attempted = True

qLogNoisyExpectedHypervolumeImprovement = logei.qLogNoisyExpectedHypervolumeImprovement
