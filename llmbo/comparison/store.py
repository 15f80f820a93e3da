"""What a comparison stores: evaluations and proposals, in one SQLite file, each committed as soon as it is made.

Evaluations belong to whoever measures the same thing: model, tokens and compensation, not the comparison's name. Rounds
of proposals belong to one arm of one comparison. A process that is killed loses at most the evaluation that was running.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmbo.errors import StorageError, first_line
from llmbo.types import Proposal, Source

_SCHEMA = """
create table if not exists evaluations (
    evaluator text, digest text, x text, origin text, measured text, seconds real, primary key (evaluator, digest));
create table if not exists rounds (
    comparison text, arm text, round integer, proposals text, seconds real, primary key (comparison, arm, round));
create table if not exists facts (key text primary key, fact text);
"""
WAIT_FOR_LOCK = 60.0  # seconds that another process may hold the database


@dataclass(frozen=True)
class Round:
    """Proposals and the seconds it took to find them."""

    proposals: tuple[Proposal, ...]
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Measured values and the seconds that the measurement took, whenever it was made."""

    values: dict[str, float]
    seconds: float


class EvaluationStore:
    """The cache of evaluations and the rounds of every arm."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator["EvaluationStore"]:
        """Open or create the file.

        Raises:
            StorageError: It cannot be written, or is no such file.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=WAIT_FOR_LOCK)
            connection.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"The cache '{path}' cannot be used ({first_line(error)}): mend it, or choose another --cache."
            ) from error
        try:
            yield cls(connection)
        except sqlite3.Error as error:
            raise StorageError(
                f"Cannot write the cache '{path}' ({first_line(error)}): mend that and run the same command again; "
                "finished evaluations are kept."
            ) from error
        finally:
            connection.close()

    def evaluation(self, evaluator: str, digest: str) -> Evaluation | None:
        row = self._connection.execute(
            "select measured, seconds from evaluations where evaluator = ? and digest = ?", (evaluator, digest)
        ).fetchone()
        return Evaluation(json.loads(row[0]), row[1]) if row else None

    def add_evaluation(
        self, evaluator: str, digest: str, x: Sequence[int], origin: str, evaluation: Evaluation
    ) -> None:
        row = (evaluator, digest, json.dumps(list(x)), origin, json.dumps(evaluation.values), evaluation.seconds)
        with self._connection:
            self._connection.execute("insert or ignore into evaluations values (?, ?, ?, ?, ?, ?)", row)

    def evaluations(self, evaluator: str) -> Iterator[tuple[tuple[int, ...], str, dict[str, float]]]:
        """Point, origin and values of everything that `evaluator` has measured, in the order of measurement."""
        rows = self._connection.execute(
            "select x, origin, measured from evaluations where evaluator = ? order by rowid", (evaluator,)
        )
        for x, origin, measured in rows:
            yield tuple(json.loads(x)), origin, json.loads(measured)

    def rounds(self, comparison: str, arm: str) -> list[Round]:
        rows = self._connection.execute(
            "select proposals, seconds from rounds where comparison = ? and arm = ? order by round", (comparison, arm)
        )
        return [
            Round(tuple(_proposal(*parts) for parts in json.loads(proposals)), seconds) for proposals, seconds in rows
        ]

    def add_round(self, comparison: str, arm: str, number: int, made: Round) -> None:
        proposals = json.dumps(
            [[list(p.x), p.origin, p.source, dict(p.recipe), p.predicted] for p in made.proposals]  # what trials keep
        )
        with self._connection:
            self._connection.execute(
                "insert into rounds values (?, ?, ?, ?, ?)", (comparison, arm, number, proposals, made.seconds)
            )

    def forget_rounds(self, comparison: str) -> None:
        """Delete the proposals of all strategies of a comparison; evaluations are kept."""
        with self._connection:
            self._connection.execute("delete from rounds where comparison = ?", (comparison,))
            self._connection.execute("delete from facts where key = ?", (comparison,))

    def fact(self, key: str) -> Any:
        row = self._connection.execute("select fact from facts where key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else None

    def set_fact(self, key: str, fact: Mapping[str, Any]) -> None:
        with self._connection:
            self._connection.execute("insert or replace into facts values (?, ?)", (key, json.dumps(fact)))


def _proposal(
    x: list[int],
    origin: str,
    source: str = "",
    recipe: Mapping[str, Any] | None = None,
    predicted: list[float] | None = None,
) -> Proposal:
    """Earlier versions stored fewer parts."""
    expected = (predicted[0], predicted[1]) if predicted else None
    return Proposal(tuple(x), origin, source=Source.restored(source, origin), recipe=recipe or {}, predicted=expected)
