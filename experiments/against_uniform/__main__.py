"""Every front point of a finished run against the uniform-width model of the same size, on the run's held-out windows.

    python -m experiments.against_uniform runs/llama

A uniform model keeps the same number of neurons in every layer and all KV groups; it gets the same ranking and
compensation. Its held-out loss at the size of a front point is interpolated between the two nearest uniform widths.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.quiet import Quiet
from llmbo.assemble import load_windows, prepared
from llmbo.config import RunConfig
from llmbo.models import load_model, silence_libraries
from llmbo.report import Report


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    report = Report.model_validate(json.loads((parser.parse_args().run / "report.json").read_text()))
    config = RunConfig.from_settings(
        report.run.settings, reference_point=None, dtype=report.run.dtype, device=report.run.device
    )
    loaded = load_model(config.model, config.dtype, config.device)
    windows = load_windows(config, loaded)
    with prepared(config, loaded, windows, Quiet()) as problem:
        heldout = problem.heldout()
        layers, top = problem.space.num_layers, problem.space.max_levels
        smallest = min(point.objectives.params_share for point in report.front)
        uniform = []
        for level in range(top[-1], 0, -1):
            uniform.append(heldout.evaluate((*top[:layers], *[level] * layers)))
            if uniform[-1]["params_share"] < smallest:
                break
        uniform.reverse()  # smallest first, as interpolation wants it
    shares = np.array([values["params_share"] for values in uniform])
    losses = np.array([values["loss"] for values in uniform])
    print("trial  share   held-out loss   uniform of that size   gain (nats)")
    worse = 0
    for point in report.front:
        assert point.heldout is not None, "the run is not finished"
        share, loss = point.objectives.params_share, point.heldout.loss
        expected = float(np.interp(share, shares, losses))
        worse += share <= 0.8 and loss >= expected
        print(f"{point.trial:5}  {share:.3f}  {loss:14.3f}  {expected:21.3f}  {expected - loss:12.3f}")
    print(f"front points with share <= 0.8 that do not beat uniform width: {worse}")


if __name__ == "__main__":
    main()
