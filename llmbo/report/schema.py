"""The format of `report.json`. These classes validate every report before it is written; `docs/report.schema.json` is made from them."""

import json
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    create_model,
    model_serializer,
    model_validator,
)

from llmbo.advisor.parts import AdvisorPart
from llmbo.config.objectives import QUANTITIES, Quantity
from llmbo.report.origin import DataPart, ElsewherePart, ModelPart, RunPart

Recipe = dict[str, float | dict[str, list[float]]]  # as `AllocationRecipe.to_dict` has it


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SpacePart(_Part):
    dimensions: int
    kv_group_levels: list[int]
    neuron_levels: list[int]
    min_share: float


class ObjectivePart(_Part):
    name: str
    unit: str
    direction: Literal["minimize", "maximize"]
    reference_point: float
    known: bool


class ConstraintPart(_Part):
    """A limit: `known` ones were kept by every candidate, of the others each trial says whether it is `feasible`."""

    name: str
    unit: str
    maximum: float
    known: bool


class ArchitecturePart(_Part):
    """`fewer_queries`: query heads that each KV group of a layer lacks; left out where none lacks any."""

    kv_groups: list[int]
    neurons: list[int]
    fewer_queries: list[int] = []

    @model_serializer(mode="wrap")
    def _as_it_always_was(self, told: SerializerFunctionWrapHandler) -> dict[str, list[int]]:
        found: dict[str, list[int]] = told(self)
        return found if self.fewer_queries else {"kv_groups": found["kv_groups"], "neurons": found["neurons"]}


class PathPart(_Part):
    """What a recipe's path keeps at a size."""

    share: float
    architecture: ArchitecturePart


class RecipePart(_Part):
    """An allocation recipe, in numbers and in words.

    `names`: `own` made this run's path; `best` is the best that the search tried: its `trials`, of two sizes or more, save the part `gain`
    of the path's excess over the dense model, on average at equal size. `paths`: at some sizes, with the width exchanges of this run,
    which were measured along its own path.
    """

    names: list[Literal["own", "default", "dense-prices", "best"]]
    numbers: Recipe
    words: str
    trials: list[int] = []
    gain: float | None = None
    paths: list[PathPart] = []


def _field(row: Quantity) -> Any:
    kind = int if row.integer else float
    return kind if row.required else (kind | None, None)


if TYPE_CHECKING:
    _Fields = _Part
else:  # one field for each row of the table, what every report has first
    _rows = sorted(QUANTITIES.items(), key=lambda item: not item[1].required)
    _Fields = create_model("Values", __base__=_Part, **{name: _field(row) for name, row in _rows})


class Values(_Fields):
    """`kl` and `loss` in nats per token; `accuracy` as a share of the items; `params` of the whole model;
    `params_share` of the decoder blocks.

    `flops` per token and `kv_bytes` at the context and batch that the settings name; `weight_bytes` and `kv_bytes` at 2 bytes a value.
    A candidate that lost its race was stopped after `tokens`: its values are estimates with standard error `error`, and it is on no front.
    Latencies in milliseconds per prompt and per token, `energy` in joules per decoded token, `peak_memory` in bytes: in `objectives`
    from tables of blocks, in `heldout` measured on the model cut for real.
    """

    if TYPE_CHECKING:  # those that the package itself reads
        kl: float
        loss: float
        perplexity: float
        params: int
        params_share: float


class TrialPart(_Part):
    """`gain`: quality saved against the threshold family at the same share, in its unit; null where the family is unknown.

    `counts`: whether it may stand on the front: measured to the end, without losing a race, and within the limits. Null in reports
    of earlier versions, where it follows from the rest.
    `why`: the advisor's reason for the proposal that the trial stems from, refined by local search or not; empty without one.
    `recipe`: numbers of the recipe whose path it lies on, or near after local search, and its `profile`, a bonus for each layer and
    kind, if it has one; null where it stems from none.
    """

    number: int
    round: int
    origin: str
    state: Literal["running", "complete", "failed"]
    architecture: ArchitecturePart
    objectives: Values | None
    seconds: float | None
    failure: str | None
    gain: float | None = None
    feasible: bool = True
    counts: bool | None = None
    why: str = ""
    recipe: Recipe | None = None


class ItemsPart(_Part):
    """A file of `count` items, all of one `kind`."""

    name: str
    source: str
    sha256: str
    kind: Literal["multiple_choice", "last_word"]
    count: int


class ItemScores(_Part):
    """What a model got right of a file of items, as lm-eval names it, with standard errors.

    `acc` is the share of right answers: of multiple choice the likeliest choice, of last words that greedy decoding writes exactly them.
    `acc_norm` takes the likeliest choice per character. `perplexity` is of whole continuations.
    """

    acc: float
    acc_stderr: float
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    perplexity: float | None = None


class NoisePart(_Part):
    """What chance of the `windows` that values are means of leaves open, by Student's t, window by window against what is compared.

    `kl`, `loss`: half-widths of the 95 % intervals, in nats per token, of the mean kl, and of the mean loss above the dense model's on the
    same windows. `not_better_than`: smaller points of the front that this one is not surely better than in `by`: the 95 % interval of
    their differences is not below 0.
    """

    windows: int
    kl: float
    loss: float
    by: Literal["kl", "loss"]
    not_better_than: list[int]


class Refitted(_Part):
    """What a trial measures with its output projections refitted in sequence, for it alone: on the same windows as without.

    `noise`, `noise_elsewhere`: as of a point of the front, among those that are refitted.
    """

    objectives: Values
    heldout: Values | None = None
    elsewhere: Values | None = None
    noise: NoisePart | None = None
    noise_elsewhere: NoisePart | None = None


class FrontPoint(_Part):
    """`heldout` is null while the held-out windows have not been evaluated (an interrupted run).

    `elsewhere` is the same on text of another domain, which the report's `elsewhere` names.
    `items`: scores by the name of each file of items. `samples`: greedy continuations by prompt; a few points have some. Both are
    made after the search, and null where they were not. `refitted`: some points are measured with refits in sequence, too.
    `noise` and, on text of another domain, `noise_elsewhere` are null for the dense model, where there are no two windows, and for points
    that an earlier version measured.
    """

    trial: int | None
    architecture: ArchitecturePart
    objectives: Values
    heldout: Values | None
    elsewhere: Values | None = None
    items: dict[str, ItemScores] | None = None
    samples: dict[str, str] | None = None
    refitted: Refitted | None = None
    noise: NoisePart | None = None
    noise_elsewhere: NoisePart | None = None


class HypervolumePart(_Part):
    """Dominated hypervolume after each finished trial, in the product of the objectives' units."""

    final: float
    trace: list[float]


class ImportancePart(_Part):
    """What one method says about the blocks of one kind: `scores` has one number per layer, summed over the block's units.

    `layer` stands for a whole layer. Larger means "hurts more if removed"; methods have units of their own.
    """

    method: str
    kind: Literal["attention", "mlp", "layer"]
    scores: list[float]


class Report(_Part):
    """`warnings` say in words what the numbers leave unsaid: that nothing counts, and why.

    `schema_version`: 1 of reports that know no `noise`.
    """

    schema_version: Literal[1, 2] = 2
    run: RunPart
    model: ModelPart
    data: DataPart
    elsewhere: ElsewherePart | None = None
    items: list[ItemsPart] = []
    space: SpacePart
    objectives: list[ObjectivePart]
    constraints: list[ConstraintPart] = []
    dense: FrontPoint
    trials: list[TrialPart]
    front: list[FrontPoint]
    hypervolume: HypervolumePart
    warnings: list[str] = []
    importance: list[ImportancePart] = []
    recipes: list[RecipePart] = []
    advisor: AdvisorPart | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        """Trials are found by their number, and cut from the model by their architecture."""
        if [trial.number for trial in self.trials] != list(range(len(self.trials))):
            raise ValueError("trials: their numbers do not count up from 0")
        for place, number in enumerate(point.trial for point in self.front):
            if number is None or not 0 <= number < len(self.trials):
                raise ValueError(f"front.{place}.trial: there is no trial {number}")
        model, queries = self.model, self.model.num_attention_heads // self.model.num_key_value_heads
        parts: dict[str, FrontPoint | TrialPart | PathPart] = {f"trials.{trial.number}": trial for trial in self.trials}
        for place, recipe in enumerate(self.recipes):
            parts |= {f"recipes.{place}.paths.{index}": path for index, path in enumerate(recipe.paths)}
        for name, part in {"dense": self.dense, **parts}.items():
            for kind, units, most in (
                ("kv_groups", part.architecture.kv_groups, model.num_key_value_heads),
                ("fewer_queries", part.architecture.fewer_queries or [0] * model.num_hidden_layers, queries - 1),
                ("neurons", part.architecture.neurons, model.intermediate_size),
            ):
                if len(units) != model.num_hidden_layers or not all(0 <= kept <= most for kept in units):
                    raise ValueError(f"{name}.architecture.{kind}: the model has {model.num_hidden_layers} x {most}")
        if missing := [
            part.name for part in self.objectives if getattr(self.dense.objectives, part.name, None) is None
        ]:
            raise ValueError(f"dense.objectives: nothing is known of {missing[0]}")
        return self

    def point_of(self, trial: int) -> FrontPoint | None:
        """A trial's point of the front, which alone has held-out values; None where it has none."""
        return next((point for point in self.front if point.trial == trial), None)


def json_schema() -> str:
    """The JSON schema of `report.json`, as kept in `docs/`."""
    return json.dumps(Report.model_json_schema(), indent=2) + "\n"
