"""The composition root's part for advisors: checked settings -> an advisor's session, and the proposer it advises."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

from llmbo.advisor.censor import KEY_VARIABLE, Censor, environment_key
from llmbo.advisor.client import Limits, LLMClient, Price
from llmbo.advisor.context import Setting
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.mail import MailClient, check_mail
from llmbo.advisor.offline import OFFLINE, NoAdvisor, OfflineAdvisor
from llmbo.advisor.parse import checked
from llmbo.advisor.proposer import AdvisedProposer, AdvisorSession
from llmbo.advisor.render import SHORTEST_REPLY, token_limit
from llmbo.advisor.replay import ReplayAdvisor
from llmbo.advisor.roles import Advisor, Answer, Question, Transcript
from llmbo.advisor.store import FILE, AdviceStore
from llmbo.config import RunConfig
from llmbo.config.advisor import AdvisorSpec, parse_spec, plugins
from llmbo.errors import ConfigError, first_line
from llmbo.models.loading import LoadedModel, find_checkpoint, load_checkpoint, max_positions
from llmbo.problem.marginals import Marginals
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.baselines import ThresholdProposer
from llmbo.search.baselines.designs import NUM_INITIAL

WITHOUT_MARGINALS = ("none", "random", "hostile")  # nobody would read what it costs evaluations to measure


@dataclass(frozen=True)
class AdvisorInputs:
    """What an advisor may read or use.

    Args:
        setting: The facts that prompts tell.
        pruned: The model that is being pruned; between evaluations it computes the dense network.
        probe: Measures marginal costs.
        tell: Is told in one line what the user should know.
    """

    setting: Setting
    pruned: LoadedModel | None
    probe: Callable[[], Marginals] | None
    tell: Callable[[str], None] = lambda line: None


def check_advisor(config: RunConfig, folder: Path | None = None) -> None:
    """Refuse what can be refused before a model is loaded: a missing key, package, model or recording, a broken plug-in.

    Args:
        folder: Where the run will write.

    Raises:
        ConfigError, ModelError: One line for the user.
    """
    spec, censor = parse_spec(config.advisor), Censor(environment_key())
    if censor(config.advisor) != config.advisor:
        raise ConfigError(f"--advisor holds the key in {KEY_VARIABLE}, and would be stored and shown: leave it out.")
    if spec.kind == "openai":
        _openai(spec)
    elif spec.kind == "transformers":
        if importlib.util.find_spec("llguidance") is None:
            raise ConfigError(
                "--advisor transformers needs the package llguidance: pip install 'llmbo[local-advisor]'."
            )
        if spec.argument != "self":
            find_checkpoint(spec.argument)
    elif spec.kind == "mail":
        check_mail(Path(spec.argument))
    elif spec.kind == "replay":
        recording = Path(spec.argument)
        ReplayAdvisor(recording)
        if folder is not None and recording.resolve() == (folder / FILE).resolve():
            raise ConfigError(f"--advisor {config.advisor} would be overwritten by this run: choose another --name.")
    elif spec.kind in plugins():
        _plugin(plugins()[spec.kind], spec)


def build_session(config: RunConfig, inputs: AdvisorInputs, advice: AdviceStore) -> AdvisorSession:
    """The session of the advisor behind a name, with what its context level leaves it to read."""
    spec = parse_spec(config.advisor)
    setting, probe = inputs.setting, None if spec.kind in WITHOUT_MARGINALS else inputs.probe
    if "tables" not in setting.tells:
        setting, probe = replace(setting, statistics=None), None
    try:
        advisor = _makers(spec, config, inputs, advice)[spec.kind]()
    except Exception as error:  # `check_advisor` has refused what the user can mend; by now a run has something to lose
        advisor = Absent(f"the advisor cannot be made ({type(error).__name__}: {first_line(error)})")
    if isinstance(advisor, ReplayAdvisor) and not advisor.knows_prompts:
        probe = None  # nobody compares
    # Nobody is asked in vain: without a share of the trials there is nothing but the filter.
    hooks = tuple(hook for hook in config.advisor_hooks if config.advisor_share or hook == "filter")
    return AdvisorSession(advisor, advice, setting, hooks, config.advisor_every, probe, config.advisor_share)


def build_advised(
    config: RunConfig, inputs: AdvisorInputs, advice: AdviceStore, num_initial: int = NUM_INITIAL
) -> AdvisedProposer:
    """The default method with the advisor that the settings name.

    Args:
        num_initial: Size of the initial design, the advisor's places in it included.
    """
    setting, session = inputs.setting, build_session(config, inputs, advice)
    most = min(config.advisor_warm_start, num_initial // 2, session.most(config.budget))
    places = most if "warm_start" in session.hooks else 0
    size = num_initial - places
    search = QNehviProposer(setting.family, setting.objectives, setting.dense, size, session, setting.limits)
    design = ThresholdProposer(setting.family, setting.objectives, setting.dense)
    return AdvisedProposer(search, design, session, size, places)


def _makers(
    spec: AdvisorSpec, config: RunConfig, inputs: AdvisorInputs, advice: AdviceStore
) -> dict[str, Callable[[], Advisor]]:
    limits = Limits(
        calls=config.advisor_max_calls,
        tokens=config.advisor_max_tokens,
        seconds=config.advisor_max_seconds,
        cost=config.advisor_max_cost,
        deadline=config.advisor_deadline,
        reply_tokens=config.advisor_reply_tokens,
        price=Price(*config.advisor_price) if config.advisor_price else None,
    )
    at_no_cost = replace(limits, price=Price(0.0, 0.0))
    return {
        **{name: partial(_plugin, point, spec) for name, point in plugins().items()},
        **{name: partial(OfflineAdvisor, name, reply) for name, reply in OFFLINE.items()},
        "none": NoAdvisor,
        "openai": lambda: LLMAdvisor(_openai(spec), limits, advice),
        "transformers": lambda: LLMAdvisor(_transformers(spec, config, inputs), at_no_cost, advice),
        "mail": lambda: LLMAdvisor(MailClient(Path(spec.argument), advice), limits, advice),
        "replay": lambda: ReplayAdvisor(Path(spec.argument), inputs.tell),
    }


def _openai(spec: AdvisorSpec) -> LLMClient:
    try:
        from llmbo.advisor.openai_client import OpenAIClient  # half a second of imports that other advisors do not need
    except ImportError as error:
        raise ConfigError(f"--advisor openai cannot be loaded ({first_line(error)}): pip install openai.") from error
    return OpenAIClient.from_environment(spec.argument, spec.base_url)


def _transformers(spec: AdvisorSpec, config: RunConfig, inputs: AdvisorInputs) -> LLMClient:
    from llmbo.advisor.local import TransformersClient

    pruned = inputs.pruned
    loaded = pruned if spec.argument == "self" and pruned else load_checkpoint(spec.argument, "auto", config.device)
    room, longest = max_positions(loaded.model), token_limit(inputs.setting.space.num_layers)
    if room < longest + SHORTEST_REPLY:
        inputs.tell(
            f"--advisor {config.advisor} takes {room} tokens with its reply, and prompts may have up to {longest}: longer ones are not "
            "answered. Take a model with a longer context, or --advisor-context partial."
        )
    return TransformersClient(loaded.name, loaded.model, loaded.tokenizer)


def _plugin(point: EntryPoint, spec: AdvisorSpec) -> Advisor:
    """A third party's advisor: its entry point is called with what stands behind the colon."""
    try:
        return Guarded(point.load()(spec.argument))
    except Exception as error:
        reason = Censor(environment_key())(first_line(error))
        raise ConfigError(f"--advisor {spec.kind}: its entry point '{point.value}' failed ({reason}).") from error


@dataclass(frozen=True)
class Absent:
    """Says why there is no advisor."""

    reason: str

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        return Answer(stopped=self.reason)


@dataclass(frozen=True)
class Guarded:
    """Somebody else's advisor, whose faults must not end a run."""

    advisor: Advisor

    def ask(self, question: Question, transcript: Transcript) -> Answer:
        try:
            return checked(self.advisor.ask(question, transcript), question)
        except Exception as error:
            return Answer(stopped=f"the advisor failed ({type(error).__name__}: {first_line(error)})")
