"""The default method with an advisor, as one strategy of a comparison: hooks, context level and advisor are keys of it.

A comparison's arm has no run folder, so the advice is kept in memory: an arm that is begun anew asks anew. `llmbo optimize`
does better (`--advisor`), which is why this is no `--strategy` there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmbo.advisor.assemble import AdvisorInputs, build_advised, check_advisor
from llmbo.advisor.context import Setting
from llmbo.advisor.proposer import AdvisedProposer
from llmbo.advisor.store import AdviceStore, MemoryNotes
from llmbo.config import RunConfig
from llmbo.errors import ConfigError
from llmbo.problem.family import ThresholdFamily
from llmbo.problem.objectives import Objective
from llmbo.search.baselines.designs import NUM_INITIAL
from llmbo.types import Proposal, Trial


@dataclass
class AdvisedStrategy:
    """`QNehviProposer` with an advisor.

    Args:
        problem: May have `statistics` and `marginals` (see `preparation.Problem`); a recorded benchmark has neither.
        by: What `--advisor` takes; `transformers:self` needs a run of its own.
        share, warm_start: As `RunConfig.advisor_share` and `advisor_warm_start`.
        memory: What has been answered, so that a search that goes on along another path asks nothing twice.
        tell: Is told in one line what the user should know: that a recording answers other prompts.
    """

    problem: Any
    family: ThresholdFamily
    objectives: Sequence[Objective]
    dense: Mapping[str, float]
    by: str = "heuristic"
    hooks: tuple[str, ...] = RunConfig.advisor_hooks
    context_level: str = "full"
    share: float = RunConfig.advisor_share
    warm_start: int = RunConfig.advisor_warm_start
    every: int = 2
    num_initial: int = NUM_INITIAL
    limits: Mapping[str, float] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict, repr=False)
    tell: Callable[[str], None] = lambda line: None
    proposer: AdvisedProposer = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.by == "transformers:self":
            raise ConfigError(
                "transformers:self advises runs of `llmbo optimize` only: name the model's folder instead."
            )
        if self.by.startswith("mail:"):
            raise ConfigError(
                f"{self.by} advises runs of `llmbo optimize` only, which keep what was answered: compare its replies by replay:FILE."
            )
        config = RunConfig(
            model="comparison",
            advisor=self.by,
            advisor_hooks=self.hooks,
            advisor_context=self.context_level,
            advisor_share=self.share,
            advisor_warm_start=self.warm_start,
            advisor_every=self.every,
        )
        check_advisor(config)
        statistics = getattr(self.problem, "statistics", None)
        setting = Setting(self.family, self.objectives, self.dense, statistics, self.context_level, self.limits)
        measure = getattr(self.problem, "marginals", None)
        probe = None if measure is None else lambda: measure(setting.quality.name)
        inputs = AdvisorInputs(setting, None, probe, self.tell)
        self.proposer = build_advised(config, inputs, AdviceStore(MemoryNotes(self.memory)), self.num_initial)

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        return self.proposer.propose(trials, q, seed)
