"""What an advisor would be asked, or would answer, in a stored run's present state. Changes nothing in the run."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmbo.advisor.context import LayerStatistics, Setting, share_of, told_delta
from llmbo.advisor.ledger import Ledger, MemoryNotes
from llmbo.advisor.proposer import AdvisorDesk
from llmbo.advisor.render import render
from llmbo.advisor.roles import Answer, Question
from llmbo.assemble import load_windows
from llmbo.assemble_advisor import Material, build_desk
from llmbo.config import RunConfig
from llmbo.errors import ConfigError, StorageError
from llmbo.evaluate import known_values
from llmbo.family import ThresholdFamily
from llmbo.models import load_model
from llmbo.objectives import build_objectives
from llmbo.space import SearchSpace
from llmbo.storage import TrialStore, stored_run
from llmbo.types import Trial
from pruning.anatomy import anatomy_of
from pruning.importance import collect_statistics, fisher

COUNT = 4


def stored_config(folder: Path, storage: str | None, advisor: str | None) -> tuple[RunConfig, dict[str, Any], str]:
    """Settings, facts and database of a stored run.

    Raises:
        StorageError: There is no such run.
    """
    url = storage or f"sqlite:///{folder / 'study.db'}"
    found = stored_run(url, folder.name)
    if found is None:
        raise StorageError(
            f"There is no run in '{folder}': give the folder that `llmbo optimize` wrote, e.g. runs/llama."
        )
    settings, facts, _ = found
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    budget = facts.get("run", {}).get("settings", {}).get("budget", RunConfig.budget)
    config = RunConfig(**settings, name=folder.name, storage=storage, budget=budget)
    return replace(config, advisor=advisor or config.advisor, strategy="qnehvi"), facts, url


def reopened(config: RunConfig, facts: dict[str, Any], url: str) -> tuple[AdvisorDesk, list[Trial]]:
    """The run's advisor, with what it would read; it keeps its notes to itself."""
    loaded = load_model(config.model, facts["dtype"], facts["device"])
    windows = load_windows(config, loaded)
    space = SearchSpace(anatomy_of(loaded.model), config.min_share, config.neuron_step)
    statistics = collect_statistics(loaded.model, windows.calibration)
    family = ThresholdFamily.from_importance(space, fisher(loaded.model, statistics))
    smallest = known_values(space, family.at(0.0))
    objectives = build_objectives(config.objectives, facts["dense"], smallest, config.reference_point)
    store = TrialStore.create(url, config.name, space, objectives, {}, {})
    notes = MemoryNotes({key: value for key, value in store.notes().items() if key == "marginals"})
    summary = LayerStatistics.of(loaded.model, statistics)
    setting = Setting(family, objectives, facts["dense"], summary, config.advisor_context, config.budget)
    material = Material(setting, loaded, _unmeasured)
    desk = build_desk(config, material, Ledger(notes))
    if "marginals" not in notes.values:  # measuring them takes a run; the prompt does without
        desk.probe = None
    return desk, store.trials()


def question_of(desk: AdvisorDesk, trials: list[Trial], hook: str, seed: int) -> Question:
    """What `hook` would be asked now.

    Raises:
        ConfigError: The filter reviews candidates, and a run's state has none.
    """
    if hook == "filter":
        raise ConfigError(
            "--hook filter reviews a round's candidates, which only `llmbo optimize` makes: use another hook."
        )
    return desk.question(hook, trials, COUNT, seed)


def shown_prompt(question: Question) -> str:
    prompt = render(question)
    return f"{prompt.system}\n\n{prompt.user}\n\n(at most {prompt.tokens} tokens, and {prompt.max_tokens} of reply)"


def shown_answer(answer: Answer, desk: AdvisorDesk) -> Iterator[str]:
    """One line for each thing that came of an answer."""
    space, family = desk.setting.space, desk.setting.family
    for candidate in answer.candidates:
        share = share_of(space, candidate.x)
        yield f"candidate  share {share:.3f} | {told_delta(family, candidate.x)} | {candidate.why}"
    for direction in answer.directions:
        changed = sum(level != 0 for level in direction.levels)
        yield f"direction  {direction.name}: {changed} blocks"
    for rejection in answer.rejections:
        yield f"{rejection.kind:10} {rejection.reason} | {rejection.text}"
    if answer.stopped:
        yield f"stopped    {answer.stopped}"
    if not answer:
        yield "Nothing of it can be used."


def _unmeasured() -> Any:
    raise AssertionError("not measured here")
