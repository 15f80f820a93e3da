"""`llmbo evaluate`: dense, exported and foreign models side by side, from the command line."""

import json
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from llmbo.cli import app

WIDE = {"COLUMNS": "200"}


def evaluate(*words: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--dtype", "float32", "--device", "cpu"], env=WIDE)


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A multiple-choice task with its data beside it."""
    rows = [{"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 5}"], "answer": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "follow.yaml"
    file.write_text(
        "task: follow\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n"
    )
    return file


def test_models_stand_side_by_side(model_folder: Path, exported: Path, text_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    words = (model_folder, exported, "--text", f"text:{text_file}", "--window", 32, "--json", file)
    for runs in (1, 2):
        result = evaluate(*words)
        assert result.exit_code == 0, result.output
        assert "custom code" not in result.output  # transformers' question, which would wait for an answer
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == 2 * runs  # appended, not overwritten
    dense, small = lines[-2:]
    assert dense["model"] == str(model_folder) and small["params"] < dense["params"]
    for line in (dense, small):
        assert f"{line['loss']:.4f}" in result.output and f"{line['perplexity']:.2f}" in result.output
        assert line["recipe"]["tokens"] == 1199 and line["recipe"]["window"] == 32 and line["versions"]["torch"]
    assert result.output.count("Recipe: ") == 1  # the same for both
    assert dense["loss"] != small["loss"]


def test_tasks_of_a_local_file_are_scored(model_folder: Path, exported: Path, task_file: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'llmbo[evaluate]'")
    file = tmp_path / "results.jsonl"
    result = evaluate(model_folder, exported, "--tasks", task_file, "--limit", 4, "--json", file)
    assert result.exit_code == 0, result.output
    for line in map(json.loads, file.read_text().splitlines()):
        assert line["tasks"]["follow"]["acc"] in (0, 0.25, 0.5, 0.75, 1) and line["recipe"] is None
    assert "follow acc" in result.output and "perplexity" not in result.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("./nowhere",), "'./nowhere'"),
        (("{model}", "--window", 32, "--text", "web"), "'web'"),
        (("{model}", "--window", 65), "64 positions, got 65"),
        (("{model}", "--tokens", -1), "--tokens"),
        (("{model}", "--window", 32, "--json", "{tmp}/no/where.jsonl"), "--json"),
        (("{model}", "--tasks", "no_such_task"), "'no_such_task'"),
        (("{model}", "{tmp}", "--window", 32), "{tmp}"),  # the second of two is looked at before the first is measured
    ],
)
def test_bad_input_is_one_line(model_folder: Path, tmp_path: Path, words: tuple[Any, ...], said: str) -> None:
    if "--tasks" in words:
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'llmbo[evaluate]'")
    places = {"model": model_folder, "tmp": tmp_path}
    with chdir(tmp_path):
        result = evaluate(*(str(word).format(**places) for word in words))
    assert result.exit_code == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert said.format(**places) in line and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())


def test_foreign_code_is_not_run_unasked(model_folder: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "foreign", tmp_path / "ran"
    folder.mkdir()
    config = json.loads((model_folder / "config.json").read_text())
    config |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    result = evaluate(folder)
    assert result.exit_code == 2 and "--trust-remote-code" in result.stderr
    assert not ran.exists()
