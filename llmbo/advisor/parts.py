"""The report's part `advisor`, as written. Needs pydantic alone, so that a report is read without torch."""

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OutcomesPart(_Part):
    """What became of the items of all replies.

    `evaluated` counts trials that stem from a proposal, refined by local search or not; `vetoed` proposals never won on
    acquisition value; `duplicate`, `illegal` and `unparsable` ones were refused before. Null where there are no proposals.
    """

    evaluated: int | None
    vetoed: int | None
    duplicate: int
    illegal: int
    unparsable: int


class HookPart(_Part):
    """`calls`: prompts sent, repairs included. `attempts`: requests, retries included. `cost` in dollars, null if no price is known."""

    calls: int
    attempts: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    seconds: float
    outcomes: OutcomesPart


class DirectionGainPart(_Part):
    """Trials that a direction led to, hypervolume they added, and their best gain over the family at equal share."""

    name: str
    why: str = ""
    trials: int
    hypervolume: float
    best_gain: float | None


class ProposalPart(_Part):
    """One accepted proposal. `trial` evaluated it as it was; local search may have led from it to other trials."""

    round: int
    hook: str
    why: str
    trial: int | None


class RefusalPart(_Part):
    """One item of a reply that could not be used: its text, and why not."""

    round: int
    hook: str
    kind: str
    reason: str
    text: str


class DropPart(_Part):
    """A candidate that the filter was against; `trial` if it was evaluated all the same."""

    round: int
    confidence: float
    why: str
    trial: int | None


class FilterPart(_Part):
    """`precision`: share of the audited drops that gained less, at equal share, than the median of what was kept of their round."""

    reviewed: int
    dropped: int
    audited: list[int]
    precision: float | None
    drops: list[DropPart] = []


class ProbePart(_Part):
    """Marginal costs measured for the prompts: their price in evaluations of a candidate, beside the budget."""

    evaluations: float
    seconds: float
    noise: float | None


class AdvisorPart(_Part):
    """`stopped` says why there was no advice at some point, null if there always was."""

    advisor: str
    context: str
    hooks: dict[str, HookPart]
    stopped: str | None
    hypervolume_by_origin: dict[str, float]
    directions: list[DirectionGainPart]
    proposals: list[ProposalPart] = []
    refusals: list[RefusalPart] = []
    filter: FilterPart | None
    probe: ProbePart | None
