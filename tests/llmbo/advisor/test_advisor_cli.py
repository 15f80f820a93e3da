"""What a user types and gets: whole runs on a tiny llama, with advisors, through the command line."""

import json
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.config.advisor import HOOKS
from llmbo.report import json_schema

BUDGET = 15
PLUGIN = """
from llmbo.advisor.parse import judge

class Mine:
    def __init__(self, argument):
        self.argument = argument

    def ask(self, question, transcript):
        if self.argument == "broken":
            raise KeyError("oops")
        edits = [{"layers": [0], "neurons_delta": -1}]
        return judge({"proposals": [{"base": f"threshold:{0.5 + 0.1 * n:.1f}", "edits": edits} for n in range(4)]}, question)
"""


def comparable(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The part `trials` without what a clock put into it."""
    return [{key: value for key, value in trial.items() if key != "seconds"} for trial in report["trials"]]


def assert_reasons_are_the_advisors(report: dict[str, Any]) -> None:
    """Who was advised carries a reason that was given, everybody else none; refusals and drops are told with theirs."""
    part = report["advisor"]
    given = {
        "advisor:warm_start": {item["why"] for item in part["proposals"] if item["hook"] == "warm_start"},
        "advisor:propose": {item["why"] for item in part["proposals"]},
        "advisor:directions": {": ".join(filter(None, (one["name"], one["why"]))) for one in part["directions"]},
    }
    for trial in report["trials"]:
        assert trial["why"] in given.get(trial["origin"], {""})
    for item in part["proposals"]:
        assert item["trial"] is None or report["trials"][item["trial"]]["origin"] == f"advisor:{item['hook']}"
    refused = [
        hook["outcomes"][kind] for hook in part["hooks"].values() for kind in ("duplicate", "illegal", "unparsable")
    ]
    assert len(part["refusals"]) == sum(refused) and all(refusal["reason"] for refusal in part["refusals"])
    assert len(part["filter"]["drops"]) == part["filter"]["dropped"]


def mail(llmbo: Any, chat_server: Any, letters: int) -> None:
    """The run `mail`, whose letters somebody answers one by one with what the server would have said, and the key behind it."""
    flags = {
        "budget": BUDGET,
        "advisor": "mail:letters",
        "advisor_price": "1,10",
        "advisor_hooks": ",".join(HOOKS),
        "name": "mail",
    }
    for number in range(1, letters + 1):
        result = llmbo(**flags)
        assert result.exit_code == 4 and "Traceback" not in result.output, result.output
        (letter,) = (llmbo.folder / "letters").glob(f"{number:03d}-*.prompt.md")
        reply = letter.with_name(letter.name.replace(".prompt.", ".reply."))
        said = f"'letters/{letter.name}': put the reply into 'letters/{reply.name}', and run the same command again."
        assert result.stderr.splitlines()[-1].endswith(said)
        assert llmbo.report("mail")["run"]["status"] == "interrupted"  # with everything that was measured
        request = json.loads(letter.with_suffix(".json").read_text())
        assert all(message["content"].strip() in letter.read_text() for message in request["messages"])
        reply.write_text(f"Sure:\n```json\n{chat_server.good(request)}\n```\n{chat_server.secret}")
    result = llmbo(**flags)
    assert result.exit_code == 0, result.output
    part = llmbo.report("mail")["advisor"]
    assert sum(hook["calls"] for hook in part["hooks"].values()) == letters and part["stopped"] is None
    assert all(
        hook["prompt_tokens"] > 100 < hook["completion_tokens"] for hook in part["hooks"].values() if hook["calls"]
    )
    kept = {name: content for name, content in llmbo.files().items() if ".reply." not in name}
    assert all(chat_server.secret.encode() not in content for content in kept.values())


def test_a_run_with_a_server_its_replay_and_its_secrets(llmbo: Any, chat_server: Any) -> None:
    advisor = chat_server.advisor
    result = llmbo(budget=BUDGET, advisor=advisor, advisor_price="1,10", advisor_hooks=",".join(HOOKS))
    assert result.exit_code == 0, result.output
    report = llmbo.report()
    jsonschema.validate(report, json.loads(json_schema()))
    part = report["advisor"]
    assert sum(hook["calls"] for hook in part["hooks"].values()) == len(chat_server.requests) > 0
    assert part["hooks"]["propose"]["cost"] > 0 and part["stopped"] is None and part["probe"]["evaluations"] > 0
    assert any(trial["origin"] == "advisor:warm_start" for trial in report["trials"])
    assert_reasons_are_the_advisors(report)
    assert f"Advisor {advisor}: {len(chat_server.requests)} calls" in result.output
    assert all(chat_server.secret.encode() not in content for content in llmbo.files().values())
    asked = len(chat_server.requests)
    mail(llmbo, chat_server, len(chat_server.requests))
    assert comparable(llmbo.report("mail")) == comparable(report)  # whatever carries the same replies
    again = llmbo(budget=BUDGET, advisor="replay:runs/tiny/advisor.jsonl", advisor_hooks=",".join(HOOKS), name="again")
    assert again.exit_code == 0, again.output
    assert comparable(llmbo.report("again")) == comparable(report) and len(chat_server.requests) == asked
    assert "not the one that was answered" not in again.output
    other = llmbo(budget=12, advisor="replay:runs/tiny/advisor.jsonl", name="other", advisor_context="no-tables")
    assert other.exit_code == 0 and other.output.count("warm_start, is not the one that was answered") == 1
    assert llmbo.report("again")["advisor"]["hooks"]["propose"]["cost"] == 0
    before = llmbo.files()
    own = llmbo(budget=BUDGET, advisor="replay:runs/tiny/advisor.jsonl", fresh=True)
    assert own.exit_code == 2 and "would be overwritten" in own.output and llmbo.files() == before


def test_a_dead_server_leaves_the_run_that_no_advisor_makes(llmbo: Any) -> None:
    dead = llmbo(budget=BUDGET, advisor="openai:m@http://127.0.0.1:9/v1", advisor_deadline=1)
    assert dead.exit_code == 0, dead.output
    assert "connection failed" in dead.output and "connection failed" in llmbo.report()["advisor"]["stopped"]
    assert llmbo(budget=BUDGET, name="alone").exit_code == 0
    assert comparable(llmbo.report()) == comparable(llmbo.report("alone"))
    assert llmbo.report("alone")["advisor"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"advisor": "heuristics"}, "did you mean heuristic"),
        ({"advisor": "openai:gpt"}, "OPENAI_API_KEY"),
        ({"advisor": "openai:qwen3:8b@localhost:11434/v1"}, "openai:qwen3:8b@http://localhost:11434/v1"),
        ({"advisor": "transformers:./nope"}, "./nope"),
        ({"advisor": "heuristic", "advisor_price": "nan,nan"}, "--advisor-price must be"),
        ({"advisor": "mail:/dev/null/letters"}, "mail:/dev/null/letters needs a folder"),
        ({"advisor": "replay:nowhere.jsonl"}, "replay:nowhere.jsonl cannot be read"),
        ({"advisor": "heuristic", "advisor_hooks": "propos"}, "did you mean propose"),
        ({"advisor": "heuristic", "advisor_price": "cheap"}, "--advisor-price needs numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    llmbo: Any, monkeypatch: pytest.MonkeyPatch, flags: dict[str, str], message: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    result = llmbo(**flags)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in result.output and len(result.output.strip().splitlines()) == 1
    assert llmbo.files() == {}


def test_a_model_in_this_process_needs_its_package_before_any_work(llmbo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as if it were not installed
    result = llmbo(advisor="transformers:self")
    assert result.exit_code == 2 and len(result.output.strip().splitlines()) == 1
    assert "--advisor transformers" in result.output and "pip install 'llmbo[local-advisor]'" in result.output
    assert llmbo.files() == {}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third party's package with an advisor, as pip would leave it."""
    site = tmp_path / "site"
    info = site / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "mine_advisor.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[llmbo.advisors]\nmine = mine_advisor:Mine\nlost = mine_advisor:Lost\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("plugin")
def test_third_parties_advisors(llmbo: Any) -> None:
    assert llmbo(advisor="mine:good", budget=12, name="good").exit_code == 0
    assert any(trial["origin"] == "advisor:warm_start" for trial in llmbo.report("good")["trials"])
    assert llmbo(advisor="mine:broken", budget=12, name="broken").exit_code == 0
    assert "KeyError" in llmbo.report("broken")["advisor"]["stopped"]
    lost = llmbo(advisor="lost:x", name="lost")
    assert lost.exit_code == 2 and "mine_advisor:Lost" in lost.output
    assert "mine" in llmbo(advisor="nobody", name="nobody").output


@pytest.fixture
def advise(finished: Any) -> Callable[..., Any]:
    def invoke(*words: str) -> Any:
        with chdir(finished.folder):
            return CliRunner().invoke(app, ["advise", "runs/tiny", *words])

    return invoke


def test_advise_shows_the_prompt_or_asks_once_and_changes_nothing(
    finished: Any, advise: Callable[..., Any], chat_server: Any
) -> None:
    before = finished.files()
    dry = advise("--dry-run")
    assert dry.exit_code == 0 and "TRIALS" in dry.output and "MODEL llama, 4 layers" in dry.output
    asked = advise("--advisor", chat_server.advisor)
    assert asked.exit_code == 0, asked.output
    assert len(chat_server.requests) == 1 and "candidate  share" in asked.output
    told = chat_server.requests[0]["messages"][1]["content"]
    assert all(
        line in dry.output
        for line in told.splitlines()
        if line.startswith(("MODEL", "SPACE", "RULES", "FAMILY", "TRIALS"))
    )
    directions = advise("--advisor", "heuristic", "--hook", "directions")
    assert directions.exit_code == 0 and "direction  flatter MLPs" in directions.output
    after = finished.files()
    assert {name for name in after if not name.startswith("runs/tiny/study.db")} == set(before) - {"runs/tiny/study.db"}
    assert all(after[name] == content for name, content in before.items() if not name.endswith(".db"))


def test_advise_fails_when_nobody_answers(advise: Callable[..., Any], chat_server: Any, tmp_path: Path) -> None:
    chat_server.answer = lambda body, handler: chat_server.send(handler, 401, '{"error": {"message": "no credit"}}')
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    for advisor, reason in ((chat_server.advisor, "HTTP 401: no credit"), (f"replay:{empty}", "holds no reply")):
        result = advise("--advisor", advisor)
        assert result.exit_code == 1 and result.stdout == ""
        (line,) = [line for line in result.stderr.splitlines() if "error" in line]
        assert line.startswith("error: Nobody answered: ") and reason in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "has no advisor"),
        (("--hook", "filter"), "use another hook"),
        (("--hook", "x"), "Unknown hook 'x'"),
        (("--advisor", "x"), "Unknown advisor"),
    ],
    ids=str,
)
def test_advise_refuses_what_makes_no_sense(advise: Callable[..., Any], words: tuple[str, ...], message: str) -> None:
    result = advise(*words)
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output


def test_advise_needs_a_run(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["advise", str(tmp_path / "nothing")])
    assert result.exit_code == 2 and "no run in" in result.output
    assert list(tmp_path.iterdir()) == []
