"""What others have written into a run's database is refused in one line or ignored by a worker; no value goes wrong by it."""

import contextlib
import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import optuna
import pytest

from llmbo.errors import LlmboError
from llmbo.run import journal as journal_module
from llmbo.run.database import open_storage
from llmbo.run.journal import Journal
from llmbo.run.lease import Pulse, leased, record
from llmbo.run.lock import locked
from llmbo.run.patience import Patience
from llmbo.run.store import TrialStore
from llmbo.run.team import Team, serve
from llmbo.search import loop
from llmbo.types import Measurement, Proposal, Trial

ROWS, BUDGET, TURNS = 200, 8, 3
PIECES: list[Any] = [
    None, True, -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), 1e308, "", "worker 0", "lease 0", "x" * 200_000, "\ud800", "\x1b[2J\n",
    [], [None], [7] * 1000, {}, {"a": {}}, {"py/object": "os.system"}, {"__reduce__": ["os.system", "true"]},
]  # fmt: skip
TEXTS = ["", "{", "NaN", "[" * 100_000, "\x80\x04\x95.", '{"a": 1} {"a": 1}', "1" * 5000]
CONTENT = ("user_attr", "user_attrs", "params", "distributions")  # of a line of the journal


class Waits(Exception):
    """There is nothing to do for this worker."""


class Watching:
    """Implements `Observer` and `Phases`: what is stored for a candidate is what that candidate measures."""

    def __init__(self, toy: Any) -> None:
        self._toy = toy

    def phase(self, name: str, total: int | None = None) -> Any:
        return contextlib.nullcontext(lambda done: None)

    def on_proposing(self, round: int) -> None: ...
    def on_trial_start(self, proposal: Proposal, number: int) -> None: ...

    def on_trial_end(self, trial: Trial, trials: object) -> None:
        assert trial.values == self._toy.evaluate(trial.x)


class Random:
    def __init__(self, toy: Any) -> None:
        self._toy = toy

    def propose(self, trials: object, q: int, seed: int) -> list[Proposal]:
        return [Proposal(x, "seed") for x in self._toy.random_points(q, seed)]


@pytest.fixture
def half_done(toy: Any, facts: dict[str, Any], tmp_path: Path) -> Path:
    """A run of which half is done, with a worker that has left, an owner that has gone, and trials that wait."""
    file, folder = tmp_path / "trials", tmp_path / "owner"
    storage = open_storage(f"journal:{file}")
    settings = {"objectives": ["kl", "params_share"], "reference_point": None, "maximum": []}
    with locked(folder), leased(Pulse(storage, "run", folder), Watching(toy), folder) as lease:  # type: ignore[arg-type]
        store = TrialStore.create(storage, "run", toy.space, toy.objectives, settings, facts, lease)
        record(storage, "run/workers", {"owner": {"host": "there", "folder": "/there", "inode": 1}, "device": "cpu"})
        loop.run_search(Random(toy), toy.evaluator, store, 4, 2, 0, Watching(toy))
        store.add_round(Random(toy).propose((), 3, 99))
        for place, proposal in enumerate(store.rounds()[-1], 4):
            store.queue(place, 2, proposal)
        for place in (4, 5):
            record(storage, "run/claims", {"place": place, "by": f"worker {place - 4}", "after": None}, running=False)
    return file


def mutated(rng: random.Random, file: Path) -> str:
    """Another value in one line of the journal; what it was and is."""
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    log, piece = json.loads(lines[number]), rng.choice(PIECES)
    content = [key for key in CONTENT if log.get(key)]
    if content and rng.random() < 0.8:
        key = rng.choice(content)
        log[key] = _changed(rng, log[key], piece)
    else:
        log = _changed(rng, log, piece)
    before, lines[number] = lines[number], rng.choice(TEXTS) if rng.random() < 0.1 else json.dumps(log)
    file.write_text("\n".join(lines) + "\n")
    return f"{before[:500]} -> {lines[number][:500]}"


def _changed(rng: random.Random, value: Any, piece: Any) -> Any:
    """With the piece somewhere inside instead, or with a part less."""
    if not value or not isinstance(value, list | dict) or rng.random() < 0.2:
        return piece
    place = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.15:
        del value[place]
    else:
        value[place] = _changed(rng, value[place], piece)
    return value


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A worker that has nothing to do a few times leaves; and nothing is unpickled."""
    left = [0]

    def sleep(seconds: float) -> None:
        left[0] += 1
        if left[0] % TURNS == 0:
            raise Waits

    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise AssertionError("unpickled")

    monkeypatch.setattr(loop, "time", SimpleNamespace(sleep=sleep))
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    yield


def test_two_hundred_hostile_rows(toy: Any, half_done: Path, tmp_path: Path, impatient: None) -> None:
    rng, refused, file = random.Random(0), 0, tmp_path / "hostile"
    url = f"journal:{file}"
    for number in range(ROWS):
        shutil.copy(half_done, file)
        if number % 2:  # its owner lives, on another machine: nothing but what waits is this worker's
            record(open_storage(url), "run/lease", {"after": 0, "owner": {"host": "there"}})
        what = mutated(rng, file)
        patience = Patience(url)

        def work(team: Team) -> None:
            store = patience(lambda: TrialStore.open(url, "run", toy.space, team, patience))  # noqa: B023
            loop.run_search(Random(toy), toy.evaluator, store, BUDGET, 2, 0, Watching(toy))

        try:
            serve(patience, "run", tmp_path / "worker", {"device": "cpu"}, work)
        except Waits:
            pass
        except LlmboError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 500, what
        except BaseException as error:
            raise AssertionError(what) from error
    assert ROWS / 4 < refused < 3 * ROWS / 4, refused


Tear = Callable[[Path], object]


@pytest.mark.parametrize(
    "tear",
    [
        lambda path: path.write_bytes(path.read_bytes() + b'{"op_code":5,"tri'),
        lambda path: path.write_bytes(path.read_bytes() + b"x" * 200_000),
    ],
    ids=["half a line", "longer than a block"],
)
def test_half_a_line_of_a_journal_goes_before_the_next(tmp_path: Path, tear: Tear) -> None:
    """Left by a process that was killed, or a full disk. Optuna would write the next line behind it, and read neither."""
    path = tmp_path / "trials"
    before, study = open_storage(f"journal:{path}"), "a"
    optuna.create_study(study_name=study, storage=before)
    tear(path)
    for storage in (before, open_storage(f"journal:{path}")):
        study += "a"
        optuna.create_study(study_name=study, storage=storage)
    assert [each.study_name for each in open_storage(f"journal:{path}").get_all_studies()] == ["a", "aa", "aaa"]
    (tmp_path / "empty").write_bytes(b'{"op')
    optuna.create_study(study_name="a", storage=open_storage(f"journal:{tmp_path / 'empty'}"))
    assert len((tmp_path / "empty").read_text().splitlines()) == 1


def test_a_journals_lock_is_taken_from_a_process_that_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the path is relative to a folder above; and who finds its lock taken has written its line whole."""
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal_module, "GRACE", 1)
    journal = Journal(Path("shared/trials"))
    journal._lock.acquire()
    journal.append_logs([{"op_code": 0}])
    release = journal._lock.release
    monkeypatch.setattr(journal._lock, "release", lambda: (release(), release()))
    journal.append_logs([{"op_code": 1}])
    assert [log["op_code"] for log in journal.read_logs(0)] == [0, 1]


def test_what_is_measured_is_measured_of_the_trials_own_candidate(toy: Any, half_done: Path, tmp_path: Path) -> None:
    """A round that another has shortened moves every later proposal to a trial that is not its own."""
    storage = open_storage(f"journal:{half_done}")
    study = optuna.load_study(study_name="run", storage=storage)
    key = next(key for key in sorted(study.user_attrs) if key.startswith("round:00000"))
    study.set_user_attr(key, study.user_attrs[key][:1])

    class Slandered:
        at_once = 1

        def evaluate(self, batch: Any) -> list[Measurement]:
            raise AssertionError(batch)

    folder = tmp_path / "owner"
    with (
        locked(folder),
        leased(Pulse(storage, "run", folder), Watching(toy), folder) as lease,  # type: ignore[arg-type]
        pytest.raises(LlmboError, match=r"trial \d is another candidate"),
    ):
        loop.run_search(Random(toy), Slandered(), TrialStore(study, toy.space, lease), BUDGET, 2, 0, Watching(toy))
