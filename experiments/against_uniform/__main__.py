"""Every front point of a finished run against the uniform-width model of the same size, on held-out windows.

    python -m experiments.against_uniform runs/llama

A uniform model keeps the same number of neurons in every layer and all KV groups; it gets the same ranking and
compensation. Its held-out loss at the size of a front point is interpolated between the two nearest uniform widths. Both are
measured on more windows than a run judges its front on: near the dense model they differ by hundredths of a nat.
"""

import argparse

import numpy as np

from experiments.quiet import Quiet
from llmbo.config import RunConfig
from llmbo.models.loading import load_model, silence_libraries
from llmbo.problem.preparation import load_windows, prepared
from llmbo.run.rebuild import architecture_of, find_trial, read_run


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run, or its name below runs/")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens that both are measured on")
    arguments = parser.parse_args()
    report = read_run(arguments.run)
    config = RunConfig.from_settings(
        report.run.settings,
        reference_point=None,
        heldout_tokens=arguments.tokens,
        dtype=report.run.dtype,
        device=report.run.device,
    )
    loaded = load_model(config.model, config.dtype, config.device)
    windows = load_windows(config, loaded)
    with prepared(config, loaded, windows, Quiet()) as problem:
        heldout = problem.heldout()
        layers, top = problem.space.num_layers, problem.space.max_levels
        smallest = min(point.objectives.params_share for point in report.front)
        uniform = []
        for level in range(top[-1], 0, -1):
            uniform += heldout.evaluate([(*top[:layers], *[level] * layers)])
            if uniform[-1]["params_share"] < smallest:
                break
        uniform.reverse()  # smallest first, as interpolation wants it
        kept = [architecture_of(find_trial(report, point.trial)) for point in report.front]
        front = heldout.evaluate([problem.space.encode(architecture) for architecture in kept])
    shares = np.array([values["params_share"] for values in uniform])
    losses = np.array([values["loss"] for values in uniform])
    print("trial  share   held-out loss   uniform of that size   gain (nats)")
    worse = 0
    for point, values in zip(report.front, front, strict=True):
        share, loss = values["params_share"], values["loss"]
        expected = float(np.interp(share, shares, losses))
        worse += loss >= expected
        print(f"{point.trial:5}  {share:.3f}  {loss:14.3f}  {expected:21.3f}  {expected - loss:12.3f}")
    print(f"front points that do not beat uniform width: {worse} of {len(front)}")


if __name__ == "__main__":
    main()
