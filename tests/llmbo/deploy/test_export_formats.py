"""Every row of the table of formats keeps what it promises. A new row joins by being in the table."""

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import llmbo
from llmbo.cli import app
from llmbo.config import RunConfig
from llmbo.config.formats import FORMATS, Format, caveat
from llmbo.deploy.export import export
from llmbo.deploy.fit import best_within
from llmbo.deploy.request import ExportRequest
from llmbo.deploy.target import Target
from llmbo.display.console import Console
from llmbo.display.progress import Display
from llmbo.errors import ConfigError, ModelError
from llmbo.models.loading import LoadedModel, load_checkpoint, load_model
from llmbo.problem.file_size import file_costs
from llmbo.report.page import render_page
from llmbo.run.rebuild import read_run
from pruning.architecture import Architecture
from pruning.errors import UnsupportedExport
from pruning.export.verify import difference
from pruning.likelihood import quality

# How a program goes on that has a `model` from one of these libraries and `tokens`: it ends with `logits`.
GOES_ON = {
    "transformers": "logits = model(tokens).logits.detach()",
    "llama_cpp": """
rows = []
for window in tokens.tolist():
    model.reset()
    model.eval(window)
    rows.append(torch.from_numpy(model.scores[: len(window)].copy()))
logits = torch.stack(rows)
""",
}
PROGRAM = """
import functools, importlib.util, sys, torch
from safetensors.torch import load_file, save_file
if importlib.util.find_spec("llama_cpp"):  # what a person need not say
    import llama_cpp
    llama_cpp.Llama = functools.partial(llama_cpp.Llama, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
tokens = load_file(sys.argv[1])["tokens"]
{load}
{goes_on}
save_file({{"logits": logits.float().contiguous()}}, sys.argv[2])
"""
# Share of the logits' spread, by bytes per parameter: coarse weights compute something else, a wrong model everything.
TOLERANCE = {4: 1e-3, 2: 0.02, 1.0625: 0.1}

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


def shown() -> Display:
    return Display(Console(stderr=True), 0)


@pytest.fixture(scope="module")
def folder(finished: Any, tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """Working directory of a run on a tiny llama that every format can hold: llama.cpp wants a byte-level tokenizer."""
    place = tmp_path_factory.mktemp("formats")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    words.train_from_iterator([text_file.read_text()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(place / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=384, initializer_range=0.3, max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    result = replace(finished, folder=place)(
        model=place / "model", budget=8, neuron_step=32, deploy="vllm", objectives="kl,file_bytes"
    )
    assert result.exit_code == 0, result.output
    return place


@pytest.fixture(scope="module")
def run(folder: Path) -> str:
    return str(folder / "runs" / "tiny")


@pytest.fixture(scope="module")
def priced(finished: Any, folder: Path) -> str:
    """A run on the same model that counted GGUF files of a coarse type, though nobody asked for any engine."""
    options = {"model": folder / "model", "neuron_step": 32, "name": "priced", "quantize": "q4_0"}
    assert replace(finished, folder=folder)(budget=4, **options).exit_code == 0
    return str(folder / "runs" / "priced")


@pytest.fixture(scope="module")
def base(folder: Path) -> LoadedModel:
    return load_model(str(folder / "model"), "float32", "cpu")


@pytest.fixture(scope="module")
def trial(run: str) -> int:
    """The smallest one with layers of unequal size."""
    report = read_run(run)
    assert {groups for trial in report.trials for groups in trial.architecture.kv_groups} == {0, 2}  # --deploy vllm
    assert report.space.kv_group_levels == [0, 2]
    unequal = [trial for trial in report.trials if len(set(trial.architecture.neurons)) > 1 and trial.objectives]
    return min(unequal, key=lambda trial: trial.objectives.params).number  # type: ignore[union-attr]


def pruned_model(run: str, trial: int, base: LoadedModel) -> PreTrainedModel:
    return llmbo.Run(Path(run), read_run(run), base, "nothing").model(trial)


@pytest.fixture(scope="module")
def cut(run: str, trial: int, base: LoadedModel) -> PreTrainedModel:
    return pruned_model(run, trial, base)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))


Apart = Callable[[Callable[[], object], str], tuple[int, str]]


def as_the_card_says(folder: Path, tokens: Tensor, apart: Apart) -> Tensor:
    """Logits that a process without this project computes when it loads the model by the program on its card."""
    load = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert load, "no program says how to load the model"
    library = re.findall(r"^(?:from|import) (\w+)", load[1], re.MULTILINE)[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library} to load what was written")
    scratch = folder.with_name("scratch")
    scratch.mkdir()
    save_file({"tokens": tokens}, scratch / "asked")
    program = PROGRAM.format(load=load[1], goes_on=GOES_ON[library])

    def main() -> None:
        sys.argv = ["-c", str(scratch / "asked"), str(scratch / "found")]
        exec(program, {"__name__": "__main__"})

    code, stderr = apart(main, str(scratch))
    assert code == 0, stderr
    return load_file(scratch / "found")["logits"]


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(row, dtype) for row in FORMATS.values() for dtype in (row.default, min(row.dtypes, key=row.dtypes.__getitem__))],
    ids=lambda value: getattr(value, "name", value),
)
def test_it_loads_as_its_card_says_and_is_as_large_as_announced(
    format: Format,
    dtype: str,
    run: str,
    trial: int,
    base: LoadedModel,
    cut: PreTrainedModel,
    tokens: Tensor,
    tmp_path: Path,
    apart: Apart,
) -> None:
    out = tmp_path / "out"
    request = ExportRequest.of(run, trial, format.name, out, dtype)
    check = export(request, "the command", shown(), base)
    bytes_each = format.dtypes[request.dtype]
    assert check.difference < TOLERANCE[bytes_each]

    card = (out / "README.md").read_text()
    assert "the command" in card and f"Stored as {request.dtype}." in card and caveat(format) in card
    beside = sum(path.stat().st_size for path in out.iterdir() if path.name not in ("README.md", "llmbo.json"))
    assert f"{beside / 1e6:.1f} MB on disk" in card
    told = json.loads((out / "llmbo.json").read_text())
    assert (told["format"], told["dtype"], told["trial"]) == (format.name, request.dtype, trial)

    texts = [path for path in out.iterdir() if path.suffix in (".md", ".json", ".jinja", ".py")]
    weights = sum(path.stat().st_size for path in out.iterdir() if path not in texts)
    announced = format.bytes_on_disk(request.dtype, cut.num_parameters(), base.parameters)
    least = 0.8 * bytes_each * cut.num_parameters()
    assert cut.num_parameters() < 0.8 * base.parameters  # or the next line would not tell the two apart
    assert least < weights < 1.05 * announced + 20_000, "names, vectors in float32 and the vocabulary"

    asked = {
        "gguf": {"quantize": request.dtype},
        "hf": {"deploy": ("hf-stock",)},
        "vllm": {"deploy": ("vllm", "llama.cpp")},
    }
    if dtype == format.default and format.name in asked:
        config = RunConfig("it", objectives=("kl", "file_bytes"), **asked[format.name])
        units = (torch.tensor(request.architecture.units(kind)) for kind in ("attention", "mlp"))
        assert weights == file_costs(config, base)["file_bytes"](*units)
        if format.name == "vllm":  # what the run searched for
            assert weights == request.trial.objectives.model_dump()["file_bytes"]
    if dtype == format.default and format.name != "vllm":  # tests/pruning/test_export_vllm.py loads it as its card says
        assert difference(as_the_card_says(out, tokens, apart), cut(tokens).logits.detach()) < TOLERANCE[bytes_each]


STORED = [(row.name, kind) for row in FORMATS.values() for kind in dict.fromkeys((*row.dtypes, *row.quantised))]


@pytest.mark.parametrize(("format", "kind"), [*STORED, ("gguf", "recipe")])
def test_the_best_model_whose_file_is_small_enough_is_taken(
    format: str, kind: str, run: str, base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is told of a file before there is any is true to the byte, and a budget of a byte less is another one."""
    if kind.endswith(("_m", "_k")) and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama.cpp makes these")
    if kind == "recipe":
        (tmp_path / "mine.json").write_text('{"ffn_down": "q8_0", "token_embd": "bf16", "attn": "q5_1"}')
        kind = f"recipe:{tmp_path / 'mine.json'}"
    flag = "dtype" if kind in FORMATS[format].choices else "quantize"
    report, find_spec = read_run(run), importlib.util.find_spec
    target, front = Target.of(report, format, **{flag: kind}), [point for point in report.front if point.trial]
    architectures = [Architecture.from_dict(point.architecture.model_dump()) for point in front]
    sizes = dict(zip([point.trial for point in front], target.sizes(report, architectures), strict=True))
    assert target.sizes(report, architectures, base) == list(sizes.values())  # loaded or not
    quality = {point.trial: point.objectives.kl for point in front}
    budget = sorted(sizes.values())[len(sizes) // 2]
    wanted = min((number for number in sizes if sizes[number] <= budget), key=quality.__getitem__)
    asked: dict[str, Any] = {"format": format, "out": tmp_path / "out", flag: kind}
    request = ExportRequest.of(run, None, **asked, fit=[f"file_bytes<={sizes[wanted]}"])
    assert request.trial.number == wanted and request.dtype == kind and request.target.note == ""
    less = [number for number in sizes if sizes[number] <= sizes[wanted] - 1]
    if less:
        smaller = ExportRequest.of(run, None, **asked, fit=[f"file_bytes<={sizes[wanted] - 1}"])
        assert smaller.trial.number == min(less, key=quality.__getitem__) != wanted
    monkeypatch.setattr(  # read back, which is faster
        importlib.util, "find_spec", lambda name: None if name == "llama_cpp" and "_k" not in kind else find_spec(name)
    )
    export(request, "the command", shown(), base)
    weights = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".gguf", ".safetensors")]
    assert sum(path.stat().st_size for path in weights) == sizes[wanted]


def test_a_run_that_counted_a_type_is_exported_so(priced: str, base: LoadedModel, tmp_path: Path) -> None:
    """Unless something else is asked for, in either face, and it is said."""
    point = read_run(priced).front[-1]
    request = ExportRequest.of(priced, point.trial, "", tmp_path / "out")
    assert (request.format.name, request.dtype) == ("gguf", "q4_0")
    assert request.target.note == "--format gguf --quantize q4_0, of which the run counted file_bytes."
    for format, kind, note in (("hf", "float32", ""), ("gguf", "q4_0", request.target.note)):
        other = ExportRequest.of(priced, point.trial, format, tmp_path / "out")
        assert (other.dtype, other.target.note) == (kind, note)
    assert ExportRequest.of(priced, point.trial, "", tmp_path / "out", "f16").target.note.startswith("--format gguf, s")

    counted = point.objectives.model_dump()["file_bytes"]
    opened = llmbo.Run(Path(priced), read_run(priced), base, "nothing")
    assert opened.best_within({"file_bytes": counted}).trial == point.trial
    whole = opened.best_within({"file_bytes": 1e9}, format="hf")
    assert whole.trial == point.trial  # the largest is the best
    with pytest.raises(
        ConfigError, match=rf"has file_bytes<={counted}: the nearest is trial \d+ with file_bytes \d+\."
    ):
        opened.best_within({"file_bytes": counted}, format="hf", dtype="float32")
    opened.export({"file_bytes": counted}, tmp_path / "out")
    [file] = (tmp_path / "out").glob("*.gguf")
    assert file.stat().st_size == counted and file.name == f"priced-trial-{point.trial}-q4_0.gguf"
    told = json.loads((tmp_path / "out" / "llmbo.json").read_text())
    assert (told["dtype"], told["trial"]) == ("q4_0", point.trial)
    assert f"export(trial={{'file_bytes': {counted}}}, format='gguf'" in told["command"]


def test_what_a_file_takes_cannot_always_be_told(run: str, finished: Any, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"format": "gguf", "out": tmp_path / "out", "fit": ["file_bytes<=1e9"]}
    with pytest.raises(ConfigError, match="both say how large the file may be: leave one out"):
        ExportRequest.of(run, None, **asked, quantize="searched:1MB")
    with pytest.raises(ModelError, match="no model folder '/no/such/model'"):
        ExportRequest.of(run, None, **asked, base="/no/such/model")
    with pytest.raises(ModelError, match=r"had another model \(hidden_size 64, now 32\).*--model says"):
        ExportRequest.of(run, None, **asked, base=str(finished.report()["run"]["settings"]["model"]))
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_is_passed_over(finished: Any, tmp_path: Path) -> None:
    run = str(finished.folder / "runs" / "tiny")
    report = read_run(run)
    held = [point for point in report.front if {*point.architecture.kv_groups} <= {0, report.model.num_key_value_heads}]
    assert held and len(held) < len(report.front)
    best = min(held, key=lambda point: point.objectives.kl)
    for name, budget in (("params", 1e9), ("file_bytes", 1e9)):
        assert (
            ExportRequest.of(run, None, "vllm", tmp_path / "out", fit=[f"{name}<={budget}"]).trial.number == best.trial
        )
    report.front[:] = [point for point in report.front if point not in held]
    with pytest.raises(UnsupportedExport, match="keeps all heads of a layer or none"):
        best_within(report, {"params": 1e9}, Target.of(report, "vllm"))


def test_types_are_searched_for_a_size(
    run: str, trial: int, base: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # read back, which is faster
    request = ExportRequest.of(run, trial, "gguf", tmp_path / "out", quantize="searched:1KB")
    coarse = replace(request.target, dtype="q8_0")
    export(replace(request, target=coarse, out=tmp_path / "q8_0"), "the command", shown(), base)
    size = int(0.8 * next((tmp_path / "q8_0").glob("*.gguf")).stat().st_size)
    check = export(replace(request, target=replace(coarse, dtype=f"searched:{size}")), "the command", shown(), base)
    [file] = (tmp_path / "out").glob("*-searched.gguf")
    assert 0.9 * size < file.stat().st_size <= size
    enough = request.options(None, torch.zeros(100, 256), lambda done: None)["windows"]
    assert request.bytes_needed == 1000 + round(request.format.checking * request.trial.objectives.params)
    assert (request.dtype, len(enough)) == ("searched:1000", 100)  # all of the text is fitted to
    assert check.notes[0].startswith(f"Types searched for at most {size / 1e6:.1f} MB; ")
    assert "Stored as searched." in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "words", "stored"),
    [
        ("hf", ("--dtype", "bfloat16", "--max-shard-size", "150KB"), "bfloat16"),
        ("gguf", ("--quantize", "q4_0"), "q4_0"),
        ("vllm", (), "float32"),
        ("padded", ("--dtype", "float16"), "float16"),
    ],
)
def test_what_is_healed_is_written_as_an_export_is(
    run: str,
    trial: int,
    folder: Path,
    text_file: Path,
    tmp_path: Path,
    format: str,
    words: tuple[str, ...],
    stored: str,
) -> None:
    out, common = tmp_path / "out", ("--window", 16, "--heldout", 2, "--steps", 2, "--compute-dtype", "float32")
    given = ["recover", run, "--trial", trial, "--format", format, "--out", out, *common, *words]
    done = CliRunner().invoke(app, [*map(str, given), "--text", f"text:{text_file}", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    told = json.loads((out / "llmbo.json").read_text())
    assert (told["format"], told["dtype"], told["recovery"]["plan"]["steps"]) == (format, stored, 2)
    assert f"Stored as {stored}." in (out / "README.md").read_text()
    shards = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert (len(shards) > 1) == ("--max-shard-size" in words)
    if format == "gguf":
        assert [path.name for path in out.glob("*.gguf")] == [f"tiny-trial-{trial}-q4_0.gguf"]
        return
    model = load_checkpoint(str(out), "float32", "cpu").model  # without code of the folder's own
    assert quality(model, torch.arange(32).view(1, 32)).loss > 0
    again = ["recover", out, "--out", tmp_path / "again", *common, "--text", f"text:{text_file}", "--device", "cpu"]
    more = CliRunner().invoke(app, [*map(str, again), "--train", "norms", "--lr", "3e-3"])
    assert more.exit_code == 0, more.output
    files = [
        {path.name for path in place.iterdir() if path.suffix in (".py", ".json")}
        for place in (out, tmp_path / "again")
    ]
    assert {name for name in files[0] if "index" not in name} == files[1]
    config, former = (json.loads((place / "config.json").read_text()) for place in (tmp_path / "again", out))
    assert config == former


@every_format
def test_a_dtype_that_it_cannot_store_is_refused(format: Format, run: str, trial: int, tmp_path: Path) -> None:
    others = {dtype for row in FORMATS.values() for dtype in row.choices} - set(format.choices)
    assert format.default in format.choices and others
    for dtype in (*others, "float7"):
        with pytest.raises(ConfigError, match=f"--format {format.name} has no --dtype '{dtype}': expected one of"):
            ExportRequest.of(run, trial, format.name, tmp_path / "out", dtype)


def test_the_flags_name_every_format_and_dtype() -> None:
    command: Any = typer.main.get_command(app)
    for name in ("export", "recover"):
        told = {option.name: option.help for option in command.commands[name].params}
        for row in FORMATS.values():
            assert f"{row.name}: {row.description}" in told["format"]
            assert re.search(rf"\b{row.name}\b[\w, ]*: {', '.join(row.choices)}[;.]", told["dtype"])


def test_only_what_saves_nothing_is_said_to(tmp_path: Path) -> None:
    for row in FORMATS.values():
        small, large = row.bytes_on_disk(next(iter(row.dtypes)), 100, 200), next(iter(row.dtypes.values())) * 200
        assert ("saves no memory" in row.description) == bool(caveat(row)) == (small == large) == (not row.saves)


@pytest.mark.parametrize("counted", ["", "q4_0"])
def test_the_report_page_offers_every_format_with_a_command_that_is_understood(
    counted: str, browser: Any, run: str, priced: str, tmp_path: Path
) -> None:
    run, first = (priced, "gguf") if counted else (run, "vllm")
    page_file = tmp_path / "page.html"
    page_file.write_text(render_page([(run, json.loads((Path(run) / "report.json").read_text()))]), encoding="utf-8")
    page = browser.new_page()
    page.goto(page_file.as_uri())
    titles = page.locator("#export-format option").all_text_contents()
    others = [name for name in FORMATS if name != first]
    assert titles == [FORMATS[name].description for name in (first, *others)]
    assert f"--format {first} " in page.locator("#export-command").text_content()
    folders, formats = set(), ["gguf", "hf"] if counted else [*FORMATS]  # of the former's heads vLLM wants all
    for name in formats:
        page.select_option("#export-format", name)
        words = shlex.split(page.locator("#export-command").text_content())
        group: Any = typer.main.get_command(app)
        given = group.commands["export"].make_context("export", words[2:]).params
        stored = {"dtype": given["dtype"], "quantize": given["quantize"]}
        request = ExportRequest.of(given["run"], given["trial"], given["format"], Path(given["out"]), **stored)
        assert words[:2] == ["llmbo", "export"] and request.format.name == name
        assert stored == {"dtype": "", "quantize": counted if name == "gguf" else ""}
        assert request.dtype == (counted or "f16" if name == "gguf" else "float32")
        folders.add(request.out)
    assert len(folders) == len(formats)
    page.close()


def test_a_cut_model_is_an_ordinary_one(cut: PreTrainedModel, base: LoadedModel, tokens: Tensor, run: str) -> None:
    dense = load_model(base.source, "float32", "cpu").model
    assert all(torch.equal(a, b) for a, b in zip(base.model.parameters(), dense.parameters(), strict=True))
    shared = {weight.data_ptr() for weight in base.model.parameters()} & {w.data_ptr() for w in cut.parameters()}
    assert not shared
    with torch.no_grad():
        again = cut.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=True)
        uncached = cut.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(again, uncached) and again.shape[1] <= tokens.shape[1] + 4


def test_a_loaded_base_model_is_checked_too(
    run: str, trial: int, base: LoadedModel, folder: Path, tmp_path: Path
) -> None:
    coarse = load_model(str(folder / "model"), "bfloat16", "cpu")
    with pytest.raises(ModelError, match="had its model in float32, the given one is in bfloat16"):
        pruned_model(run, trial, coarse)
    AutoModelForCausalLM.from_config(base.model.config).save_pretrained(tmp_path / "other")
    base.tokenizer.save_pretrained(tmp_path / "other")
    other = load_model(str(tmp_path / "other"), "float32", "cpu")
    with pytest.raises(ModelError, match=r"had another model or text \(fingerprint"):
        export(ExportRequest.of(run, trial, "hf", tmp_path / "out"), "", shown(), other)
    with pytest.raises(ConfigError, match="no trial 999"):
        pruned_model(run, 999, base)
    assert not (tmp_path / "out").exists()
