"""The classes below *are* the format of `comparison.json`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

# Metric of a judged front -> the quality that it goes by.
HELDOUT = {"heldout_hypervolume": "loss", "heldout_accuracy_hypervolume": "accuracy"}
SIZES = tuple(size / 50 for size in range(1, 50))  # at which KL is compared, as parts of the dense model's


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BandPart(_Part):
    """Mean over the optimiser's seeds and its 95 % interval (Student's t); text and model are fixed. Null ends: a single seed."""

    mean: float
    low: float | None
    high: float | None


class CheckpointPart(_Part):
    """The front after so many evaluations.

    `heldout_hypervolume` is that of `points` by held-out loss and the costs that the method searches, `heldout_accuracy_hypervolume`
    by accuracy on held-out items in place of loss, null where accuracy is not searched. `gain` is the mean, over `points`, of the
    threshold family's quality at the same size minus the point's own (nats, on the proxy windows), size being the parameter share,
    or the mean of other costs that are searched, each as a part of the dense model's; `heldout_gain` the same in held-out loss.
    `survival` is the share of the proxy's gain that held-out text confirms. `log_kl` is the log of the KL from the dense model that the
    front's best model has which fits each of `SIZES`: null where none fits, empty where KL is not known; `heldout_log_kl` the same for
    `points` on held-out windows.
    """

    evaluations: int
    hypervolume: float
    heldout_hypervolume: float | None
    heldout_accuracy_hypervolume: float | None = None
    gain: float | None
    heldout_gain: float | None
    survival: float | None
    points: list[int]
    log_kl: list[float | None] = []
    heldout_log_kl: list[float | None] = []


class TrialPart(_Part):
    """`values` are empty when the trial failed; `gain` is null where the family was not measured."""

    number: int
    round: int
    origin: str
    digest: str
    values: dict[str, float]
    gain: float | None


class ArmPart(_Part):
    """One strategy under one seed. `seconds` are summed up to each trial; `proposal_seconds` are of each round."""

    label: str
    strategy: str
    seed: int
    checkpoints: list[CheckpointPart]
    trace: list[float]
    seconds: list[float]
    proposal_seconds: list[float]
    trials: list[TrialPart]


class SummaryPart(_Part):
    """One strategy over all seeds. `comparable` says whether its proxy values are measured like the method's."""

    label: str
    comparable: bool
    checkpoints: dict[int, dict[str, BandPart | None]]
    trace: list[BandPart]
    seconds: BandPart
    median_proposal_seconds: float


class TestPart(_Part):
    """The method against another strategy, seed by seed; positive differences are in its favour.

    Metrics are hypervolumes, and `log_kl` and `heldout_log_kl`: by how much the method's are lower, mean over those of `SIZES` that models
    of both fit.
    `verdict` calls it ahead or behind where the interval is without zero, and never with three seeds or fewer.
    """

    label: str
    metric: str
    evaluations: int
    difference: BandPart
    wins: int
    seeds: int
    p: float | None
    verdict: Literal["ahead", "behind", ""]


class ReachPart(_Part):
    """Evaluations that `label`'s mean trace needs to reach `baseline`'s mean final hypervolume; null: not within the budget."""

    label: str
    baseline: str
    evaluations: int | None


class UnionPoint(_Part):
    """A point that no trial of any strategy dominates."""

    digest: str
    kv_groups: list[int]
    neurons: list[int]
    fewer_queries: list[int] = []
    found_by: list[str]
    values: dict[str, float]
    heldout: dict[str, float] | None


class Comparison(_Part):
    """`judged` are the objectives of held-out hypervolumes by quality; earlier versions did not say them: loss and parameter share."""

    schema_version: Literal[1] = 1
    name: str
    status: Literal["complete", "interrupted"]
    method: str
    seeds: list[int]
    checkpoints: list[int]
    settings: dict[str, Any]
    facts: dict[str, Any]
    environment: dict[str, Any]
    objectives: list[dict[str, Any]]
    judged: dict[str, list[dict[str, Any]]] = {}
    arms: list[ArmPart]
    summaries: list[SummaryPart]
    tests: list[TestPart]
    reach: list[ReachPart]
    union_front: list[UnionPoint]
