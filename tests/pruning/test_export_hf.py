"""An exported folder computes what the shrunk model does, behaves like any other model, and is whole or not there."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import pruning.export.reload_hf
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.errors import ExportFailed, UnsupportedExport
from pruning.export import Pruned, load_pruned, save_gguf, save_hf, save_padded
from pruning.export.folder import folder_beside
from pruning.export.hf import padded
from pruning.export.reader import reader
from pruning.export.rebuild import is_stock, rebuilt
from pruning.masks import PruningMask
from pruning.shrinking import shrink
from pruning.widths import lacking_of, units_of

PATTERNS = ["ABMB-", "MABBB", "UUU-U"]  # U: equal layers
ONE_OF_EACH_KIND = pytest.mark.parametrize(
    "model", ["llama-tied", "qwen3", "gemma2", "gemma3", "phi3", "gpt-neox", "gpt2", "opt"], indirect=True
)
ONE_FAMILY = pytest.mark.parametrize("model", ["llama-tied"], indirect=True)
Draw = Callable[..., Pruned]
TEXT = "It's 12345 o'clock; the naïve café.\n\n\tx = y ** 2  # why?"


@pytest.fixture
def pruned(
    random_architecture: Callable[..., Architecture], random_ranking: Callable[..., Any]
) -> Callable[[PreTrainedModel, str], Pruned]:
    """(dense model, pattern) -> a scattered sub-network of it, ready for export."""

    def draw(model: PreTrainedModel, pattern: str) -> Pruned:
        anatomy = anatomy_of(model)
        equal = tuple(letter == "U" for letter in pattern)
        architecture = (
            Architecture(tuple(2 * keep for keep in equal), tuple(9 * keep for keep in equal))
            if any(equal)
            else random_architecture(anatomy, 0, pattern)
        )
        mask = PruningMask.from_architecture(architecture, random_ranking(anatomy, 0))
        return Pruned(shrink(model, mask), anatomy, architecture)

    return draw


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Pruned], Path]:
    """A folder as `save_hf` leaves it, without its check: a process of its own takes seconds."""

    def save(pruned: Pruned) -> Path:
        rebuilt(pruned.model, pruned.anatomy, pruned.architecture).save_pretrained(tmp_path / "saved")
        return tmp_path / "saved"

    return save


def tolerance(model: PreTrainedModel) -> float:
    """Gemma scales embeddings by a number that `.double()` leaves at float32's digits and a float64 checkpoint does not."""
    return 1e-4 if model.config.model_type.startswith("gemma") else 1e-12


@pytest.mark.parametrize("name", ["phi3", "gpt_neox"])
def test_a_folder_of_the_first_version_loads_for_ever(name: str, tmp_path: Path) -> None:
    """By the code in it and by this package's: its config tells roles by letters."""
    folder = Path(__file__).parent / "data" / "first_version" / name
    given = load_file(folder / "computes.safetensors")
    inputs = json.loads((folder / "config.json").read_text())["pruned_blocks"]["attention"]["inputs"]
    assert {role for parts in inputs.values() for part in parts for role in part} == {"q", "k", "v"}
    with torch.no_grad():
        found = load_pruned(folder)(given["tokens"], use_cache=False).logits
    torch.testing.assert_close(found, given["logits"])
    with reader("reload_hf.py") as read:
        torch.testing.assert_close(read(folder, {"tokens": given["tokens"]})()["logits"], given["logits"])
    # Saved again, as after training, it takes today's code along.
    load_pruned(folder).save_pretrained(tmp_path / "again")
    assert "LETTERS" in (tmp_path / "again" / "modeling_pruned.py").read_text()
    with reader("reload_hf.py") as read:
        torch.testing.assert_close(read(tmp_path / "again", {"tokens": given["tokens"]})()["logits"], given["logits"])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_reloaded_model_computes_the_same(
    model: PreTrainedModel, pattern: str, windows: Tensor, pruned: Draw, saved: Any, logits: Any, tmp_path: Path
) -> None:
    cut = pruned(model, pattern)
    expected = logits(cut.model, windows)
    folder = saved(cut)
    assert (folder / "modeling_pruned.py").exists() != is_stock(rebuilt(cut.model, cut.anatomy, cut.architecture))
    found = load_pruned(folder)
    assert found.dtype == torch.float64
    torch.testing.assert_close(logits(found, windows), expected, rtol=0, atol=tolerance(model))
    assert sum(p.numel() for p in found.parameters()) == sum(p.numel() for p in cut.model.parameters())
    found.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True, dtype=torch.float64)
    torch.testing.assert_close(logits(again, windows), expected, rtol=0, atol=tolerance(model))
    assert again.config.to_diff_dict() | {"_name_or_path": ""} == found.config.to_diff_dict() | {"_name_or_path": ""}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing(
    model: PreTrainedModel, pattern: str, windows: Tensor, pruned: Draw, logits: Any
) -> None:
    cut = pruned(model, pattern)
    wide = padded(cut)
    assert type(wide) is type(model)
    assert not getattr(wide.config, "is_heterogeneous", False)
    torch.testing.assert_close(logits(wide, windows), logits(cut.model, windows), rtol=0, atol=1e-10)


def test_folders_load_in_a_process_that_cannot_import_us(
    build: Callable[[str], PreTrainedModel], windows: Tensor, pruned: Draw, logits: Any, tmp_path: Path
) -> None:
    """All families in one process, as `save_hf` does it for one. A plain `from_pretrained` must do for stock shapes and all tokenizers."""
    expected, ids, stock = {}, {}, set()
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    words.train_from_iterator([TEXT], trainer)
    for name in (
        "llama",
        "llama-tied",
        "mistral",
        "qwen2-sliding",
        "qwen3",
        "gemma2",
        "gemma3",
        "phi3",
        "gpt-neox",
        "gpt2",
        "opt",
    ):
        dense = build(name)
        kind = TOKENIZER_MAPPING_NAMES.get(dense.config.model_type) or "TokenizersBackend"
        dense.config.save_pretrained(tmp_path / name)  # the base model, as far as its tokenizer needs it
        words.save(str(tmp_path / name / "tokenizer.json"))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        for pattern in ("MABBB", "UUU-U"):
            cut = pruned(dense, pattern)
            made = rebuilt(cut.model, cut.anatomy, cut.architecture)
            made.save_pretrained(tmp_path / f"{name}{pattern}")
            tokenizer.save_pretrained(tmp_path / f"{name}{pattern}")
            ids[f"{name}{pattern}"] = tokenizer(TEXT)["input_ids"]
            stock |= {f"{name}{pattern}"} if is_stock(made) else set()
            padded(cut).save_pretrained(tmp_path / f"{name}{pattern}-padded")
            expected |= dict.fromkeys((f"{name}{pattern}", f"{name}{pattern}-padded"), logits(cut.model, windows))
    save_file({"tokens": windows}, tmp_path / "asked")
    program = (
        f"import runpy, sys; main = runpy.run_path({pruning.export.reload_hf.__file__!r})['main']\n"
        f"for name in sys.argv[2:]: main(sys.argv[1] + name, sys.argv[1] + 'asked', sys.argv[1] + name + '.out', 1)\n"
        "assert sys.modules['pruning'] is None and sys.modules['llmbo'] is None\n"
        "import builtins, json, transformers\n"
        "builtins.input = sys.exit  # no question is asked\n"
        f"for name, ids in json.loads({json.dumps(json.dumps(ids))}).items():\n"
        f"    assert transformers.AutoTokenizer.from_pretrained(sys.argv[1] + name)({TEXT!r})['input_ids'] == ids, name"
    )
    subprocess.run([sys.executable, "-I", "-c", program, f"{tmp_path}/", *expected], check=True, capture_output=True)
    for name, value in expected.items():
        found = load_file(tmp_path / f"{name}.out")["logits"]
        torch.testing.assert_close(found, value.float(), rtol=0, atol=1e-5)
        told = json.loads((tmp_path / name / "config.json").read_text())
        assert ("auto_map" in told) == (name not in stock and not name.endswith("-padded"))


@ONE_OF_EACH_KIND
def test_unequal_layers_are_not_loaded_as_a_stock_model(model: PreTrainedModel, pruned: Draw, saved: Any) -> None:
    """Without the modelling file the missing weights would be random ones."""
    folder = saved(pruned(model, "MABBB"))
    for trust in (False, None):
        with pytest.raises(KeyError, match="trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)


def test_the_config_tells_every_layer(model: PreTrainedModel, anatomy: Anatomy, pruned: Draw, saved: Any) -> None:
    cut = pruned(model, "MABB-")
    config = AutoConfig.from_pretrained(saved(cut), trust_remote_code=True)
    assert config.num_hidden_layers == 4 and len(config.per_layer_config) == 4
    attention = cut.architecture.units("attention")
    for told, width, neurons in zip(config.per_layer_config, attention, cut.architecture.neurons, strict=False):
        groups = units_of(width)
        assert ("attention" in told.skip) == (groups == 0) and ("mlp" in told.skip) == (neurons == 0)
        if groups:
            assert told.num_attention_heads == groups * (anatomy.queries_per_group - lacking_of(width))
            assert getattr(told, "num_key_value_heads", told.num_attention_heads) == groups
        if neurons:
            assert getattr(told, anatomy.family.intermediate_size) == neurons


@pytest.mark.parametrize("pattern", ["ABMB-", "MABBB"])
def test_generation(model: PreTrainedModel, pattern: str, windows: Tensor, pruned: Draw, saved: Any) -> None:
    """With and without a cache, dynamic or static, alone or in a batch padded on the left."""
    # transformers' eager attention, which Gemma 2 needs, gives NaN for padded rows in float64.
    found = load_pruned(saved(pruned(model, pattern)), torch.float32)
    prompt = windows[:1, :8].clamp(min=1)

    def greedy(tokens: Tensor, attend: Tensor, **options: Any) -> Tensor:
        return found.generate(tokens, attention_mask=attend, do_sample=False, max_new_tokens=6, **options)[:, -6:]

    expected = greedy(prompt, torch.ones_like(prompt), use_cache=False)
    assert torch.equal(greedy(prompt, torch.ones_like(prompt)), expected)
    assert torch.equal(greedy(prompt, torch.ones_like(prompt), cache_implementation="static"), expected)
    longer = torch.cat([windows[1:2, :5], windows[2:3, :8]], dim=1).clamp(min=1)
    batch = torch.cat([torch.nn.functional.pad(prompt, (5, 0)), longer])
    attend = torch.ones_like(batch)
    attend[0, :5] = 0
    both = greedy(batch, attend)
    assert torch.equal(both[:1], expected)
    assert torch.equal(both[1:], greedy(longer, torch.ones_like(longer)))


@ONE_OF_EACH_KIND
def test_gradient_checkpointing_gives_the_same_gradients(
    model: PreTrainedModel, windows: Tensor, pruned: Draw, saved: Any
) -> None:
    found = load_pruned(saved(pruned(model, "MABB-")))
    gradients = []
    for checkpointing in (False, True):
        found.zero_grad()
        if checkpointing:
            found.gradient_checkpointing_enable()
        found.train()(windows, labels=windows, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in found.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(found.parameters()))
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@ONE_OF_EACH_KIND
def test_adapters_attach_train_and_merge(
    model: PreTrainedModel, windows: Tensor, pruned: Draw, saved: Any, logits: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install llmbo[test]")
    found = load_pruned(saved(pruned(model, "MABB-")))
    expected = logits(found, windows)
    adapted = peft.get_peft_model(found, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(logits(adapted, windows), expected)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.05)
    adapted.train()(windows, labels=windows).loss.backward()
    optimizer.step()
    trained = logits(adapted.eval(), windows)
    assert not torch.allclose(trained, expected)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "merged"), windows), trained)


@ONE_FAMILY
def test_it_is_compiled_in_one_graph_and_trained_by_a_trainer(
    model: PreTrainedModel, windows: Tensor, pruned: Draw, saved: Any, logits: Any, tmp_path: Path
) -> None:
    from transformers import Trainer, TrainingArguments  # seconds, which only this test needs

    found = load_pruned(saved(pruned(model, "MA---")), torch.float32)
    expected = logits(found, windows)
    torch.testing.assert_close(logits(torch.compile(found, backend="eager", fullgraph=True), windows), expected)
    rows = [{"input_ids": row, "labels": row} for row in windows]
    options = TrainingArguments(tmp_path / "trained", max_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[])
    trainer = Trainer(found, options, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trained = logits(found.eval(), windows)
    assert not torch.allclose(trained, expected)
    torch.testing.assert_close(logits(load_pruned(tmp_path / "trained"), windows), trained)


@ONE_FAMILY
@pytest.mark.usefixtures("fresh_processes")
def test_a_checked_export(model: PreTrainedModel, windows: Tensor, pruned: Draw, logits: Any, tmp_path: Path) -> None:
    cut = pruned(model, "ABMB-")
    expected = logits(cut.model, windows)
    check = save_hf(cut, tmp_path / "new" / "out", {"README.md": "words"}, max_shard_size="20KB")
    assert check.difference < 1e-5 and "fresh process" in check.by
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out" / "README.md").read_text() == "words"
    assert len(list((tmp_path / "new" / "out").glob("model-*-of-*.safetensors"))) > 1
    torch.testing.assert_close(logits(load_pruned(tmp_path / "new" / "out"), windows), expected, rtol=0, atol=1e-12)
    assert torch.equal(logits(cut.model, windows), expected)  # and the model in memory is what it was


@pytest.mark.usefixtures("fresh_processes")
def test_a_process_that_waits_to_read_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the export fails nor where it is killed, which ends the standard input of the one that waits."""
    before = set(psutil.Process().children())
    with pytest.raises(KeyboardInterrupt), reader("reload_hf.py"):
        (waiting,) = set(psutil.Process().children()) - before
        raise KeyboardInterrupt
    assert not waiting.is_running()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    runpy.run_path(pruning.export.reload_hf.__file__, run_name="__main__")


class Saboteur:
    """Stands in for a tokenizer: does something to the folder after the weights are written."""

    def __init__(self, act: Callable[[Path], None]) -> None:
        self.save_pretrained = lambda folder: act(Path(folder))


def _change_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].flip(0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def _interrupt(folder: Path) -> None:
    raise KeyboardInterrupt


@ONE_FAMILY
@pytest.mark.parametrize(
    ("act", "error", "says"),
    [
        (_change_a_weight, ExportFailed, "computes something else"),
        (_truncate, ExportFailed, "could not be loaded"),
        (_interrupt, KeyboardInterrupt, "^$"),
    ],
)
def test_a_failed_export_leaves_nothing(
    model: PreTrainedModel, pruned: Draw, tmp_path: Path, act: Any, error: type[BaseException], says: str
) -> None:
    cut = pruned(model, "BBBBB")
    with pytest.raises(error, match=says):
        save_hf(Pruned(cut.model, cut.anatomy, cut.architecture, Saboteur(act)), tmp_path / "out")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def _kill(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@ONE_FAMILY
def test_what_a_killed_export_leaves_is_removed_by_the_next(
    model: PreTrainedModel, pruned: Draw, tmp_path: Path
) -> None:
    """Whatever it is called, but nothing that is still being written, nor anything else."""
    cut = pruned(model, "BBBBB")
    doomed = Pruned(cut.model, cut.anatomy, cut.architecture, Saboteur(_kill))  # type: ignore[arg-type]
    child = get_context("fork").Process(target=save_hf, args=(doomed, tmp_path / "killed"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    (left,) = tmp_path.glob(".killed.*.partial")
    assert (left / "model.safetensors").exists()
    (tmp_path / ".older.abc_123x.partial").mkdir()  # as the first version called them
    (tmp_path / ".mine.partial").mkdir()
    with folder_beside(tmp_path / "live") as live:
        with folder_beside(tmp_path / "out") as folder:
            assert sorted(path.name for path in tmp_path.glob(".*.partial")) == sorted(
                [".mine.partial", live.name, folder.name]
            )
        assert live.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == [".mine.partial"]


@ONE_FAMILY
@pytest.mark.parametrize(
    ("save", "limit"),
    [(save_hf, 10_000), (save_padded, 10_000), (save_gguf, 10_000), (save_gguf, 100), (save_gguf, 44_000)],
)
def test_a_full_disk_leaves_nothing(
    model: PreTrainedModel,
    pruned: Draw,
    tmp_path: Path,
    save: Any,
    limit: int,
    files_at_most: Callable[[int], AbstractContextManager[None]],
) -> None:
    cut = pruned(model, "BBBBB")
    with (
        files_at_most(limit),
        pytest.raises(ExportFailed, match=r"(?i)file too large|os error 27|no space left"),
    ):
        save(cut, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@ONE_FAMILY
def test_what_is_there_is_not_touched(model: PreTrainedModel, pruned: Draw, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, says in (("taken", "not empty"), ("file", "is a file")):
        with pytest.raises(UnsupportedExport, match=says):
            save_hf(pruned(model, "BBBBB"), tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine", "taken"]


@ONE_FAMILY
def test_heads_that_do_not_divide_the_hidden_size(
    model: PreTrainedModel, windows: Tensor, saved: Any, logits: Any
) -> None:
    """A stock Llama config refuses three heads of a hidden size of 32, although all layers are equal."""
    wide = AutoModelForCausalLM.from_config(
        type(model.config)(**model.config.to_dict() | {"num_attention_heads": 4, "num_key_value_heads": 4})
    ).double().eval()  # fmt: skip
    anatomy = anatomy_of(wide)
    architecture = Architecture((3,) * 5, (9,) * 5)
    mask = torch.arange(4).expand(5, 4) < 3, torch.arange(24).expand(5, 24) < 9
    cut = Pruned(shrink(wide, PruningMask(*mask)), anatomy, architecture)
    found = load_pruned(saved(cut))
    torch.testing.assert_close(logits(found, windows), logits(cut.model, windows), rtol=0, atol=1e-12)
    assert padded(cut).config.num_attention_heads == 4


@ONE_FAMILY
def test_unequal_layers_need_a_class_of_transformers(model: PreTrainedModel, pruned: Draw) -> None:
    model.__class__ = type("Mine", (type(model),), {})
    cut, equal = pruned(model, "MABB-"), pruned(model, "UUU-U")
    with pytest.raises(UnsupportedExport, match=r"classes of transformers only, and it has no 'Mine'"):
        rebuilt(cut.model, cut.anatomy, cut.architecture)
    assert type(rebuilt(equal.model, equal.anatomy, equal.architecture)) is type(model)
