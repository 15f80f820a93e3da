"""A recorded benchmark: real evaluations of one problem in a table, and a surrogate that fills the gaps between them.

    F(x)                                     features: removed share of every block, weighted by importance, raw and smoothed along depth
    log (kl + eps)                           Gaussian process over F (`llmbo.comparison.gaussian_process`), posterior mean
    log (excess of v + eps) - log (kl + eps) the same for v = loss, held-out loss and held-out KL

so comparing strategies takes seconds. It is exact to the errors stated in `fit.json`, and no judge of published claims.
"""

import csv
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from botorch.models import SingleTaskGP
from numpy.typing import NDArray
from torch import Tensor

from llmbo.comparison.config import ProblemConfig
from llmbo.comparison.gaussian_process import (
    fit_gaussian_process,
    gaussian_process,
    posterior_mean,
    with_hyperparameters,
)
from llmbo.comparison.problems import Measure, OpenProblem, judged_objectives
from llmbo.comparison.store import Evaluation
from llmbo.errors import StorageError, first_line
from llmbo.problem.depth import binomial_smoothed
from llmbo.problem.family import Expansions, ThresholdFamily
from llmbo.problem.objectives import build_objectives
from llmbo.problem.proxy import known_values
from llmbo.problem.space import SearchSpace
from pruning.anatomy import anatomy_of

Array = NDArray[np.float64]
EPSILON = 0.02  # nats, as in `llmbo.search.gain`
TABLE, PROBLEM, FIT = "evaluations.csv", "problem.json", "fit.json"
TARGETS = ("kl", "loss", "heldout_loss", "heldout_kl")
FITTED_ROWS = 1000
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"  # one per level
ROOTS = (Path(), Path(__file__).parents[2])  # where `experiments/` may be: here, or in the checkout


@dataclass(frozen=True)
class Recording:
    """The table and what a search may know beforehand.

    Args:
        points: Grid levels of every row.
        origins: Who proposed it first.
        values: `TARGETS` -> one number per row; NaN where it was not measured.
        dense: The dense model's proxy values by name, and `heldout_loss`, `heldout_kl`.
    """

    space: SearchSpace
    family: ThresholdFamily
    threshold_family: ThresholdFamily
    fisher_family: ThresholdFamily
    taylor_family: ThresholdFamily
    points: tuple[tuple[int, ...], ...]
    origins: tuple[str, ...]
    values: Mapping[str, Array]
    dense: Mapping[str, float]
    facts: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Recording":
        """Read a folder.

        Raises:
            StorageError: Something in it is missing or damaged.
        """
        try:
            data = json.loads((folder / PROBLEM).read_text(encoding="utf-8"))
            with (folder / TABLE).open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            space = SearchSpace(_anatomy(data["config"]), data["min_share"], data["neuron_step"])
            return cls(
                space,
                _family(space, data["family"]),
                _family(space, data["threshold_family"]),
                _family(space, data["fisher_family"]),
                _family(space, data["taylor_family"]),
                points=tuple(_levels(row["x"]) for row in rows),
                origins=tuple(row["origin"] for row in rows),
                values={name: np.array([float(row[name] or "nan") for row in rows]) for name in TARGETS},
                dense=data["dense"],
                facts=data["facts"],
            )
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"The recorded benchmark '{folder}' cannot be read ({first_line(error)}).") from error

    def write(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Write a folder; `config` is the model's, with its sizes."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "facts": dict(self.facts),
            "config": dict(config),
            "min_share": self.space.min_share,
            "neuron_step": self.space.neuron_step,
            "dense": dict(self.dense),
            "family": _members(self.family),
            "threshold_family": _members(self.threshold_family),
            "fisher_family": _members(self.fisher_family),
            "taylor_family": _members(self.taylor_family),
        }
        (folder / PROBLEM).write_text(json.dumps(data) + "\n", encoding="utf-8")
        with (folder / TABLE).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["x", "origin", "share", *TARGETS])
            shares = self.space.share(torch.tensor(self.points, dtype=torch.float64)).tolist()
            for row, (x, origin, share) in enumerate(zip(self.points, self.origins, shares, strict=True)):
                cells = [float(self.values[name][row]) for name in TARGETS]
                numbers = ["" if math.isnan(cell) else f"{cell:.5f}" for cell in cells]
                writer.writerow([_digits(x), origin, f"{share:.5f}", *numbers])

    def features(self, points: Sequence[tuple[int, ...]]) -> Array:
        """F(x), `n x 2d`."""
        levels = np.asarray(points, dtype=np.float64)
        importance = self.family.importance.numpy()
        weighted = (1 - levels / np.asarray(self.space.max_levels)) * (importance / importance.mean()) ** 0.25
        parts = torch.from_numpy(weighted).split(self.space.num_layers, dim=1)
        return np.hstack([weighted, *(binomial_smoothed(part, "constant").numpy() for part in parts)])

    def targets(self, name: str) -> tuple[Array, NDArray[np.bool_]]:
        """What the surrogate learns for `name`, and where it was measured."""
        known = ~np.isnan(self.values[name])
        kl = np.log(np.maximum(self.values["kl"], 0) + EPSILON)
        if name == "kl":
            return kl, known
        return np.log(np.maximum(self.values[name] - self.floor(name), 0) + EPSILON) - kl, known

    def training_data(self, name: str, rows: NDArray[np.bool_] | None = None) -> tuple[Tensor, Tensor]:
        """`n x 2d` features and `n x 1` targets of the rows that know `name`, in the order of points, whatever order the table has."""
        y, known = self.targets(name)
        used = np.flatnonzero(known if rows is None else known & rows)
        order = sorted(used.tolist(), key=lambda row: self.points[row])
        return torch.from_numpy(self.features([self.points[row] for row in order])), torch.from_numpy(y[order, None])

    def floor(self, name: str) -> float:
        """The dense model's value, of which only the excess is learnt."""
        return 0.0 if name.endswith("kl") else self.dense[name]


class Surrogate:
    """One Gaussian process for each target; what it predicts is its posterior mean.

    Args:
        hyperparameters: By target; none for a target that was measured too seldom.
        rows: Rows to learn from; all by default.

    Raises:
        ValueError: The hyperparameters are not those of the processes.
    """

    def __init__(
        self,
        recording: Recording,
        hyperparameters: Mapping[str, Mapping[str, float]],
        rows: NDArray[np.bool_] | None = None,
    ) -> None:
        self._recording = recording
        self._processes = {
            name: with_hyperparameters(gaussian_process(*recording.training_data(name, rows)), values)
            for name, values in hyperparameters.items()
        }

    def __call__(self, points: Sequence[tuple[int, ...]]) -> dict[str, Array]:
        """Predicted values by target, in nats."""
        features = torch.from_numpy(self._recording.features(points))
        log_kl = posterior_mean(self._processes["kl"], features)
        predicted = {"kl": np.maximum(np.exp(log_kl) - EPSILON, 0)}
        for name, process in self._processes.items():
            if name != "kl":
                excess = np.maximum(np.exp(log_kl + posterior_mean(process, features)) - EPSILON, 0)
                predicted[name] = self._recording.floor(name) + excess
        return predicted


def fit_process(recording: Recording, name: str) -> SingleTaskGP:
    """The process fitted to at most `FITTED_ROWS` rows, drawn at random: time grows with their cube."""
    train_X, train_Y = recording.training_data(name)
    rows = np.random.default_rng(0).permutation(len(train_Y))[:FITTED_ROWS]
    return fit_gaussian_process(gaussian_process(train_X[rows], train_Y[rows]))


@dataclass(frozen=True)
class RecordedSearch:
    """Implements `strategies.SearchProblem`."""

    recording: Recording

    @property
    def space(self) -> SearchSpace:
        return self.recording.space

    @property
    def family(self) -> ThresholdFamily:
        return self.recording.family

    @property
    def threshold_family(self) -> ThresholdFamily:
        return self.recording.threshold_family

    @property
    def fisher_family(self) -> ThresholdFamily:
        return self.recording.fisher_family

    @property
    def taylor_family(self) -> ThresholdFamily:
        return self.recording.taylor_family

    @cached_property
    def limits(self) -> dict[str, float]:
        return {}

    @cached_property
    def dense(self) -> dict[str, float]:
        return {name: value for name, value in self.recording.dense.items() if not name.startswith("heldout")}


def find_recorded(name: str) -> Path:
    """The folder behind a name: `problem-r-surrogate` is `experiments/problem_r_surrogate`.

    Raises:
        StorageError: It is nowhere to be found.
    """
    folders = [Path(name), *(root / "experiments" / name.replace("-", "_") for root in ROOTS)]
    for folder in folders:
        if (folder / TABLE).is_file():
            return folder
    raise StorageError(
        f"No recorded benchmark '{name}': expected a folder with {TABLE}, or the name of one below experiments/ in a checkout."
    )


def open_recorded(config: ProblemConfig, margin: float, judged_by: Sequence[str]) -> OpenProblem:
    """A recorded problem; its values are the surrogate's everywhere, so that measured points are no better known than others."""
    assert config.recorded is not None
    folder = find_recorded(config.recorded)
    recording = Recording.read(folder)
    try:
        fit = json.loads((folder / FIT).read_text(encoding="utf-8"))
        surrogate = Surrogate(recording, fit["hyperparameters"])
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(
            f"The recorded benchmark '{folder}' has no usable {FIT} ({first_line(error)}): fit it again with "
            f"python -m experiments.record --refit --out {folder}"
        ) from error
    search = RecordedSearch(recording)
    smallest = known_values(search.space, search.family.at(0.0))
    objectives = build_objectives(config.run.objectives, search.dense, smallest, config.run.reference_point)
    measure, judge = _predicting(surrogate, recording)
    dense = {"loss": recording.dense["heldout_loss"]} | known_values(search.space, search.space.max_levels)
    identity = hashlib.sha256(b"".join((folder / name).read_bytes() for name in (TABLE, PROBLEM, FIT))).hexdigest()
    if not judged_by or "heldout_loss" not in fit["hyperparameters"]:
        return OpenProblem(search, objectives, measure, None, {}, recording.facts, identity)
    judged = judged_objectives(judged_by, dense, smallest, margin)
    return OpenProblem(search, objectives, measure, judge, judged, recording.facts, identity)


def _predicting(surrogate: Surrogate, recording: Recording) -> tuple[Measure, Measure]:
    known: dict[tuple[int, ...], tuple[Evaluation, Evaluation]] = {}

    def both(x: tuple[int, ...]) -> tuple[Evaluation, Evaluation]:
        if x not in known:
            dense = x == recording.space.max_levels
            found = recording.dense if dense else {name: float(v[0]) for name, v in surrogate([x]).items()}
            sizes = known_values(recording.space, x)
            known[x] = (_evaluation(found, "", sizes), _evaluation(found, "heldout_", sizes))
        return known[x]

    return lambda x, origin: both(x)[0], lambda x, origin: both(x)[1]


def _evaluation(found: Mapping[str, float], prefix: str, sizes: Mapping[str, float]) -> Evaluation:
    values = {name: found[prefix + name] for name in ("kl", "loss") if prefix + name in found}
    loss = values.get("loss")
    return Evaluation({**values, **({"perplexity": math.exp(loss)} if loss is not None else {}), **sizes}, 0.0)


def _members(family: ThresholdFamily) -> dict[str, Any]:
    """A family's members, smallest first, one digit per block, the blocks' importance, and what is known around members."""
    found: dict[str, Any] = {
        "members": [_digits(x) for x in family.path.int().tolist()],
        "importance": family.importance.tolist(),
    }
    if family.expansions is not None:
        shares, changes = family.expansions.shares, family.expansions.changes
        found["expansions"] = {"shares": shares.tolist(), "changes": (changes * 1e6).round().div(1e6).tolist()}
    return found


def _family(space: SearchSpace, data: Mapping[str, Any]) -> ThresholdFamily:
    points = torch.tensor([_levels(row) for row in data["members"]], dtype=torch.float64)
    importance = torch.tensor(data["importance"], dtype=torch.float64)
    around = {key: torch.tensor(rows, dtype=torch.float64) for key, rows in data.get("expansions", {}).items()}
    return ThresholdFamily(space, points, space.share(points), importance, Expansions(**around) if around else None)


def _digits(x: Sequence[int]) -> str:
    return "".join(DIGITS[level] for level in x)


def _levels(row: str) -> tuple[int, ...]:
    return tuple(DIGITS.index(digit) for digit in row)


def _anatomy(config: Mapping[str, Any]) -> Any:
    """Sizes as the model's own class lays them out; no weight is allocated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return anatomy_of(AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False))
