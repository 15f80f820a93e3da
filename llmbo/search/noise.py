"""How far chance reaches: on other windows of the same text every value would come out a little otherwise.

All candidates see the same windows, so whatever makes a window hard for all of them cancels out of a comparison window by window.
Windows are taken as drawn independently of each other; of another text nothing follows.
"""

from collections.abc import Sequence

import torch
from scipy.stats import t as student
from torch import Tensor

from llmbo.problem.interpolation import bracketed
from llmbo.types import Trial

LEVEL = 0.95


def half_width(windows: Tensor) -> Tensor:
    """Of the 95 % interval of a mean over at least two windows, by Student's t; `... x n` -> `...`.

    Of the differences of two candidates it says whether they can be told apart: under that hypothesis it covers 95 to 98 % for 4 to 48
    skewed windows, where the ratio's interval by the delta method covers 89 to 95 % and by the jackknife 92 to 95 %.
    """
    n = windows.shape[-1]
    return float(student.ppf((1 + LEVEL) / 2, n - 1)) * windows.std(-1) / n**0.5


def surely_better(windows: Tensor, others: Tensor) -> Tensor:
    """Whether the mean over all windows of the text is lower: the interval of the paired differences is below 0.

    Args:
        windows: Of one candidate, `n`, at least two; lower is better.
        others: Of others, `... x n`.
    """
    differences = windows - others
    return differences.mean(-1) + half_width(differences) < 0


def gain_errors(trials: Sequence[Trial], name: str) -> dict[int, float]:
    """Standard error of the gains of trials off the path (`gain.trial_gains`), by number, as far as windows were kept.

    Each is compared, window by window, with what lies between its neighbours on the path, linearly in the share. Of two windows that are
    as hard for both nothing is left. Beyond the largest measured member it is compared with that one.

    Args:
        name: `kl` or `loss`; of other quantities no windows are kept.
    """
    known = [trial for trial in trials if trial.complete and len(trial.windows.get(name, ())) > 1]
    members = sorted((t for t in known if t.on_path and not t.stopped), key=lambda t: t.values["params_share"])
    if len(members) < 2:
        return {}
    shares = torch.tensor([member.values["params_share"] for member in members], dtype=torch.float64)
    found = {}
    for trial in (trial for trial in known if not trial.on_path):
        own = torch.tensor(trial.windows[name], dtype=torch.float64)
        right, weight = bracketed(
            shares, shares.new_tensor([trial.values["params_share"]]).clamp(shares[0], shares[-1])
        )
        pair = [members[int(right) - 1].windows[name], members[int(right)].windows[name]]
        low, high = (torch.tensor(windows[: len(own)], dtype=torch.float64) for windows in pair)
        found[trial.number] = float((own - torch.lerp(low, high, weight)).std() / len(own) ** 0.5)
    return found
