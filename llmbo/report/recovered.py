"""What `llmbo recover` made of a run's trials: `recovered.json` beside the report, whose page shows it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from llmbo.errors import StorageError, first_fault
from llmbo.report.schema import ItemsPart

FILE = "recovered.json"


class HeldOut(BaseModel):
    """Nats per token on windows that neither search nor training saw; `kl` from the dense model, where that taught."""

    model_config = ConfigDict(extra="forbid")

    loss: float
    kl: float | None


class ItemsJudged(ItemsPart):
    """A file of items, and what was right of it before and after, by the names of `ItemScores`; `between`, by step, the part that was
    right on the way, where it was asked for."""

    before: dict[str, float]
    after: dict[str, float]
    between: list[tuple[int, float]] = Field(default_factory=list)


class Recovered(BaseModel):
    """A recovered model.

    `folder` holds it; `what` learnt, and from what, in words; `tokens` it was trained on until its best step; `validation`: by step the KL
    divergence where the dense model taught (`distilled`), else the loss; `items` that were asked for.
    """

    model_config = ConfigDict(extra="forbid")

    trial: int
    folder: str
    command: str
    what: str
    tokens: int
    distilled: bool
    before: HeldOut
    after: HeldOut
    items: list[ItemsJudged] = []
    validation: list[tuple[int, float]]


_ALL = TypeAdapter(list[Recovered])


def read_recovered(run: Path) -> list[Recovered]:
    """All of a run, in the order in which they were made; none where it has none.

    Raises:
        StorageError: The file is damaged.
    """
    file = run / FILE
    if not file.is_file():
        return []
    try:
        return _ALL.validate_json(file.read_bytes())
    except (OSError, ValidationError) as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else error
        raise StorageError(f"'{file}' is damaged ({fault}): delete it; the models that it tells of stay.") from None
