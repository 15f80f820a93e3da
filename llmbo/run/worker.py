"""A process that joins a run which another one owns: it evaluates for it, and owns it once nobody does."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from llmbo.advisor.censor import KEY_VARIABLE, URL_VARIABLE, environment_key, environment_url
from llmbo.advisor.store import FILE, AdviceStore
from llmbo.config import RunConfig
from llmbo.config.advisor import parse_spec
from llmbo.display.progress import Display
from llmbo.errors import ConfigError, ModelError, TakenOver
from llmbo.evaluation.items import Exam
from llmbo.models.loading import find_prunable, load_model
from llmbo.problem.elastic import adapted, adapter_of, heard
from llmbo.problem.kept import own_files
from llmbo.problem.method import Method
from llmbo.problem.objectives import build_objectives
from llmbo.problem.preparation import Problem, prepared
from llmbo.problem.residence import placed
from llmbo.problem.shared import Shared
from llmbo.problem.texts import keep_written, load_elsewhere, load_windows
from llmbo.report import environment
from llmbo.report.files import RUNS
from llmbo.run.assemble import RunParts, evaluator_of, item_files, proposer_of
from llmbo.run.database import check_shared, open_storage
from llmbo.run.execute import execute
from llmbo.run.facts import changed_facts, differences, facts_of, items_digest
from llmbo.run.lease import Pulse
from llmbo.run.patience import Patience
from llmbo.run.store import TrialStore
from llmbo.run.stored import stored_run
from llmbo.run.team import Team, serve
from llmbo.search import loop
from llmbo.types import Measurement, Proposal, Proposer, Trial

# A device may shift what it measures by so many standard errors that the windows give the value: by a third, noise grows by a twentieth.
SHIFT = 1 / 3
LEAST = 1e-3  # nats that are never worth a word


@dataclass(frozen=True)
class _OnDemand:
    """A proposer that is built when it is first asked: most workers never are, and an advisor may be a model of its own."""

    build: Callable[[], Proposer]

    @cached_property
    def _proposer(self) -> Proposer:
        return self.build()

    def propose(self, trials: Sequence[Trial], q: int, seed: int) -> list[Proposal]:
        return self._proposer.propose(trials, q, seed)


def work(
    url: str,
    name: str,
    display: Display,
    command: str,
    device: str = "auto",
    model: str = "",
    artifacts: str = "",
    memory: str = "",
    offload: str = "",
) -> None:
    """Evaluate for a run until its search is done.

    Args:
        url: Of the run's database.
        command: What the report says it was started with, should this process come to own it.
        model: Where the base model is on this machine, by default where the run has it.
        artifacts: The same of the preparation that the run shares.
        memory, offload: As in `RunConfig`, of this process; by default the run's.

    Raises:
        ModelError: Model, text, versions or what this device computes differ from the run's.
        StorageError: The database or the shared preparation cannot be used.
    """
    check_shared(url)
    patience = Patience(url, display.note)
    settings, facts = _begun(url, name, display, patience)
    check_versions(name, facts.get("versions", {}), environment()["versions"])
    here = {key: value for key, value in {"memory": memory, "offload": offload}.items() if value}
    config = RunConfig.from_settings(
        {**settings, **facts.get("free", {}), **here}, name=name, storage=url, budget=facts["budget"]
    )
    check_key(config.advisor)
    display.budget = config.budget
    with display.phase("model"):
        base = find_prunable(model or config.model)
        loaded = load_model(base.name, *placed(config, base, facts["dtype"], device))
        shared = Shared.of(facts.get("shared"), display.note, artifacts)
        kept = own_files(RUNS / name, display.note, shared)
        windows = load_windows(config, loaded, kept, display)
        elsewhere = load_elsewhere(config, loaded, facts["data"])
        loaded = adapted(adapter_of(config), loaded, *heard(windows, elsewhere))
    items = item_files(config)
    found = {**facts_of(loaded, windows), "items": items_digest(config)}
    stored = {**facts, "model": {**facts["model"], "name": ""}}
    changes = changed_facts(stored, {**found, "model": {**found["model"], "name": ""}})  # it may lie elsewhere
    if changes := changes + differences(
        *({key: each.get(key) for key in ("dtype", "items")} for each in (facts, found))
    ):
        raise ModelError(
            f"The run '{name}' has another model, text or dtype than this worker ({'; '.join(changes)}): give it the same."
        )
    keep_written(config, windows, kept)
    method = Method.of(facts.get("recipe"))
    with prepared(config, loaded, windows, display, facts.get("profiles"), method, shared) as problem:
        own = problem.proxy.evaluate_dense()
        check_agrees("the dense model", facts["dense"], own, f"{loaded.device} on {socket.gethostname()}")
        problem = replace(problem, dense=facts["dense"])
        _check_known(url, name, problem, f"{loaded.device} on {socket.gethostname()}", display, patience)
        objectives = build_objectives(
            config.objectives, problem.dense, problem.smallest, config.reference_point, config.limits
        )
        display.objectives, display.dense = objectives, problem.dense
        exams = () if "accuracy" in config.objectives else items
        folder = RUNS / name

        def evaluate(team: Team) -> None:
            store = patience(lambda: TrialStore.open(url, name, problem.space, team, patience))
            advice = AdviceStore(store, folder / FILE)
            parts = RunParts(
                replace(config, storage=None if _in_folder(url, name) else url),
                folder,
                problem,
                objectives,
                _OnDemand(lambda: proposer_of(config, problem, objectives, loaded, advice, display.note)),
                evaluator_of(config, problem, objectives, store),
                store,
                advice,
                elsewhere,
                loaded,
                items,
                [Exam.of(file, loaded.model, loaded.tokenizer) for file in exams],
            )
            with display.phase("search", config.budget):
                loop.run_search(
                    parts.proposer, parts.evaluator, store, config.budget, config.batch, config.seed, display
                )
            if team.lease is not None:
                display.note("The run's owner is gone: this worker finishes it.")
                execute(parts, display, command)

        seat = folder / "workers" / f"{socket.gethostname()}-{os.getpid()}"
        serve(patience, name, seat, {"device": loaded.device}, evaluate)


def check_key(advisor: str) -> None:
    """Whoever may write the database could have keys sent anywhere: a server that it alone names gets none.

    Raises:
        ConfigError: This machine has a key, and nothing here says that the run's server may have it.
    """
    server = parse_spec(advisor).base_url
    if server and environment_key() and environment_url() != server:
        raise ConfigError(
            f"The run asks a language model at {server}, and {KEY_VARIABLE} is set here: set {URL_VARIABLE}={server} if that server may "
            f"have the key, or unset {KEY_VARIABLE}."
        )


@contextmanager
def helpers(devices: Sequence[str], parts: RunParts, tell: Callable[[str], None]) -> Iterator[None]:
    """Workers on the other devices of this machine while the block lasts; what they say is in the run folder.

    Args:
        devices: This process's, then one for each worker.
    """
    cores, threads = devices.count("cpu"), torch.get_num_threads()
    each = str(max(1, threads // cores)) if cores > 1 else ""
    env = {
        **os.environ,
        "LLMBO_RUN": parts.config.storage or str(parts.folder),
    }  # not among the words, which anyone can list
    if server := parse_spec(parts.config.advisor).base_url:  # as was typed here
        env[URL_VARIABLE] = server
    words = [sys.executable, "-m", "llmbo", "worker", "--name", parts.config.name, "--device"]
    started = []
    for number, device in enumerate(devices[1:], 1):
        own = {"OMP_NUM_THREADS": each} if each and device == "cpu" else {}
        log = parts.folder / f"worker-{number}.log"
        with open(log, "wb") as said:
            worker = subprocess.Popen(
                [*words, device], env={**env, **own}, stdin=subprocess.DEVNULL, stdout=said, stderr=said
            )
        started.append((device, log, worker))
    torch.set_num_threads(int(each) if each and devices[0] == "cpu" else threads)
    try:
        yield
    except TakenOver:  # by one of them, it may be
        tell("The workers that this process has started go on: it waits for them.")
        for _, _, worker in started:
            worker.wait()
        raise
    finally:
        torch.set_num_threads(threads)
        for device, log, worker in started:
            if worker.poll() is None:
                worker.terminate()
                worker.wait()
            elif worker.returncode:
                last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                tell(f"The worker on {device} ended with exit code {worker.returncode}: {' '.join(last) or log}")


def check_versions(name: str, run: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Raises ModelError if the run was started with other versions; builds of one version do not matter."""
    run, here = ({key: each[key].partition("+")[0] for key in each if key != "python"} for each in (run, here))
    if run and (changes := differences(run, here)):
        raise ModelError(
            f"The run '{name}' is made with other versions ({'; '.join(changes)}): install those on this machine."
        )


def check_agrees(what: str, run: Mapping[str, float], own: Measurement, device: str) -> None:
    """Raises ModelError if a device computes something else than the run has, within the noise of windows."""
    for key, windows in own.windows.items():
        values = torch.tensor(windows, dtype=torch.float64)
        noise = SHIFT * float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
        if key in run and not abs(run[key] - own[key]) <= noise + LEAST:
            raise ModelError(
                f"{device} computes otherwise than the run's device: {key} of {what} is {own[key]:.5g} where the run has {run[key]:.5g} "
                f"(noise allows {noise + LEAST:.2g}): use a device like it, or share its preparation (--artifacts)."
            )


def _check_known(url: str, name: str, problem: Problem, device: str, display: Display, patience: Patience) -> None:
    """Evaluate a trial that the run knows; the first is waited for, unless nobody is there to evaluate it."""
    store = patience(lambda: TrialStore.open(url, name, problem.space, patience=patience))
    pulse = Pulse(patience(lambda: open_storage(url)), name)
    with display.phase("a known trial"):
        while True:
            known = [trial for trial in store.trials() if trial.complete and not trial.stopped]
            if known:
                (own,) = problem.proxy.evaluate([known[0].x])
                check_agrees(f"trial {known[0].number}", known[0].values, own, device)
                return
            if patience(lambda: pulse.look(lock_tells=False)) is False:
                return
            time.sleep(loop.PAUSE)


def _begun(url: str, name: str, display: Display, patience: Patience) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and facts of the run, which is waited for while it is prepared."""
    with display.phase("waiting for the run"):
        found = stored_run(url, name)  # at once, or the address is wrong
        while not (found and found[1].get("budget")):
            time.sleep(loop.PAUSE)
            found = patience(lambda: stored_run(url, name))
        return found[0], found[1]


def _in_folder(url: str, name: str) -> bool:
    return url.endswith(f"{RUNS / name}/study.db")
