"""The finished front is judged on every item and writes a few samples; the search sees none of it, and nothing is done twice."""

import json
import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import llmbo
from llmbo.errors import ModelError
from llmbo.evaluation.items import Exam, read_item_files
from llmbo.run import judgement
from llmbo.run.judgement import NEW_TOKENS, PROMPTS, samples, spread
from pruning.continuations import continued


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    rng, folder = random.Random(0), tmp_path_factory.mktemp("items")

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(60)}" for _ in range(n))

    rows: dict[str, list[dict[str, Any]]] = {
        "quiz": [{"question": words(5), "choices": [words(1), words(2)], "answer": n % 2} for n in range(21)],
        "last": [{"context": words(6), "continuation": f" {words(1)}"} for _ in range(9)],
    }
    for name, items in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return [folder / f"{name}.jsonl" for name in rows]


def test_the_front_is_judged_and_nothing_twice(
    llmbo: Callable[..., Result], finished: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        Exam, "taken_by", lambda exam, *words, taken=Exam.taken_by: asked.append(exam.name) or taken(exam, *words)
    )
    written: list[int] = []
    monkeypatch.setattr(judgement, "samples", lambda *words: written.append(1) or samples(*words))
    done = llmbo(budget=18, items=files)
    assert done.exit_code == 0, done.output
    first, plain = llmbo.report(), finished.report()
    assert [trial["objectives"] for trial in first["trials"]] == [trial["objectives"] for trial in plain["trials"]]
    points = [first["dense"], *first["front"]]
    assert asked == ["quiz", "last"] * len(points) and not written and not any(point["samples"] for point in points)
    told = [(part["name"], part["kind"], part["count"]) for part in first["items"]]
    assert told == [("quiz", "multiple_choice", 21), ("last", "last_word", 9)]
    assert (
        all(name in done.output for name in ("quiz", "last"))
        and f"{points[0]['items']['quiz']['acc_norm']:.3f}" in done.output
    )

    asked.clear()
    again = llmbo(budget=20, items=files, no_samples=None)
    assert again.exit_code == 0, again.output
    report = llmbo.report()
    new = [point for point in report["front"] if point["trial"] >= 18]
    assert asked == ["quiz", "last"] * len(new)
    shown = [point for point in [report["dense"], *report["front"]] if point["samples"]]
    assert len(written) == len(shown) == 7 and shown[0] is report["dense"]
    assert report["front"][0] in shown and report["front"][-1] in shown
    assert all(list(point["samples"]) == list(PROMPTS) for point in shown)

    # What stands there is what the models themselves, cut for real, answer and write.
    run = _opened(llmbo.folder)
    for point in (shown[1], shown[-1]):
        model = run.model(point["trial"])
        for file in read_item_files([str(path) for path in files]):
            exam = Exam.of(file, model, run.tokenizer)
            assert exam.taken_by(model, True) == pytest.approx(
                {k: v for k, v in point["items"][file.name].items() if v is not None}
            )
        ids = [torch.tensor(run.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
        texts = [run.tokenizer.decode(new, skip_special_tokens=True) for new in continued(model, ids, NEW_TOKENS)]
        assert [text.split() for text in point["samples"].values()] == [text.split() for text in texts]
    seen = next(known for known in run.front if known.trial == shown[1]["trial"])
    assert seen.items["quiz"]["acc"] == shown[1]["items"]["quiz"]["acc"] and seen.samples == shown[1]["samples"]
    assert run.to_dataframe()["last_perplexity"].notna().sum() == len(report["front"])

    text = files[0].read_text(encoding="utf-8")
    files[0].write_text(text.replace('"answer": 0', '"answer": 1'), encoding="utf-8")
    changed = llmbo(budget=22, items=files, no_samples=None)
    files[0].write_text(text, encoding="utf-8")
    assert changed.exit_code == 2 and "items" in changed.stderr


def _opened(folder: Path) -> Any:
    return llmbo.load_run(folder / "runs" / "tiny", show="nothing")


def test_samples_are_spread_over_the_front_by_size(toy: Any) -> None:
    by_size = {trial.values["params"]: trial for trial in toy.trials(toy.random_points(40, 1))}
    front = [by_size[size] for size in sorted(by_size)]
    few = spread(front, 6)
    sizes = [trial.values["params"] for trial in few]
    assert few[0] is front[0] and few[-1] is front[-1] and 4 <= len(few) <= 6 and sizes == sorted(set(sizes))
    assert max(b - a for a, b in pairwise(sizes)) < 0.5 * (sizes[-1] - sizes[0])
    assert spread(front[:6], 6) == front[:6] and spread([], 6) == []


class Hostile:
    """A tokenizer whose every token is a command to a terminal."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1, 2, 3]}

    def decode(self, ids: torch.Tensor, **options: Any) -> str:
        return "a\x1b]0;t\x07\u202e\x9b31m\n" * len(ids)


def test_what_models_write_is_tame(finished: Any) -> None:
    model = _opened(finished.folder).model(0)
    model.config.max_position_embeddings = 9  # six more words
    texts = samples(model, Hostile())
    assert list(texts) == list(PROMPTS) and all(text == "a]0;t31m\n" * 6 for text in texts.values())
    assert not [c for text in texts.values() for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]
    model.config.max_position_embeddings = 3  # no room behind any prompt
    assert samples(model, Hostile()) == {}


def test_items_that_cannot_be_asked_are_refused_before_the_search(
    llmbo: Callable[..., Result], files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def strange(*words: object) -> None:
        raise ModelError("Not these.")

    monkeypatch.setattr(Exam, "of", strange)
    refused = llmbo(items=files)
    assert refused.exit_code == 2 and "Not these." in refused.stderr and not list(llmbo.folder.rglob("study.db"))
