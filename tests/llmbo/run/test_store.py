"""Trials on a real SQLite file: nothing is lost, nothing is guessed, damage is named."""

import random
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.exc import OperationalError

from llmbo.errors import StorageError
from llmbo.run.database import delete_run, explained, open_storage
from llmbo.run.facts import differences
from llmbo.run.store import TrialStore
from llmbo.run.stored import stored_run
from llmbo.types import Measurement, Proposal, Source, TrialState

SETTINGS = {"model": "tiny", "seed": 3, "objectives": ("kl", "params_share"), "reference_point": None, "maximum": ()}
Open = Callable[..., TrialStore]


def sqlite_error(code: int) -> OperationalError:
    """As SQLAlchemy passes it on."""
    error = sqlite3.OperationalError("some fault")
    error.sqlite_errorcode = code
    return OperationalError("insert", {}, error)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "study.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
def open_store(toy: Any, url: str, facts: dict[str, Any]) -> Open:
    return lambda name="run": TrialStore.create(url, name, toy.space, toy.objectives, SETTINGS, facts)


def fill(store: TrialStore, toy: Any, rounds: int = 2, q: int = 2) -> list[Proposal]:
    done: list[Proposal] = []
    for round_number in range(rounds):
        proposals = [
            Proposal(x, "threshold", source=Source.PATH, predicted=(0.1, 0.02))
            for x in toy.random_points(q, round_number)
        ]
        store.add_round(proposals)
        for proposal in proposals:
            store.start(len(done), round_number, proposal)
            store.finish(len(done), toy.evaluate(proposal.x), 0.5)
            done.append(proposal)
    return done


def test_what_was_stored_is_read_by_another_process(toy: Any, open_store: Open, facts: dict[str, Any]) -> None:
    """A second store on the same file stands for the second process: nothing is kept in memory alone."""
    store = open_store()
    fill(store, toy)
    extra = [Proposal(x, "qnehvi") for x in toy.random_points(3, 9)]
    store.add_round(extra)
    store.start(4, 2, extra[0])
    store.start(5, 2, extra[1])
    store.fail(4, "kl is nan", 0.25)
    store.set_heldout(1, Measurement({"kl": 0.5}, {"kl": [0.25, 0.75]}))
    store.set_heldout(3, Measurement({"kl": 0.75}))
    store.set_fact("run", {"status": "complete"})
    again = open_store()
    assert again.trials() == store.trials() and again.rounds() == store.rounds()
    trials = again.trials()
    assert [trial.number for trial in trials] == list(range(6))
    assert [trial.round for trial in trials] == [0, 0, 1, 1, 2, 2]
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4 + [TrialState.FAILED, TrialState.RUNNING]
    assert all(trial.values == toy.evaluate(trial.x) and trial.seconds == 0.5 for trial in trials[:4])
    assert (trials[4].failure, trials[4].seconds, trials[4].values) == ("kl is nan", 0.25, {})
    assert (trials[5].x, trials[5].origin, trials[5].seconds) == (extra[1].x, "qnehvi", None)
    assert again.rounds()[2] == extra
    assert again.heldout() == {1: {"kl": 0.5}, 3: {"kl": 0.75}} and again.heldout()[1].windows == {"kl": [0.25, 0.75]}
    assert again.facts == {**facts, "run": {"status": "complete"}}


@pytest.mark.parametrize("case", [(4, 24, 0.4, 0), (3, 100, 0.1, 7), (2, 24, 0.3, 24)], ids=str)
def test_points_survive_on_every_grid(make_toy: Callable[..., Any], url: str, case: tuple[float, ...]) -> None:
    toy = make_toy(*case)
    store = TrialStore.create(url, "run", toy.space, toy.objectives, SETTINGS, {})
    done = fill(store, toy, 1, 5)
    assert [(trial.x, trial.origin) for trial in store.trials()] == [(proposal.x, proposal.origin) for proposal in done]


def test_starting_a_running_trial_again_changes_nothing(toy: Any, open_store: Open) -> None:
    store = open_store()
    proposal = Proposal(toy.random_points(1, 0)[0], "threshold", source=Source.PATH)
    store.add_round([proposal])
    store.start(0, 0, proposal)
    before = open_store().trials()
    open_store().start(0, 0, proposal)
    assert open_store().trials() == before and len(before) == 1


def test_a_finished_trial_is_not_rewritten(toy: Any, open_store: Open) -> None:
    store = open_store()
    fill(store, toy, 1)
    before = store.trials()
    store.finish(0, toy.evaluate(toy.random_points(1, 5)[0]), 1.0)
    store.fail(0, "late", 1.0)
    assert open_store().trials() == before


def test_optuna_alone_can_read_the_study(make_toy: Callable[..., Any], url: str) -> None:
    """Units instead of levels, values in the user's unit and direction: what `optuna.load_study` shows is meaningful."""
    toy = make_toy(3, 100, 0.3, 7).with_objectives("params", "loss")
    store = TrialStore.create(url, "run", toy.space, toy.objectives, SETTINGS, {})
    done = fill(store, toy, 1, 4)
    study = optuna.load_study(study_name="run", storage=url)
    assert study.metric_names == ["params", "loss"]
    assert [direction.name for direction in study.directions] == ["MINIMIZE", "MINIMIZE"]
    for trial, proposal in zip(study.trials, done, strict=True):
        architecture, values = toy.space.decode(proposal.x), toy.evaluate(proposal.x)
        units = (*architecture.kv_groups, *architecture.neurons)
        assert trial.params == dict(zip(toy.space.names, units, strict=True))
        assert trial.values == [values["params"], values["loss"]]
    best = {trial.number for trial in study.best_trials}
    pairs = [(trial.values["params"], trial.values["loss"]) for trial in store.trials()]
    assert best == {
        n for n, (a, b) in enumerate(pairs) if not any(c <= a and d <= b and (c, d) != (a, b) for c, d in pairs)
    }


def test_looking_for_a_run_writes_nothing(
    toy: Any, open_store: Open, path: Path, url: str, facts: dict[str, Any]
) -> None:
    assert stored_run(url, "run") is None
    assert list(path.parent.iterdir()) == []
    fill(open_store(), toy)
    before = path.read_bytes()
    found = stored_run(url, "run")
    assert found is not None
    settings, stored, finished = found
    assert differences(settings, SETTINGS) == [] and stored == facts and finished == 4
    assert stored_run(url, "another") is None
    assert path.read_bytes() == before


@pytest.mark.parametrize("form", ["sqlite:///{}?timeout=20", "sqlite+pysqlite:///{}"])
def test_a_run_is_found_however_its_url_is_written(toy: Any, open_store: Open, path: Path, url: str, form: str) -> None:
    assert stored_run(form.format(path), "run") is None
    assert not path.exists()
    fill(open_store(), toy, 1)
    assert stored_run(form.format(path), "run") == stored_run(url, "run") != None  # noqa: E711


def test_only_finished_trials_count_against_the_budget(toy: Any, open_store: Open, url: str) -> None:
    store = open_store()
    fill(store, toy, 1)
    proposals = [Proposal(x, "qnehvi") for x in toy.random_points(2, 7)]
    store.add_round(proposals)
    for number, proposal in enumerate(proposals, 2):
        store.start(number, 1, proposal)
    store.fail(2, "out of memory", 0.1)
    found = stored_run(url, "run")
    assert found is not None and found[2] == 3


def test_a_run_killed_while_its_study_was_made_is_no_run_yet(toy: Any, open_store: Open, url: str) -> None:
    """A study without settings and trials can only be what a kill has left; the same command must go on."""
    optuna.create_study(storage=url, study_name="run", directions=["minimize", "minimize"])
    assert stored_run(url, "run") is None
    fill(open_store(), toy, 1)
    found = stored_run(url, "run")
    assert found is not None and found[2] == 2


def test_an_empty_file_is_no_run_yet(path: Path, url: str) -> None:
    """SQLite leaves one when it is killed before its first write."""
    path.touch()
    assert stored_run(url, "run") is None
    assert path.read_bytes() == b""


def test_somebody_elses_study_is_left_alone(url: str) -> None:
    study = optuna.create_study(storage=url, study_name="run")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(StorageError, match=r"'run'.*not written by llmbo"):
        stored_run(url, "run")


def test_differences_name_setting_old_and_new() -> None:
    changed = {**SETTINGS, "seed": 4, "extra": True}
    assert differences(SETTINGS, changed) == ["extra: None -> True", "seed: 3 -> 4"]
    assert differences(SETTINGS, {**SETTINGS, "objectives": ["kl", "params_share"]}) == []  # JSON knows no tuples
    assert differences({}, {}) == []


def test_deleting_a_run_leaves_the_others(toy: Any, open_store: Open, url: str) -> None:
    fill(open_store("run"), toy, 1)
    fill(open_store("other"), toy, 1)
    delete_run(url, "run")
    delete_run(url, "run")  # forgetting what is not there is no error
    assert stored_run(url, "run") is None
    found = stored_run(url, "other")
    assert found is not None and found[2] == 2


def test_deleting_a_run_removes_its_own_file_damaged_or_not(path: Path, url: str) -> None:
    path.write_bytes(b"no database at all" * 100)
    Path(f"{path}-journal").write_bytes(b"rest")
    neighbour = path.with_name("report.json")
    neighbour.write_text("{}")
    delete_run(url, "run", own_file=path)
    assert list(path.parent.iterdir()) == [neighbour]


def noise(data: bytes, start: int, length: int) -> bytes:
    return data[:start] + random.Random(start).randbytes(length) + data[start + length :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut in the header": lambda data: data[:50],
    "cut to one page": lambda data: data[:4096],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "last page missing": lambda data: data[:-4096],
    "noise in the header": lambda data: noise(data, 0, 100),
    "noise in the schema": lambda data: noise(data, 100, 3900),
    "noise over most": lambda data: noise(data, 8192, len(data) - 8192),
    "another file": lambda data: b"# not a database\n" * 1000,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_database_is_named(toy: Any, open_store: Open, path: Path, url: str, kind: str) -> None:
    fill(open_store(), toy, 3, 4)
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    damaged = path.read_bytes()
    with pytest.raises(StorageError, match=str(path)) as caught:
        stored_run(url, "run")
    assert "\n" not in str(caught.value) and "--fresh" in str(caught.value)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("start", range(4096, 4096 * 29, 4096 * 3))
def test_damage_anywhere_is_a_storage_error_or_harmless(
    toy: Any, open_store: Open, path: Path, url: str, start: int
) -> None:
    """Some pages hold nothing that a run reads; no page may lead to another exception."""
    fill(open_store(), toy, 3, 4)
    path.write_bytes(noise(path.read_bytes(), start, 3000))
    try:
        if stored_run(url, "run") is not None:
            store = open_store()
            assert len(store.trials()) == 12
            fresh = Proposal(toy.random_points(1, 99)[0], "qnehvi")
            store.add_round([fresh])
            store.start(12, 3, fresh)
            store.finish(12, toy.evaluate(fresh.x), 0.1)
    except StorageError as error:
        assert str(path) in str(error)


REMEDIES = {  # what was typed -> what the line says; nothing of it is mended by --fresh, which deletes trials
    "sqlite://": "in memory only",
    "sqlite:///:memory:": "in memory only",
    "sqlite:///file::memory:?uri=true": "in memory only",
    "sqlite:///file:x?mode=memory&uri=true": "in memory only",
    "postgres://host/db": "expected e.g. sqlite:///",
    "redis://host": "expected e.g. sqlite:///",
    "sqlite": "expected e.g. sqlite:///",
    "sqlite:/study.db": "expected e.g. sqlite:///",
    "study.db": "expected e.g. sqlite:///",
    "": "expected e.g. sqlite:///",
    "postgresql+psycopg2://u:p@h:port/db": "expected e.g. sqlite:///",
    "postgresql+nodriver://host/db": "expected e.g. sqlite:///",
    "sqlite:////nowhere/study.db": "check the path",
    "sqlite:////proc/study.db": "check the path",
    "mysql://nowhere.invalid/db": "install its driver with pip",
    "oracle://nowhere.invalid/db": "install its driver with pip",
    "sqlite:///{made up}/study.db": "check the path",
}


@pytest.mark.parametrize("url", REMEDIES)
def test_a_mistyped_url_has_a_remedy_of_its_own(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match=re.escape(REMEDIES[url])) as caught:
        open_storage(url)
    assert "\n" not in str(caught.value) and "--fresh" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_braces_in_a_url_are_no_template(tmp_path: Path) -> None:
    open_storage(f"sqlite:///{tmp_path}/{{SCHEMA_VERSION}}.db")
    assert [path.name for path in tmp_path.iterdir()] == ["{SCHEMA_VERSION}.db"]


SERVER_FAULTS: dict[str, tuple[BaseException, str]] = {  # that cannot be caused here
    "stopped": (OperationalError("select 1", {}, Exception("connection refused")), "start its server"),
    "full disk": (sqlite_error(sqlite3.SQLITE_FULL), "free space"),
    "full disk while syncing": (sqlite_error(sqlite3.SQLITE_IOERR_FSYNC), "check the disk"),
    "read only": (sqlite_error(sqlite3.SQLITE_READONLY_DBMOVED), "permissions"),
    "held": (sqlite_error(sqlite3.SQLITE_BUSY), "another program holds it"),
}


@pytest.mark.parametrize("kind", SERVER_FAULTS)
def test_what_is_no_damage_is_never_mended_by_deleting(kind: str) -> None:
    error, remedy = SERVER_FAULTS[kind]
    with pytest.raises(StorageError, match=remedy) as caught, explained("postgresql://u:hunter2@host/db"):
        raise error
    assert "--fresh" not in str(caught.value) and "hunter2" not in str(caught.value)


URLS = [
    "postgresql://user:hunter2@nowhere.invalid/db",
    "postgresql://nowhere.invalid/db?user=user&password=hunter2",
    "mysql://user:hun@hunter2@nowhere.invalid/db",
    "unknown://user:hunter2@host/db",
    "unknown://host/db?password=hunter2",
    "postgresql://user:SE?hunter2@host/db",
    "postgresql://host/db?password=hun@hunter2",
    "postgresql://user:hunter2@host:port/db",
    "no url at all",
]


@pytest.mark.parametrize("url", URLS)
def test_an_unusable_url_is_refused_without_its_password(toy: Any, url: str) -> None:
    """Whether or not the driver is installed here."""
    actions: list[Callable[[], object]] = [
        lambda: stored_run(url, "run"),
        lambda: TrialStore.create(url, "run", toy.space, toy.objectives, SETTINGS, {}),
        lambda: delete_run(url, "run"),
    ]
    for action in actions:
        with pytest.raises(StorageError) as caught:
            action()
        assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)


def test_a_path_that_cannot_be_opened_is_a_storage_error(toy: Any, tmp_path: Path) -> None:
    for url in (
        f"sqlite:///{tmp_path}",
        f"sqlite:///{tmp_path / ('x' * 300)}.db",
    ):  # a folder; a name too long for a file
        with pytest.raises(StorageError):
            stored_run(url, "run")
        with pytest.raises(StorageError):
            TrialStore.create(url, "run", toy.space, toy.objectives, SETTINGS, {})


def test_optunas_private_name_is_what_the_store_takes_it_for() -> None:
    """There is no public way back from a stored trial to one that takes attributes."""
    study = optuna.create_study()
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING))
    frozen, here = study.get_trials()[0], f"Optuna {optuna.__version__}: see TrialStore._annotate"
    assert hasattr(frozen, "_trial_id"), f"FrozenTrial has no `_trial_id` any more. {here}"
    optuna.trial.Trial(study, frozen._trial_id).set_user_attr("kept", 1)
    assert study.get_trials()[0].user_attrs == {"kept": 1}, f"`_trial_id` no longer names a stored trial. {here}"
