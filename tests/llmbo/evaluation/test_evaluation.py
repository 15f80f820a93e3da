"""`llmbo evaluate`: dense, exported and foreign models side by side, from the command line."""

import json
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.evaluation.items import standard_error
from llmbo.evaluation.tasks import ONE_TASK

WIDE = {"COLUMNS": "200"}


def evaluate(*words: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, words), "--dtype", "float32", "--device", "cpu"], env=WIDE)


ROWS = [{"question": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 5}"], "answer": i % 2} for i in range(6)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Path]:
    """(more lines of the file) -> a multiple-choice task with its data beside it."""

    def make(*lines: str) -> Path:
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        file = tmp_path / "follow.yaml"
        file.write_text(
            "task: follow\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
            f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
            'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
            "metric_list:\n  - metric: acc\n" + "".join(f"{line}\n" for line in lines)
        )
        return file

    return make


@pytest.fixture
def task_file(make_task: Callable[..., Path]) -> Path:
    return make_task()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """What the harness lets each model score: contexts and continuations."""
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="needs lm-eval: pip install 'llmbo[evaluate]'"
    )
    found: list[list[tuple[str, str]]] = []
    score = huggingface.HFLM.loglikelihood

    def recording(self: Any, requests: Any, *args: Any, **options: Any) -> Any:
        found.append([request.args for request in requests])
        return score(self, requests, *args, **options)

    monkeypatch.setattr(huggingface.HFLM, "loglikelihood", recording)
    return found


@pytest.fixture(scope="module")
def chatting(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatting") / "tiny"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


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


def test_files_of_items_are_scored_as_columns(model_folder: Path, exported: Path, tmp_path: Path) -> None:
    """Both kinds, and as many items as --limit lets in; perplexity of a text only if one is named."""
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    rows = [{"context": f"w{n} w{n + 1}", "continuation": f" w{n + 2}"} for n in range(7)]
    (tmp_path / "last.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "results.jsonl"
    names = [word for name in ("quiz", "last") for word in ("--items", tmp_path / f"{name}.jsonl")]
    result = evaluate(model_folder, exported, *names, "--limit", 5, "--json", file)
    assert result.exit_code == 0, result.output
    for line in map(json.loads, file.read_text().splitlines()):
        quiz, last = line["items"]["quiz"], line["items"]["last"]
        assert (quiz["kind"], quiz["count"], last["kind"], last["count"]) == ("multiple_choice", 5, "last_word", 5)
        assert {quiz["acc"], quiz["acc_norm"], last["acc"]} <= {0, 0.2, 0.4, 0.6, 0.8, 1} and last["perplexity"] > 1
        assert len(quiz["sha256"]) == 64 and line["recipe"] is None
        assert f"{quiz['acc_norm']:.4f} ± {quiz['acc_norm_stderr']:.4f}" in result.output
        assert f"{last['perplexity']:.4f}" in result.output
    assert "Items: last, 5 last words of " in result.output and "loss" not in result.output


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (3, 10), (10, 10), (400, 1000)])
def test_a_share_s_error_is_wilson_s(hits: int, count: int) -> None:
    """Its interval at z = 1 holds the shares whose own binomial error reaches what was found; none or all is not certain."""
    share, error = hits / count, standard_error(hits, count)
    middle = (share + 1 / (2 * count)) / (1 + 1 / count)
    for end in (middle - error, middle + error):
        assert (share - end) ** 2 == pytest.approx(end * (1 - end) / count)
    assert error > 0


def by_hand(shots: int, chat: bool) -> list[tuple[str, str]]:
    """Prompts of a task whose examples are the first of the other items."""
    found = []
    for row in ROWS:
        shown = [other for other in ROWS if other is not row][:shots]
        solved = [(other["question"], other["choices"][other["answer"]]) for other in shown]
        if chat:
            turns = "".join(f"<user>{question}<assistant>{answer}" for question, answer in solved)
            found += [(f"{turns}<user>{row['question']}<assistant>", choice) for choice in row["choices"]]
        else:
            before = "".join(f"{question} {answer}\n\n" for question, answer in solved)
            found += [(before + row["question"], f" {choice}") for choice in row["choices"]]
    return found


@pytest.mark.parametrize(
    ("words", "shots", "chat"),
    [
        ((), 0, False),
        (("--num-fewshot", 0), 0, False),
        (("--num-fewshot", 2), 2, False),
        (("--apply-chat-template",), 0, True),
        (("--apply-chat-template", "--num-fewshot", 2), 2, True),
    ],
)
def test_prompts_are_what_the_harness_makes_of_them(
    words: tuple[Any, ...], shots: int, chat: bool, chatting: Path, make_task: Any, asked: Any, tmp_path: Path
) -> None:
    task = make_task("fewshot_split: test", "fewshot_config:", "  sampler: first_n")
    file = tmp_path / "results.jsonl"
    result = evaluate(chatting, "--tasks", task, "--json", file, *words)
    assert result.exit_code == 0, result.output
    assert asked == [by_hand(shots, chat)]
    told = json.loads(file.read_text())["prompts"]
    assert told == {"num_fewshot": words[-1] if "--num-fewshot" in words else None, "apply_chat_template": chat}


@pytest.mark.parametrize(
    ("file", "alone"),
    [
        ("task: follow\ntest_split: test\n", True),
        ("# mine\ntask:   'follow'\n", True),
        ("task:\n  - arc_easy\n", False),
        ("group: pair\ntask: [arc_easy, follow]\n", False),
        ("group: pair\ntask:\n  - task: follow\n", False),
    ],
)
def test_a_file_that_may_name_tasks_of_the_harness_is_told_from_one_that_does_not(file: str, alone: bool) -> None:
    assert bool(ONE_TASK.search(file)) == alone


def test_examples_are_drawn_once_for_all_models(model_folder: Path, chatting: Path, make_task: Any, asked: Any) -> None:
    task = make_task("fewshot_split: test")
    assert evaluate(model_folder, chatting, "--tasks", task, "--num-fewshot", 3).exit_code == 0
    first, second = asked
    assert first == second and len(first) == 12
    questions = {row["question"] for row in ROWS}
    for context, _ in first:
        *shown, question = context.split("\n\n")
        drawn = {" ".join(example.split()[:2]) for example in shown}
        assert len(drawn) == 3 and drawn < questions - {question}


def test_a_task_without_examples_says_so(model_folder: Path, make_task: Any, asked: Any) -> None:
    result = evaluate(model_folder, "--tasks", make_task("num_fewshot: 0"), "--num-fewshot", 2)
    assert result.exit_code == 0 and asked == [by_hand(0, False)]
    assert (
        "Note: The task 'follow' is defined without examples, so --num-fewshot 2 does not hold for it." in result.output
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--num-fewshot", 6), "--num-fewshot 6 is too many for the task 'follow': it has 5 examples"),
        (("--num-fewshot", -1), "--num-fewshot must be at least 0"),
        (("--apply-chat-template",), "has no chat template"),
    ],
)
def test_prompts_that_cannot_be_made_are_refused(
    words: tuple[Any, ...], said: str, model_folder: Path, make_task: Any, asked: Any
) -> None:
    result = evaluate(model_folder, "--tasks", make_task("fewshot_split: test"), *words)
    assert result.exit_code == 2 and said in result.stderr and asked == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("./nowhere",), "'./nowhere'"),
        (("{model}", "--num-fewshot", 2), "--num-fewshot 2 is of no use without --tasks"),
        (("{model}", "--apply-chat-template"), "--apply-chat-template is of no use without --tasks"),
        (("{model}", "--window", 32, "--text", "web"), "'web'"),
        (("{model}", "--window", 65), "64 positions, got 65"),
        (("{model}", "--tokens", -1), "--tokens"),
        (("{model}", "--window", 32, "--json", "{tmp}/no/where.jsonl"), "--json"),
        (("{model}", "--tasks", "no_such_task"), "'no_such_task'"),
        (("{model}", "--tasks", "arc_easi"), "'arc_easi': did you mean arc_easy"),
        (("{model}", "--tasks", " ,"), "--tasks ' ,'"),
        (("{model}", "--items", "{tmp}/none.jsonl"), "Cannot read the items in '{tmp}/none.jsonl'"),
        (("{model}", "{tmp}", "--window", 32), "{tmp}"),  # the second of two is looked at before the first is measured
    ],
)
def test_bad_input_is_one_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[Any, ...], said: str
) -> None:
    if "--tasks" in words:
        pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'llmbo[evaluate]'")
        from lm_eval.tasks import manager

        # The harness looks through the tasks beside this file: some of them, since all take seconds.
        monkeypatch.setattr(manager, "__file__", str(Path(manager.__file__).with_name("arc") / "manager.py"))
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
