"""Turn the evaluations that comparisons have cached into a recorded benchmark: a table, and a surrogate fitted to it.

    python -m experiments.record experiments/configs/problem_r_kl.toml --text text:path/to/wikitext2-valid.txt

The problem is the one of the config's method. `fit.json` states the errors on architectures that the fit never saw, by
8-fold cross-validation: over all of them, and in the front region (KL below 1.25 times that of the measured threshold families
at that size).
Afterwards `llmbo compare CONFIG --problem problem-r-surrogate` needs no model.

    python -m experiments.record --refit    # fits the surrogate anew to the table that is there
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from experiments.quiet import Quiet
from llmbo.comparison.config import read_config
from llmbo.comparison.gaussian_process import hyperparameters_of
from llmbo.comparison.problems import OpenProblem, opened
from llmbo.comparison.recorded import FIT, TARGETS, Recording, Surrogate, fit_process
from llmbo.comparison.store import EvaluationStore
from llmbo.models.loading import find_prunable
from llmbo.models.silence import silence_libraries

FOLDS = 8
FRONT = 1.25  # times the KL of the measured threshold families
MIN_MEASURED = 30  # rows that a target needs to be modelled at all
Array = NDArray[np.float64]


def main() -> None:
    silence_libraries()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?")
    parser.add_argument("--text", help="replaces the problem's text")
    parser.add_argument("--cache", type=Path, default=Path("comparisons/evaluations.db"))
    parser.add_argument("--out", type=Path, default=Path("experiments/problem_r_surrogate"))
    parser.add_argument("--refit", action="store_true", help="read the table in --out, not the cache")
    arguments = parser.parse_args()
    if not arguments.refit:
        if arguments.config is None:
            parser.error("expected a config, or --refit")
        write_table(arguments.config, arguments.text, arguments.cache, arguments.out)
    fit = fitted(Recording.read(arguments.out))  # what readers will see, rounded as it is
    (arguments.out / FIT).write_text(json.dumps(fit, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(fit, indent=1))


def write_table(path: Path, text: str | None, cache: Path, out: Path) -> None:
    """Turn what the cache holds about the problem of the config's method into a table."""
    config = read_config(path, text=text)
    problem_config = next(arm.problem for arm in config.arms if arm.label == config.method)
    with (
        EvaluationStore.open(cache) as store,
        opened(
            problem_config, [problem_config], config.margin, problem_config.run.objectives, store, Quiet()
        ) as problem,
    ):
        recorded(problem, store).write(out, sizes(problem_config.run.model))


def fitted(recording: Recording) -> dict[str, object]:
    """`fit.json`: hyperparameters by target, and the errors of what they predict."""
    found = {
        name: {key: float(f"{value:.6g}") for key, value in hyperparameters_of(fit_process(recording, name)).items()}
        for name in TARGETS
        if recording.targets(name)[1].sum() >= MIN_MEASURED
    }
    return {"hyperparameters": found, "rows": len(recording.points), "errors": errors(recording, found)}


def recorded(problem: OpenProblem, store: EvaluationStore) -> Recording:
    """Everything that the store holds about a problem."""
    proxy, heldout = problem.evaluators
    rows = {x: (origin, values) for x, origin, values in store.evaluations(proxy)}
    unseen = {x: values for x, _, values in store.evaluations(heldout)}
    dense = problem.space.max_levels
    points = [x for x in rows if x != dense]
    nothing = {"kl": float("nan"), "loss": float("nan")}
    columns: dict[str, list[float]] = {
        **{name: [rows[x][1][name] for x in points] for name in ("kl", "loss")},
        **{f"heldout_{name}": [unseen.get(x, nothing)[name] for x in points] for name in ("kl", "loss")},
    }
    return Recording(
        problem.space,
        problem.search.family,
        problem.search.threshold_family,
        problem.search.fisher_family,
        problem.search.taylor_family,
        tuple(points),
        tuple(rows[x][0] for x in points),
        {name: np.array(column) for name, column in columns.items()},
        {**problem.search.dense, **{f"heldout_{name}": unseen[dense][name] for name in ("kl", "loss")}},
        {**problem.facts, "recorded": len(points)},
    )


def sizes(model: str) -> dict[str, object]:
    """The part of a model's config that lays out its modules."""
    keys = (
        "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias",
    )  # fmt: skip
    config = find_prunable(model).config.to_dict()
    return {key: config[key] for key in keys if key in config}


def errors(recording: Recording, hyperparameters: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Cross-validated errors in nats and rank correlations, by target."""
    fold = np.random.default_rng(0).integers(FOLDS, size=len(recording.points))
    predicted = {name: np.full(len(recording.points), np.nan) for name in hyperparameters}
    for k in range(FOLDS):
        left_out = np.flatnonzero(fold == k)
        answers = Surrogate(recording, hyperparameters, fold != k)([recording.points[row] for row in left_out])
        for name in hyperparameters:
            predicted[name][left_out] = answers[name]
    near, family = front_region(recording)
    found = {}
    for name in hyperparameters:
        known = ~np.isnan(recording.values[name])
        measured, guess = recording.values[name][known], predicted[name][known]
        front = near[known]
        found[name] = {
            "rows": int(known.sum()),
            "front_rows": int(front.sum()),
            "rmse": rounded(np.sqrt(np.mean((guess - measured) ** 2))),
            "front_rmse": rounded(np.sqrt(np.mean((guess - measured)[front] ** 2))),
            "spearman": rounded(spearmanr(guess, measured).statistic),
            "front_spearman": rounded(spearmanr(guess[front], measured[front]).statistic),
        }
    members = np.array([origin.startswith("threshold") for origin in recording.origins])
    others = near & ~members
    gain, guessed = (
        np.log(v[others] + 0.02) - np.log(family[others] + 0.02) for v in (recording.values["kl"], predicted["kl"])
    )
    found["gain at equal share, front region"] = {
        "rows": int(others.sum()),
        "spearman": rounded(spearmanr(guessed, gain).statistic),
    }
    return found


def front_region(recording: Recording) -> tuple[NDArray[np.bool_], Array]:
    """Which rows lie near the front, and the threshold families' KL at the size of each."""
    import torch

    shares = recording.space.share(torch.tensor(recording.points, dtype=torch.float64)).numpy()
    members = np.array([origin.startswith("threshold") for origin in recording.origins])
    order = shares[members].argsort()
    family = np.interp(shares, [*shares[members][order], 1.0], [*recording.values["kl"][members][order], 0.0])
    return recording.values["kl"] < FRONT * family, family


def rounded(value: float) -> float:
    return round(float(value), 4)


if __name__ == "__main__":
    main()
