"""Files that a run left, damaged in every way: whoever reads them says in one line which file and where, and exits with 2."""

import contextlib
import json
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llmbo.advisor.store import read_jsonl
from llmbo.cli import app
from llmbo.errors import ConfigError, StorageError
from llmbo.report.files import read_report
from llmbo.run.rebuild import config_of, read_run

OLD = Path(__file__).parent / "data" / "first_version" / "runs" / "tiny"
TIMEOUT = 30  # seconds; only a command that does not see the damage, and waits or works, reaches it
Edit = Callable[[Any], object]


def refused(words: list[object], folder: Path, code: int = 2) -> str:
    """The one line, of whatever command."""
    signal.alarm(TIMEOUT)
    with contextlib.chdir(folder):
        result = CliRunner().invoke(app, list(map(str, words)))
    signal.alarm(0)
    assert result.exit_code == code and isinstance(result.exception, SystemExit), (
        result.stderr[-500:],
        repr(result.exception)[:300],
    )
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error:") and "Traceback" not in result.stderr and not result.stdout
    return line


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    def give_up(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, give_up)
    yield
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def copied(finished: Any, tmp_path: Path) -> Path:
    """A run to be damaged: its folder below `runs/` of the working directory."""
    return Path(shutil.copytree(finished.folder / "runs" / "tiny", tmp_path / "runs" / "tiny"))


def edited(change: Edit) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        report = json.loads(content)
        change(report)
        return json.dumps(report).encode()

    return apply


def put(*place: Any) -> Callable[[bytes], bytes]:
    """Another value at a place: keys and indices, the value last."""
    *keys, last, value = place

    def change(report: Any) -> None:
        for key in keys:
            report = report[key]
        report[last] = value

    return edited(change)


def drop(*place: Any) -> Callable[[bytes], bytes]:
    *keys, last = place

    def change(report: Any) -> None:
        for key in keys:
            report = report[key]
        del report[last]

    return edited(change)


def swapped(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        assert re.search(old, content)
        return re.sub(old, new, content, count=1)

    return change


# kind -> damage, and what the message says of the place
REPORTS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "Expecting value"),
    "blank": (lambda content: b" \n", "Expecting value"),
    "truncated": (lambda content: content[: len(content) // 2], "line"),
    "first byte": (lambda content: content[:1], "line"),
    "not UTF-8": (lambda content: b"\xff\xfe" + content, "utf-8"),
    "zeros": (lambda content: bytes(len(content)), "Expecting value"),
    "text": (lambda content: b"# no report\n", "Expecting value"),
    "two reports": (lambda content: content * 2, "Extra data"),
    "deep": (lambda content: b"[" * 100_000, "recursion"),
    "list": (lambda content: b"[" + content + b"]", "dictionary"),
    "null": (lambda content: b"null", "dictionary"),
    "number": (lambda content: b"7", "dictionary"),
    "string": (lambda content: b'"report"', "dictionary"),
    "empty object": (lambda content: b"{}", "run: Field required"),
    "other version": (put("schema_version", 3), "schema_version is 3"),
    "no version": (put("schema_version", None), "schema_version"),
    "no run": (drop("run"), "run"),
    "no trials": (drop("trials"), "trials"),
    "no front": (drop("front"), "front"),
    "no dense": (drop("dense"), "dense"),
    "no hypervolume": (drop("hypervolume"), "hypervolume"),
    "no settings": (drop("run", "settings"), "run.settings"),
    "no name": (drop("run", "name"), "run.name"),
    "no loss": (drop("trials", 3, "objectives", "loss"), r"trials.3.objectives.loss"),
    "no architecture": (drop("trials", 3, "architecture"), r"trials.3.architecture"),
    "run is a list": (put("run", []), "run"),
    "trials is an object": (put("trials", {}), "trials"),
    "trial is null": (put("trials", 3, None), "trials.3"),
    "front is null": (put("front", None), "front"),
    "name is a number": (put("run", "name", 7), "run.name"),
    "seconds are text": (put("run", "seconds", {"search": "long"}), "run.seconds.search"),
    "state unknown": (put("trials", 3, "state", "lost"), "trials.3.state"),
    "value is text": (put("trials", 3, "objectives", "kl", "small"), "trials.3.objectives.kl"),
    "nan": (put("trials", 3, "objectives", "kl", float("nan")), "trials.3.objectives.kl"),
    "infinite": (put("front", 0, "objectives", "loss", float("inf")), "front.0.objectives.loss"),
    "beyond floats": (swapped(rb'"final": ?[0-9.]+', b'"final": 1e999'), "hypervolume.final"),
    "huge": (swapped(rb'"params": ?[0-9]+', b'"params": 1' + b"0" * 400), "params"),
    "longer than integers": (swapped(rb'"params": ?[0-9]+', b'"params": ' + b"9" * 5000), "params"),
    "half a character": (put("model", "name", "\ud800"), "surrogates"),
    "layers missing": (put("trials", 3, "architecture", "neurons", [1]), "trials.3.architecture.neurons"),
    "too many heads": (put("trials", 3, "architecture", "kv_groups", [99] * 4), "trials.3.architecture.kv_groups"),
    "numbers mixed up": (put("trials", 3, "number", 4), "trials"),
    "front elsewhere": (put("front", 0, "trial", 999), "front.0.trial"),
    "objective unknown": (put("objectives", 0, "name", "speed"), "speed"),
}


@pytest.mark.parametrize("kind", REPORTS)
def test_a_damaged_report_is_named_with_the_place(copied: Path, kind: str) -> None:
    damage, place = REPORTS[kind]
    path = copied / "report.json"
    path.write_bytes(damage(path.read_bytes()))
    for words in (["report", "tiny"], ["report", "tiny", "--format", "csv"]):
        line = refused(words, copied.parents[1])
        assert "runs/tiny/report.json" in line and re.search(place, line) and "--fresh" not in line, line
    with pytest.raises(StorageError, match=re.escape(str(path))):
        read_run(str(copied))


@pytest.mark.parametrize("kind", ["a folder", "a loop"])
def test_what_is_no_file_is_no_report(copied: Path, kind: str) -> None:
    path = copied / "report.json"
    path.unlink()
    path.mkdir() if kind == "a folder" else path.symlink_to(path)
    assert "runs/tiny/report.json" in refused(["report", "tiny"], copied.parents[1])


SETTINGS = {"window": "wide", "text": None, "seed": 1.5, "objectives": "kl", "maximum": ["kl"], "newer": 1}


@pytest.mark.parametrize("key", SETTINGS)
def test_settings_of_a_report_are_checked_before_a_model_is_loaded(copied: Path, key: str) -> None:
    path = copied / "report.json"
    path.write_bytes(put("run", "settings", key, SETTINGS[key])(path.read_bytes()))
    with pytest.raises(ConfigError, match=key if key != "maximum" else "--max"):
        config_of(read_run(str(copied)))


def test_every_command_that_reads_a_report_refuses_it(copied: Path) -> None:
    path = copied / "report.json"
    path.write_bytes(drop("trials", 3, "architecture")(path.read_bytes()))
    out = copied.parents[1] / "out"
    for words in (
        ["report", "tiny", "--format", "md"],
        ["report", "tiny", copied],
        ["export", "tiny", "--trial", 3, "--format", "hf", "--out", out],
        ["recover", "tiny", "--trial", 3, "--steps", 1, "--out", out],
        ["rerank", "tiny"],
    ):
        assert "trials.3.architecture" in refused(words, copied.parents[1])


def test_a_damaged_report_is_written_again_from_the_stored_trials(copied: Path, finished: Any) -> None:
    """What the message says. The run's budget is spent, its report is not there: then there is something left to do."""
    path = copied / "report.json"
    before = json.loads(path.read_text())
    path.write_text("{")
    with contextlib.chdir(copied.parents[1]):
        result = CliRunner().invoke(app, finished.flags(budget=18))
    assert result.exit_code == 0, result.output
    assert read_report(copied)["trials"] == before["trials"]


def sql(*statements: str) -> Callable[[Path], None]:
    def run(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            assert sum(connection.execute(statement).rowcount != 0 for statement in statements) == len(statements)

    return run


def attribute(key: str, value: str) -> Callable[[Path], None]:
    """Of trial 3."""
    where = "where trial_id = (select trial_id from trials where number = 3 and study_id = " + STUDY + ")"
    return sql(f"update trial_user_attributes set value_json = '{value}' {where} and key = '{key}'")


def study_attribute(key: str, value: str) -> Callable[[Path], None]:
    return sql(f"update study_user_attributes set value_json = {value} where key = '{key}'")


def written(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


STUDY = "(select study_id from studies where study_name = 'tiny')"
TRIAL_3 = f"trial_id = (select trial_id from trials where number = 3 and study_id = {STUDY})"
PAGE = 4096
STUDIES: dict[str, Callable[[Path], object]] = {
    "truncated": written(lambda content: content[: len(content) // 2]),
    "header only": written(lambda content: content[:100]),
    "one page": written(lambda content: content[:PAGE]),
    "last page gone": written(lambda content: content[:-PAGE]),
    "zeros": written(lambda content: bytes(len(content))),
    "text": written(lambda content: b"# no database\n" * 500),
    "a folder": folder_instead,
    "garbage schema": written(lambda content: content[:100] + b"\xa5" * (PAGE - 100) + content[PAGE:]),
    "garbage pages": written(lambda content: content[: 2 * PAGE] + b"\xa5" * (len(content) - 2 * PAGE)),
    "no trials table": sql("drop table trials"),
    "no attributes table": sql("drop table trial_user_attributes"),
    "no studies table": sql("drop table studies"),
    "no value column": sql("alter table trial_params rename column param_value to other"),
    "newer schema": sql("update alembic_version set version_num = 'v99.0.a'"),
    "older schema": sql("update alembic_version set version_num = 'v2.6.0.a'"),
    "two schemas": sql("insert into alembic_version values ('v2.6.0.a')"),
    "settings are a list": study_attribute("settings", "'[]'"),
    "settings are text": study_attribute("settings", "'{'"),
    "settings are null": study_attribute("settings", "null"),
    "no objectives": study_attribute("settings", "json_remove(value_json, '$.objectives')"),
    "limit makes no sense": study_attribute("settings", "json_set(value_json, '$.maximum', json('[\"kl\"]'))"),
    "facts are a number": study_attribute("facts", "'7'"),
    "no dense": study_attribute("facts", "json_remove(value_json, '$.dense')"),
    "no dtype": study_attribute("facts", "json_remove(value_json, '$.dtype')"),
    "model is a list": study_attribute("facts", "json_set(value_json, '$.model', json('[]'))"),
    "run is text": study_attribute("facts", "json_set(value_json, '$.run', 'complete')"),
    "budget is text": study_attribute("facts", "json_set(value_json, '$.budget', 'all')"),
    "dense is nan": study_attribute("facts", "'{\"dense\": NaN}'"),
    "round is null": study_attribute("round:00001@00000000", "'null'"),
    "round without points": study_attribute("round:00001@00000000", "'[{}]'"),
    "source unknown": study_attribute("round:00001@00000000", "json_set(value_json, '$[0].source', 'the moon')"),
    "held-out is a list": sql("update study_user_attributes set value_json = '[1]' where key like 'heldout:%'"),
    "held-out of no trial": sql("update study_user_attributes set key = 'heldout:first' where key = 'heldout:dense'"),
    "held-out of before is a list": sql(
        "insert into study_user_attributes select 99999, study_id, 'heldout', '[1]' from study_user_attributes where key = 'settings'"
    ),
    "elsewhere is text": study_attribute("facts", "json_set(value_json, '$.elsewhere', 'python')"),
    "origin is a number": attribute("origin", "7"),
    "round of a trial is text": attribute("round", '"first"'),
    "place taken twice": attribute("place", "2"),
    "values are a list": attribute("values", "[1]"),
    "values are nan": attribute("values", '{"kl": NaN, "params_share": 1, "seconds": 1}'),
    "no kl": attribute("values", '{"params_share": 1, "seconds": 1}'),
    "no JSON": attribute("values", "{"),
    "no origin": sql(f"delete from trial_user_attributes where {TRIAL_3} and key = 'origin'"),
    "no attributes": sql(f"delete from trial_user_attributes where {TRIAL_3}"),
    "state unknown": sql(f"update trials set state = 'LOST' where {TRIAL_3}"),
    "a trial gone": sql(f"delete from trials where {TRIAL_3}"),
    "distribution is text": sql(f"update trial_params set distribution_json = 'wide' where {TRIAL_3}"),
    "date is text": sql(f"update trials set datetime_start = 'yesterday' where {TRIAL_3}"),
}
OTHER_REMEDY = {
    "a folder": "check the path",
    "newer schema": "install the Optuna",
    "older schema": "install the Optuna",
}


@pytest.mark.parametrize("kind", STUDIES)
def test_a_damaged_database_is_named(copied: Path, finished: Any, kind: str) -> None:
    path, folder = copied / "study.db", copied.parents[1]
    STUDIES[kind](path)
    for words in (["watch", "tiny"], ["advise", "runs/tiny", "--dry-run"], finished.flags(budget=18)):
        line = refused(words, folder)
        assert "runs/tiny/study.db" in line and OTHER_REMEDY.get(kind, "--fresh") in line, line
        assert ("--fresh" in line) is (kind not in OTHER_REMEDY), line


def line_edited(change: Callable[[bytes], bytes], number: int = 1) -> Callable[[bytes], bytes]:
    """Of a recording."""

    def apply(content: bytes) -> bytes:
        lines = content.splitlines(keepends=True)
        lines[number] = change(lines[number]).rstrip() + b"\n"
        return b"".join(lines)

    return apply


REPLAYS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "not UTF-8": (lambda content: b"\xff" + content, "text"),
    "text": (lambda content: b"# no recording\n" * 9, "line 1"),
    "zeros": (lambda content: bytes(len(content)), "line 1"),
    "a report": (lambda content: json.dumps({"run": 1}, indent=1).encode(), "line 1"),
    "line cut": (line_edited(lambda line: line[: len(line) // 2] + b"\n"), "line 2"),
    "line is a list": (line_edited(lambda line: b"[]\n"), "line 2"),
    "line is null": (line_edited(lambda line: b"null\n"), "line 2"),
    "line is blank": (line_edited(lambda line: b"\n"), "line 2"),
    "line is deep": (line_edited(lambda line: b"[" * 100_000 + b"\n"), "line 2"),
    **{
        f"{place[-1]} is {value!r}": (line_edited(put(*place, value)), f"line 2.*{place[-1] if isinstance(place[-1], str) else ''}")
        for place, value in [
            (("round",), "first"), (("round",), None), (("hook",), 7), (("exchanges",), {}), (("exchanges",), None),
            (("exchanges", 0), "reply"), (("exchanges", 0, "reply"), 7), (("exchanges", 0, "cost"), "cheap"),
            (("exchanges", 0, "seconds"), None), (("answer",), []),
            (("answer", "candidates"), None), (("answer", "candidates"), [{"x": "long"}]), (("answer", "stopped"), 7),
            (("answer", "rejections"), [{}]), (("extra",), []),
        ]
    },
    **{f"no {key}": (line_edited(drop(key)), "line 2") for key in ("round", "hook")},
}  # fmt: skip


@pytest.mark.parametrize("kind", REPLAYS)
def test_a_damaged_recording_is_named_with_the_line(llmbo: Any, kind: str) -> None:
    damage, place = REPLAYS[kind]
    file = llmbo.folder / "advisor.jsonl"
    file.write_bytes(damage((OLD / "advisor.jsonl").read_bytes()))
    line = refused(llmbo.flags(advisor=f"replay:{file}"), llmbo.folder)
    assert str(file) in line and re.search(place, line), line
    assert not (llmbo.folder / "runs").exists()


def test_a_recording_whose_last_line_is_cut_is_read_up_to_it(tmp_path: Path) -> None:
    whole = (OLD / "advisor.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(whole[:-100])
    assert read_jsonl(tmp_path / "cut.jsonl") == read_jsonl(OLD / "advisor.jsonl")[:-1]
