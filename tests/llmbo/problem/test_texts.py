"""Runs on mixes and chats, and their judgement on text of another domain: told, continued, and never of tokens seen before."""

import csv
import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from contextlib import chdir
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

import llmbo
from llmbo.cli import app
from llmbo.comparison import problems
from llmbo.comparison.config import ProblemConfig
from llmbo.config import RunConfig
from llmbo.display.console import Console
from llmbo.display.results import summary
from llmbo.models.loading import load_checkpoint
from llmbo.problem.kept import OWN
from llmbo.problem.texts import WRITTEN, judged_by, load_elsewhere, load_windows
from llmbo.report import Report
from llmbo.report.table import text_name
from llmbo.run import execute
from llmbo.run.store import TrialStore
from llmbo.training import recovery
from llmbo.training.lessons import course_for
from llmbo.types import WRITING
from pruning.calibration import Dealt, unseen_windows
from pruning.text import read_mix, read_text

WORDS = [f"w{index}" for index in range(60)]
CHAT = "{% for m in messages %}<s> {{ m.content }} {% endfor %}"


def invoke(folder: Path, *words: object) -> Any:
    with chdir(folder):
        return CliRunner().invoke(app, [str(word) for word in words])


BRIEFLY = ("--out", "out", "--steps", 1, "--window", 16, "--device", "cpu", "--compute-dtype", "float32")


@pytest.fixture
def cut_by(tmp_path: Path) -> Callable[..., Path]:
    """(report, exported folder, tokenizer's folder) -> a small model as if that run had exported it."""

    def make(report: dict[str, Any], exported: Path, tokenizer: Path) -> Path:
        small = tmp_path / "cut" / "small"
        shutil.copytree(exported, small)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(small)
        told = json.loads((small / "llmbo.json").read_text(encoding="utf-8")) if (small / "llmbo.json").exists() else {}
        told |= {"settings": report["run"]["settings"], "text": report["data"], "elsewhere_text": report["elsewhere"]}
        (small / "llmbo.json").write_text(json.dumps(told), encoding="utf-8")
        return small

    return make


def digests(windows: torch.Tensor) -> set[str]:
    return {hashlib.sha256(window.numpy().tobytes()).hexdigest() for window in windows}


@pytest.fixture
def texts(llmbo: Any) -> tuple[Path, Path]:
    """Two texts of random words."""
    rng, paths = random.Random(3), (llmbo.folder / "a.txt", llmbo.folder / "b.txt")
    for path in paths:
        path.write_text(" ".join(rng.choice(WORDS) for _ in range(800)), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def chatting(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatting") / "tiny"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_on_a_mix_is_judged_on_another_text_whatever_stops_it(
    llmbo: Any, texts: tuple[Path, Path], model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other text is even part of the mix here: it gives windows that the search has not seen."""
    first, second = texts
    flags = {"text": f"mix:text:{first}=1,text:{second}=2", "heldout_text": f"text:{first}", "budget": 4}
    kept = execute.elsewhere_part

    def stop(windows: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(execute, "elsewhere_part", stop)
    assert llmbo(**flags).exit_code == 130
    stopped = Report.model_validate(llmbo.report())
    assert stopped.run.status == "interrupted" and stopped.elsewhere is None
    assert all(point.heldout and not point.elsewhere for point in (stopped.dense, *stopped.front))
    monkeypatch.setattr(execute, "elsewhere_part", kept)
    done = llmbo(**flags)
    assert done.exit_code == 0, done.output
    report = Report.model_validate(llmbo.report())
    later = ("elsewhere", "noise_elsewhere", "samples")
    assert [point.model_copy(update=dict.fromkeys(later)) for point in report.front] == stopped.front

    # What the report says of the texts.
    sources = {source.source: source for source in report.data.sources}
    assert [source.share for source in report.data.sources] == pytest.approx([1 / 3, 2 / 3])
    assert [source.windows for source in report.data.sources] == [3 + 1 + 1, 5 + 3 + 3]
    for path in texts:
        assert sources[f"text:{path}"].sha256 == read_text(f"text:{path}").sha256
    assert report.elsewhere is not None and report.elsewhere.source == f"text:{first}"
    assert report.elsewhere.tokens == report.data.heldout.tokens == 64
    for point in (report.dense, *report.front):
        assert point.elsewhere is not None and point.heldout is not None
        assert point.elsewhere.params == point.objectives.params and point.elsewhere.loss != point.heldout.loss
    assert report.dense.elsewhere is not None and abs(report.dense.elsewhere.kl) < 1e-5

    # No window of the other text is one of the run's.
    config = RunConfig.from_settings(report.run.settings)
    loaded = load_checkpoint(str(model_folder), "float32", "cpu")
    own, other = load_windows(config, loaded), load_elsewhere(config, loaded, report.data.model_dump())
    assert other is not None
    assert hashlib.sha256(other.heldout.numpy().tobytes()).hexdigest() == report.elsewhere.digest
    used = digests(torch.cat([*own.parts.values()]))
    assert len(used) == 16 and len(digests(other.heldout)) == 4 and not used & digests(other.heldout)

    # Neither search nor judgement is done twice; another text behind the same name is judged on anew.
    measured: list[tuple[int, str]] = []
    set_heldout = TrialStore.set_heldout

    def count(self: Any, number: int | None, values: Any, digest: str = "") -> None:
        measured.extend([(number, digest)] * (number is not None))
        set_heldout(self, number, values, digest)

    monkeypatch.setattr(TrialStore, "set_heldout", count)
    assert llmbo(**flags | {"budget": 5}).exit_code == 0
    before, after = ({point["trial"] for point in part["front"]} for part in (report.model_dump(), llmbo.report()))
    assert {number for number, _ in measured} == after - before
    assert {digest for _, digest in measured} <= {"", report.elsewhere.digest}
    third = llmbo.folder / "c.txt"
    shutil.copy(second, third)
    refused = llmbo(**flags | {"budget": 6, "heldout_text": f"text:{third}"})
    assert refused.exit_code == 2 and "heldout_text: " in refused.stderr


def test_another_text_behind_the_same_name_is_judged_on_anew(llmbo: Any, texts: tuple[Path, Path]) -> None:
    flags = {"heldout_text": f"text:{texts[0]}", "budget": 3}
    assert llmbo(**flags).exit_code == 0
    before = Report.model_validate(llmbo.report())
    shutil.copy(texts[1], texts[0])
    assert llmbo(**flags | {"budget": 4}).exit_code == 0
    after = Report.model_validate(llmbo.report())
    assert before.elsewhere and after.elsewhere and before.elsewhere.sha256 != after.elsewhere.sha256
    common = {point.trial: point for point in before.front}.keys() & {point.trial for point in after.front}
    assert common and all(point.elsewhere for point in after.front)
    for trial in common:
        old, new = (report.point_of(trial) for report in (before, after))
        assert old and new and old.heldout == new.heldout and old.elsewhere != new.elsewhere


def test_tables_name_the_text_of_each_column(finished: Any) -> None:
    report = Report.model_validate(finished.report())
    assert report.elsewhere and report.elsewhere.source.startswith("python (")
    headings = [str(column.header) for column in summary(report).columns]
    assert "\nkl\nwords.txt" in headings and "held-out\nkl\nwords.txt" in headings
    assert headings[-1] == "held-out\nkl\npython"
    run = llmbo.load_run(finished.folder / "runs" / "tiny")
    judged = [(point.trial, point.elsewhere and point.elsewhere["kl"]) for point in (*run.front, run.dense)]
    assert judged == [(p.trial, p.elsewhere and p.elsewhere.kl) for p in (*report.front, report.dense)]
    assert all(point.elsewhere is None for point in run.trials if report.point_of(point.trial or 0) is None)
    long = report.data.model_copy(update={"source": "text:/a/wikitext2-validation-part.txt"})
    for told in (report, report.model_copy(update={"data": long})):
        Console(file=(screen := io.StringIO()), width=80).print(summary(told, rows=100))
        shown = screen.getvalue()
        assert max(map(len, shown.splitlines())) <= 80
        judged_there = [point.elsewhere for point in (told.dense, *told.front) if point.elsewhere]
        assert (
            len(judged_there) == 1 + min(len(told.front), 12) or 5 < len(judged_there) < 13
        )  # sizes may be nearest to one point
        assert all(f"{values.kl:.3f}" in shown for values in judged_there)
    lines = invoke(finished.folder, "report", "tiny", "--format", "md").stdout.splitlines()
    columns = [cell.strip() for cell in lines[0].split("|")]
    assert {"kl on words.txt", "held-out kl on words.txt", "held-out kl on python", "params"} <= {*columns}
    for line, point in zip(lines[2:], (*report.front, report.dense), strict=True):
        cells = dict(zip(columns, (cell.strip() for cell in line.split("|")), strict=True))
        assert cells["held-out loss on python"] == (f"{point.elsewhere.loss:.4g}" if point.elsewhere else "\u2013")
    rows = list(csv.DictReader(io.StringIO(invoke(finished.folder, "report", "tiny", "--format", "csv").stdout)))
    for row in rows:
        on_front = report.point_of(int(row["number"]))
        expected = on_front.elsewhere if on_front else None
        assert (row["elsewhere"], row["elsewhere_kl"]) == (("python", str(expected.kl)) if expected else ("", ""))


@pytest.mark.parametrize("mixed", [False, True], ids=["one text", "a mix"])
def test_what_a_front_was_judged_by_is_told_to_the_token(
    model_folder: Path, texts: tuple[Path, Path], mixed: bool
) -> None:
    """The held-out windows and those of the other text, which here is the run's as well: and nothing else is left out of a training."""
    first, second = (f"text:{path}" for path in texts)
    text = f"mix:{first}=1,{second}=2" if mixed else second
    config = RunConfig(
        str(model_folder), text=text, heldout_text=second, window=16, calibration_tokens=128, proxy_tokens=64, heldout_tokens=96, seed=3
    )  # fmt: skip
    loaded = load_checkpoint(str(model_folder), "float32", "cpu")
    windows = load_windows(config, loaded)
    data = {"sha256": windows.sha256, "sources": [asdict(source) for source in windows.sources]}
    other = load_elsewhere(config, loaded, data)
    away = {tuple(row.tolist()) for row in torch.cat([windows.heldout, other.heldout])}
    judged = judged_by(config, data, vars(other))
    assert len(away) == 12 and judged[:-1] == judged_by(config, data, None)

    def dealt(text: str, past: tuple[Dealt, ...]) -> set[tuple[int, ...]]:
        found = unseen_windows(read_mix(text), loaded.tokenizer, 16, 0, 1, judged=past)
        return {tuple(row.tolist()) for part in found.parts.values() for row in part}

    missing = {text: dealt(text, ()) - dealt(text, judged) for text in (first, second)}
    assert missing[first] | missing[second] == away and bool(missing[first]) == mixed


def test_what_a_model_wrote_for_a_run_is_read_by_all_who_come_later(
    llmbo: Any, tmp_path: Path, write_otherwise: Callable[[], None]
) -> None:
    """Another device, or other libraries, would write something else; a run that begins anew has its own written."""
    begun = llmbo(text="self", budget=5)
    assert begun.exit_code == 0 and WRITING in begun.stderr
    told, written = llmbo.report()["data"], tmp_path / "runs" / "tiny" / OWN / f"{WRITTEN}.safetensors"
    first = written.read_bytes()

    write_otherwise()
    continued = llmbo(text="self", budget=6)
    assert continued.exit_code == 0 and WRITING not in continued.stderr and llmbo.report()["data"] == told
    for words in (
        ("export", "tiny", "--trial", 1, "--format", "hf", "--out", "one"),
        ("rerank", "tiny", "--top", 2, "--steps", 1, "--text", "python", "--heldout", 1),
        ("advise", "runs/tiny", "--hook", "propose", "--dry-run"),
    ):
        result = invoke(tmp_path, *map(str, words))
        assert result.exit_code == 0, result.output
    export = ("export", "tiny", "--trial", 1, "--format", "hf", "--out", "two")
    written.write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
    assert "written.safetensors' is damaged: remove it" in invoke(tmp_path, *export).stderr
    written.unlink()  # written again, which here is something else
    refused = invoke(tmp_path, *export)
    assert refused.exit_code == 2 and "another model or text" in refused.stderr
    again = llmbo(text="self", budget=5, fresh=True)
    assert again.exit_code == 0, again.output
    assert llmbo.report()["data"]["sha256"] != told["sha256"] and written.read_bytes() != first


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("builtin (pydoc_data.topics of Python 3.11.2)", "builtin"),
        ("python (source of 32 modules of Python 3.11.2)", "python"),
        ("text:/a/b: c/notes.txt", "notes.txt"),
        ("hf:org/set:config:train[:2000]", "org/set"),
        ("mix of 50.0% builtin, 50.0% text:a", "mix"),
        ("self (sampled from the dense model)", "self"),
    ],
)
def test_a_text_has_a_short_name(source: str, name: str) -> None:
    assert text_name(source) == name


def test_a_chat_is_a_setting_of_the_run_and_of_its_recovery(
    llmbo: Any,
    chatting: Path,
    text_file: Path,
    exported: Path,
    cut_by: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = llmbo(budget=3, chat=True)
    assert refused.exit_code == 2 and "--chat: the tokenizer of this model has no chat template" in refused.stderr
    assert not (llmbo.folder / "runs").exists()
    done = llmbo(budget=3, chat=True, model=chatting, heldout_text=f"text:{text_file}")
    assert done.exit_code == 0, done.output
    report = llmbo.report()
    assert report["data"]["chat"] and report["run"]["settings"]["chat"] and report["data"]["available_tokens"] > 1200
    assert report["data"]["sha256"] == report["elsewhere"]["sha256"] == read_text(f"text:{text_file}").sha256
    assert report["elsewhere"]["available_tokens"] == report["data"]["available_tokens"]  # it is a chat there too
    changed = llmbo(budget=4, model=chatting, heldout_text=f"text:{text_file}")
    assert changed.exit_code == 2 and "chat: True -> False" in changed.stderr
    small = cut_by(report, exported, chatting)
    courses: list[Any] = []
    monkeypatch.setattr(
        recovery, "course_for", lambda *given, **named: courses.append(given) or course_for(*given, **named)
    )
    recovered = invoke(small.parent, "recover", small, "--text", f"text:{text_file}", "--heldout", 4, *BRIEFLY)
    assert recovered.exit_code == 0, recovered.output
    assert json.loads((small.parent / "out" / "llmbo.json").read_text(encoding="utf-8"))["recovery"]["text"]["chat"]
    config, loaded = (
        RunConfig.from_settings(report["run"]["settings"]),
        load_checkpoint(str(chatting), "float32", "cpu"),
    )
    own, other = load_windows(config, loaded), load_elsewhere(config, loaded, report["data"])
    assert other is not None
    trained = digests(courses[0][1].calibration)
    assert not trained & digests(torch.cat([own.heldout, other.heldout])) and trained & digests(own.calibration)


def test_a_recovery_leaves_what_a_mix_has_dealt_alone(
    llmbo: Any, texts: tuple[Path, Path], exported: Path, model_folder: Path, cut_by: Callable[..., Path]
) -> None:
    text = f"mix:text:{texts[0]}=1,text:{texts[1]}=2"
    assert llmbo(text=text, budget=3).exit_code == 0
    small = cut_by(llmbo.report(), exported, model_folder)
    refused = invoke(small.parent, "recover", small, "--text", text, "--heldout", 30, *BRIEFLY)
    assert refused.exit_code == 2 and "Traceback" not in refused.output
    assert f"'text:{texts[1]}'" in refused.stderr and "176 tokens that the search used" in refused.stderr  # 11 windows
    evaluated = invoke(small.parent, "evaluate", small, "--window", 32, "--text", f"text:{texts[1]}")
    assert evaluated.exit_code == 0 and "was pruned on windows of this very text" in evaluated.output
    mixed = invoke(small.parent, "evaluate", small, "--window", 32, "--text", text)
    assert mixed.exit_code == 2 and "is a mix of texts: one is expected here" in mixed.stderr


def test_a_comparison_takes_a_mix_and_undoes_the_spacing_of_all_its_texts(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"w1 w2 , {name} " * 200, encoding="utf-8")
    text = f"mix:text:{tmp_path / 'a.txt'}=1,text:{tmp_path / 'b.txt'}=1"
    run = RunConfig("tiny", text=text, window=16, calibration_tokens=64, proxy_tokens=64, heldout_tokens=64)
    seen: list[str] = []

    class Spy:
        bos_token_id = None

        def __call__(self, content: str, **options: object) -> dict[str, list[int]]:
            seen.append(content)
            return {"input_ids": list(range(len(content.split())))}

    loaded: Any = SimpleNamespace(tokenizer=Spy())
    config = ProblemConfig(run, undo_spacing=True)
    windows = problems.windows_of(config, run, [config], loaded)
    assert len(windows.sources) == 2 and [source.windows for source in windows.sources] == [6, 6]
    texts = [content for content in seen if len(content) > 1]
    assert len(texts) == 2 and all("w2, " in content and " , " not in content for content in texts)
