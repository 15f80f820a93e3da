"""The Python face does what the command line does, keyword by keyword, and hands out the models themselves."""

import contextlib
import copy
import inspect
import json
import shutil
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import typer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging

import llmbo
from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.errors import ConfigError, LlmboError, ModelError, StorageError

FEW: dict[str, Any] = {
    "window": 16, "calibration_tokens": 128, "proxy_tokens": 64, "heldout_tokens": 64, "dtype": "float32", "device": "cpu",
    "show": "nothing", "heldout_text": "none",
}  # fmt: skip
SMALL: Any = {
    "num_hidden_layers": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "vocab_size": 9,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Path:
    """A working directory with the tiny model and a text."""
    folder = tmp_path_factory.mktemp("api")
    shutil.copytree(model_folder, folder / "tiny")
    shutil.copy(text_file, folder / "words.txt")
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path) -> Any:
    with contextlib.chdir(place):
        yield


@pytest.fixture(scope="module")
def run(place: Path) -> llmbo.Run:
    with contextlib.chdir(place):
        return llmbo.optimize("tiny", budget=14, text="text:words.txt", maximum={"params_share": 0.95}, **FEW)


def loaded(folder: str = "tiny") -> dict[str, Any]:
    return {
        "model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }


def test_every_setting_of_the_command_line_is_a_typed_keyword() -> None:
    parameters = inspect.signature(llmbo.optimize).parameters
    settings = {item.name: item for item in fields(RunConfig)}
    of_cli = {parameter.name for parameter in typer.main.get_command(app).commands["optimize"].params}  # type: ignore[attr-defined]
    shown = {"uniform", "quiet", "json_logs", "plan"}  # `strategy`, `show` and `llmbo.plan` say these
    assert of_cli - shown <= {*parameters} and {*settings} <= {*parameters}
    hints = get_type_hints(llmbo.optimize, localns=vars(sys.modules["llmbo.api.search"]))
    assert {*parameters} <= {*hints}
    for name, item in settings.items():
        if name != "model":
            assert parameters[name].default == item.default, name


def test_a_run_is_the_command_lines_run(run: llmbo.Run, place: Path, forked: Any) -> None:
    """Same trials, same values, same report but for how it was started."""
    words = [
        "optimize", "--model", "tiny", "--name", "typed", "--budget", "14", "--text", "text:words.txt", "--window", "16", "--max",
        "params_share=0.95", "--calibration-tokens", "128", "--proxy-tokens", "64", "--heldout-tokens", "64", "--dtype", "float32",
        "--device", "cpu", "--quiet", "--heldout-text", "none",
    ]  # fmt: skip
    typing = forked(words, place)
    assert typing.wait() == 0, typing.err.read_text()
    assert typing.out.read_text().startswith("Report: runs/typed/report.json")
    ours, typed = (
        json.loads(Path(f"runs/{name}/report.json").read_text(encoding="utf-8")) for name in ("tiny", "typed")
    )
    without_time = [[{**trial, "seconds": None} for trial in report["trials"]] for report in (ours, typed)]
    assert without_time[0] == without_time[1]
    assert [ours[part] for part in ("front", "dense", "model", "data")] == [
        typed[part] for part in ("front", "dense", "model", "data")
    ]
    assert ours["run"]["command"].startswith("llmbo.optimize(model='tiny', budget=14, ")
    assert "maximum={'params_share': 0.95}" in ours["run"]["command"] and "batch" not in ours["run"]["command"]


def test_the_front_is_what_the_report_says(run: llmbo.Run) -> None:
    report = json.loads((run.folder / "report.json").read_text(encoding="utf-8"))
    assert [point.trial for point in run.front] == [point["trial"] for point in report["front"]]
    for point, told in zip(run.front, report["front"], strict=True):
        assert point.architecture.to_dict() == told["architecture"]
        assert point.heldout is not None and point.heldout["kl"] == told["heldout"]["kl"] > 0
        assert point.objectives["params_share"] == told["objectives"]["params_share"] <= 0.95
    assert len(run.trials) == 14 and run.dense.trial is None and run.dense.objectives["kl"] == 0
    assert run.page.is_file() and run.hypervolume == report["hypervolume"]["final"] > 0
    assert repr(run).startswith("<Run 'tiny' of tiny: ") and str(run.folder) in repr(run)


def test_a_table_holds_every_trial(run: llmbo.Run) -> None:
    pandas = pytest.importorskip("pandas")
    frame = run.to_dataframe()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == list(range(14))
    front = frame[frame["on_front"]]
    assert sorted(front.index) == sorted(point.trial for point in run.front)
    assert front["heldout_kl"].notna().all() and frame[~frame["on_front"]]["heldout_kl"].isna().all()
    assert frame.loc[0, "kl"] == run.trials[0].objectives["kl"]
    assert frame.loc[0, "neurons"] == list(run.trials[0].architecture.neurons)


def test_without_pandas_the_table_says_what_to_install(run: llmbo.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        run.to_dataframe()


def test_a_notebook_shows_picture_and_table_and_nothing_unescaped(run: llmbo.Run) -> None:
    shown = run._repr_html_()
    assert shown.count("<tr>") == 2 + len(run.front) and "data:image/png;base64,iVBOR" in shown
    hostile = copy.deepcopy(run.report)
    hostile.run.name = '"><script>alert(1)</script>'
    assert "<script" not in llmbo.Run(run.folder, hostile)._repr_html_()


def test_a_trials_model_is_an_ordinary_smaller_one(run: llmbo.Run, windows: Any) -> None:
    point = run.front[0]
    model = run.model(point.trial)
    assert (
        isinstance(model, torch.nn.Module) and sum(p.numel() for p in model.parameters()) == point.objectives["params"]
    )
    tokens = torch.arange(2, 12)[None]
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 13)
    again = llmbo.load_run(run.folder, show="nothing").model(point.trial)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits)


def test_an_export_loads_again_and_computes_the_trials_model(run: llmbo.Run, tmp_path: Path) -> None:
    point = run.front[0]
    check = run.export(trial=point.trial, format="hf", out=tmp_path / "small")
    assert check.difference < 1e-3
    told = json.loads((tmp_path / "small" / "llmbo.json").read_text(encoding="utf-8"))
    assert told["architecture"] == point.architecture.to_dict()
    assert f"trial={point.trial}" in told["command"] and "llmbo.load_run(" in told["command"]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    tokens = torch.arange(2, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(tokens).logits, run.model(point.trial)(tokens).logits, rtol=0, atol=1e-4)


def test_a_run_that_is_opened_is_the_run_that_was_made(run: llmbo.Run) -> None:
    for opened in (llmbo.load_run(run.folder), llmbo.load_run("runs/tiny"), llmbo.load_run(run.folder / "report.json")):
        assert opened.report == run.report and opened.front == run.front


def test_the_same_call_goes_on_and_a_changed_one_is_refused(run: llmbo.Run, place: Path) -> None:
    shutil.copytree(run.folder, place / "runs" / "more")
    shutil.copy(place / "runs" / "more" / "study.db", place / "more.db")
    call = {"model": "tiny", "text": "text:words.txt", "maximum": ["params_share=0.95"], **FEW}
    with pytest.raises(ConfigError, match="has already spent its budget"):
        llmbo.optimize(budget=14, **call)
    with pytest.raises(StorageError, match="seed: 0 -> 1"):
        llmbo.optimize(budget=16, seed=1, **call)
    longer = llmbo.optimize(budget=16, **call)
    # What is gained over the path is told anew, and so is which dozen of the front is judged on the other text.
    kept, before = (
        [(point.architecture, point.objectives, point.origin) for point in made.trials] for made in (longer, run)
    )
    assert kept[:14] == before and len(kept) == 16


def test_silence_is_silent_and_leaves_the_libraries_as_they_were(capfd: pytest.CaptureFixture[str]) -> None:
    logging.enable_progress_bar()
    logging.set_verbosity_info()
    try:
        quiet = llmbo.optimize("tiny", budget=13, name="quiet", text="text:words.txt", fresh=True, **FEW)
        quiet.model(1)
        assert capfd.readouterr() == ("", "")
        assert logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity_warning()


class TestALoadedModel:
    """`optimize(model=…, tokenizer=…)`."""

    def test_gives_the_run_of_its_folder_and_is_left_as_it_was(self, unchanged: Any) -> None:
        given = loaded()
        given["model"].train()
        with unchanged(given["model"]):
            ours = llmbo.optimize(
                **given, budget=5, name="given", text="text:words.txt", **FEW | {"dtype": "auto", "device": "auto"}
            )
        assert given["model"].training and all(module.training for module in given["model"].modules())
        named = llmbo.optimize("tiny", budget=5, name="named", text="text:words.txt", **FEW)
        assert [(trial.architecture, trial.objectives) for trial in ours.trials] == [
            (trial.architecture, trial.objectives) for trial in named.trials
        ]
        tokens = torch.arange(2, 12)[None]
        with torch.no_grad():
            torch.testing.assert_close(ours.model(2)(tokens).logits, named.model(2)(tokens).logits)

    def test_opens_a_run_whose_folder_is_gone(self, tmp_path: Path) -> None:
        given = loaded()
        given["model"].config._name_or_path = "/nowhere/at/all"
        made = llmbo.optimize(**given, budget=3, name="homeless", text="text:words.txt", **FEW | {"dtype": "auto"})
        assert made.report.model.name == "/nowhere/at/all"
        with pytest.raises(ModelError, match="There is no model folder"):
            llmbo.load_run("homeless", show="nothing").model(1)
        opened = llmbo.load_run("homeless", **loaded(), show="nothing")
        assert opened.export(trial=1, out=tmp_path / "small").difference < 1e-3
        other = loaded()
        with torch.no_grad():
            other["model"].lm_head.weight += 1
        with pytest.raises(ModelError, match="fingerprint"):
            llmbo.load_run("homeless", **other, show="nothing").model(1)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda given: given.pop("tokenizer"), r"tokenizer=AutoTokenizer\.from_pretrained"),
            (lambda given: given.update(dtype="bfloat16"), "dtype='bfloat16', but the loaded model is in float32"),
            (lambda given: given.update(device="cuda"), "device='cuda', but the loaded model is in cpu"),
            (lambda given: given.update(offload="disk"), "offload='disk' says where llmbo loads a model, but this one is loaded"),
            (lambda given: given.update(memory="1GB"), "memory='1GB' says where llmbo loads a model, but this one is loaded"),
            (lambda given: given.update(model=given["model"].double()), "is in float64: expected one of float32"),
            (lambda given: given.update(model=LlamaModel(LlamaConfig(**SMALL))), "no language-model head"),
            (lambda given: given.update(model=T5ForConditionalGeneration(T5Config(num_layers=1, vocab_size=9))), "encoder-decoder"),
        ],
    )  # fmt: skip
    def test_that_cannot_be_searched_is_refused_in_one_line(self, change: Any, says: str) -> None:
        call = {**loaded(), **FEW, "dtype": "auto", "device": "auto", "name": "refused", "text": "text:words.txt"}
        change(call)
        with pytest.raises(LlmboError, match=says) as refused:
            llmbo.optimize(**call)
        assert "\n" not in str(refused.value) and not Path("runs/refused").exists()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"model": "tiny", "strategy": "qnehv"}, "did you mean qnehvi"),
        ({"model": "tiny", "objectives": ["kl"]}, "two or three"),
        ({"model": "tiny", "show": "loud"}, "Unknown way to show progress 'loud'"),
        ({"model": "tiny", "tokenizer": object()}, "belongs to a loaded model"),
        ({"model": "./nope"}, "There is no model folder"),
        ({"model": "tiny", "maximum": {"params_shar": 0.5}}, "did you mean params_share"),
        ({"model": "tiny", "budget": 0}, "must be at least 1"),
    ],
)
def test_bad_input_is_one_line(call: dict[str, Any], says: str) -> None:
    with pytest.raises(LlmboError, match=says) as refused:
        llmbo.optimize(**{**FEW, "name": "bad", "text": "text:words.txt", **call})
    assert "\n" not in str(refused.value) and not Path("runs/bad").exists()


def test_a_run_that_is_not_there_is_refused_by_name(run: llmbo.Run) -> None:
    with pytest.raises(StorageError, match=r"no run 'tinny'.*Did you mean 'tiny'"):
        llmbo.load_run("tinny")


def test_names_are_looked_up_and_others_are_not() -> None:
    assert {"optimize", "load_run", "Run", "Point", "LlmboError"} <= {*llmbo.__all__} <= {*dir(llmbo)}
    assert all(getattr(llmbo, name) is not None for name in llmbo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = llmbo.optimise  # type: ignore[attr-defined]
