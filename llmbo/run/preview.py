"""What an advisor would be asked, or would answer, in a stored run's present state. Changes nothing in the run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from llmbo.advisor.assemble import build_session
from llmbo.advisor.context import offset_text, share_of
from llmbo.advisor.proposer import AdvisorSession
from llmbo.advisor.render import render
from llmbo.advisor.roles import Answer, Question
from llmbo.advisor.store import AdviceStore, MemoryNotes
from llmbo.config import TOLD, RunConfig
from llmbo.errors import StorageError
from llmbo.models.loading import find_prunable, load_model
from llmbo.problem.elastic import adapted, adapter_of
from llmbo.problem.kept import own_files
from llmbo.problem.method import Method
from llmbo.problem.objectives import build_objectives
from llmbo.problem.preparation import prepared
from llmbo.problem.residence import placed
from llmbo.problem.texts import load_windows
from llmbo.run.assemble import advisor_inputs
from llmbo.run.database import url_of
from llmbo.run.store import TrialStore
from llmbo.run.stored import stored_run
from llmbo.search.acquisition import QNehviProposer
from llmbo.types import Outlook, Phases, Trial

COUNT = 4


def stored_config(folder: Path, storage: str | None, advisor: str | None) -> tuple[RunConfig, dict[str, Any], str]:
    """Settings, facts and database of a stored run.

    Raises:
        StorageError: There is no such run.
    """
    url = url_of(folder, storage)
    found = stored_run(url, folder.name)
    if found is None:
        raise StorageError(
            f"There is no run in '{folder}': give the folder that `llmbo optimize` wrote, e.g. runs/llama."
        )
    settings, facts, _ = found
    reported = facts.get("run", {}).get("settings", {})
    changes = {name: reported[name] for name in TOLD if name in reported} | ({"advisor": advisor} if advisor else {})
    return RunConfig.from_settings(settings, name=folder.name, storage=storage, **changes), facts, url


@contextmanager
def reopened(
    folder: Path, config: RunConfig, facts: dict[str, Any], url: str, phases: Phases
) -> Iterator[tuple[AdvisorSession, list[Trial], Callable[[], Outlook | None]]]:
    """The run's advisor, which keeps its notes to itself, the trials, and what the optimiser thinks of them."""
    base = find_prunable(config.model)
    loaded = load_model(config.model, *placed(config, base, facts["dtype"], facts["device"]))
    windows = load_windows(config, loaded, own_files(folder), phases)
    loaded = adapted(adapter_of(config), loaded, windows.proxy)
    with prepared(config, loaded, windows, phases, facts.get("profiles"), Method.of(facts.get("recipe"))) as problem:
        objectives = build_objectives(
            config.objectives, facts["dense"], problem.smallest, config.reference_point, config.limits
        )
        store = TrialStore.open(url, config.name, problem.space)
        stored = {key: value for key, value in store.notes().items() if key == "marginals"}
        inputs = advisor_inputs(config, problem, objectives, facts["dense"], loaded, phases.note)
        session = build_session(config, inputs, AdviceStore(MemoryNotes(stored)))
        setting, trials = session.setting, store.trials()
        optimiser = QNehviProposer(setting.family, objectives, setting.dense, limits=setting.limits)
        yield session, trials, partial(optimiser.outlook, trials, config.batch, config.seed)


def shown_prompt(question: Question) -> str:
    prompt = render(question)
    return f"{prompt.system}\n\n{prompt.user}\n\n(at most {prompt.tokens} tokens, and {prompt.max_tokens} of reply)"


def shown_answer(answer: Answer, session: AdvisorSession) -> Iterator[str]:
    """One line for each thing that came of an answer."""
    space, family = session.setting.space, session.setting.family
    for candidate in answer.candidates:
        share = share_of(space, candidate.x)
        yield f"candidate  share {share:.3f} | {offset_text(family, candidate.x)} | {candidate.why}"
    for direction in answer.directions:
        changed = sum(level != 0 for level in direction.levels)
        yield f"direction  {direction.name}: {changed} blocks"
    for rejection in answer.rejections:
        yield f"{rejection.kind:10} {rejection.reason} | {rejection.text}"
    if answer.stopped:
        yield f"stopped    {answer.stopped}"
    if not answer:
        yield "Nothing of it can be used."
