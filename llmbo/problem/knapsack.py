"""One level for every block, the cheapest that fits: a multiple-choice knapsack, solved exactly by HiGHS."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

NODE_LIMIT = 20_000  # of the search tree; a limit in seconds would make answers depend on the machine


def cheapest(
    costs: Sequence[np.ndarray],
    sizes: Sequence[np.ndarray],
    least: float,
    most: float,
    also: Sequence[LinearConstraint] = (),
) -> list[int] | None:
    """Index of the choice of each block, so that the sum of costs is lowest and that of sizes from `least` to `most`.

    None where there is no such choice, or none was found within `NODE_LIMIT`.

    Args:
        costs: Of every choice, by block; infinite for one that must not be taken.
        sizes: Like them.
        also: Further constraints on the 0-1 vector of all blocks' choices, one block after another.
    """
    lengths = [len(block) for block in costs]
    owner = np.repeat(np.arange(len(lengths)), lengths)
    cost = np.concatenate(costs)
    possible = np.isfinite(cost)
    answer = milp(
        np.where(possible, cost, 0.0),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, possible.astype(float)),
        constraints=[
            LinearConstraint((owner == np.arange(len(lengths))[:, None]).astype(float), 1, 1),
            LinearConstraint(np.concatenate(sizes)[None], least, most),
            *also,
        ],
        options={"node_limit": NODE_LIMIT, "mip_rel_gap": 1e-3},
    )
    if answer.x is None:
        return None
    return [int(block.argmax()) for block in np.split(answer.x, np.cumsum(lengths)[:-1])]
