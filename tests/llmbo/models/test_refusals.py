"""Models that must not be pruned, measured or trained: one line that says why, before any work; and what looks alike but is fine."""

import json
import re
import shutil
import signal
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    XLNetConfig,
)
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.display.progress import JsonLines
from llmbo.errors import ModelError
from llmbo.models import loading
from llmbo.models.loading import adopt_model, load_model

Damage = Callable[[Path], None]
UP = "model.layers.1.mlp.up_proj.weight"
NARROW = "model.layers.2.mlp.up_proj.weight"  # in the exported model


def config(**changes: Any) -> Damage:
    """Other entries of the config."""

    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def replaced(name: str, content: str | bytes) -> Damage:
    """A file of other content."""

    def write(folder: Path) -> None:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def without(*names: str) -> Damage:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def weights(change: Callable[[dict[str, Tensor]], Any], file: str = "model.safetensors") -> Damage:
    """Other tensors in the file."""

    def edit(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, {"format": "pt"})

    return edit


def more(**tensors: Tensor) -> Damage:
    """Tensors added; a dot is written as two underscores."""
    return weights(lambda own: own.update({name.replace("__", "."): tensor for name, tensor in tensors.items()}))


def sharded(change: Damage) -> Damage:
    """The weights in several files, and then something happens to them."""

    def split(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="20KB")
        change(folder)

    return split


def shard_of(folder: Path) -> Path:
    """The file that holds `UP`."""
    return folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][UP]


def emptied(folder: Path) -> None:
    """The index names a tensor that its shard does not have."""
    tensors = load_file(shard_of(folder))
    del tensors[UP]
    save_file(tensors, shard_of(folder), {"format": "pt"})


def cut_off(folder: Path) -> None:
    """A download that was interrupted."""
    replaced("model.safetensors", (folder / "model.safetensors").read_bytes()[:5000])(folder)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def in_fp8(folder: Path) -> None:
    """As transformers and DeepSeek store it, one scale for each block."""

    def narrow(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj." in name]:
            scale = tensors[name].abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.view(1, 1)

    weights(narrow)(folder)
    quantised(quant_method="fp8", activation_scheme="dynamic", weight_block_size=[32, 32])(folder)


def in_integers(tensors: dict[str, Tensor]) -> None:
    """As a program stores it that quantises and tells nobody."""
    tensors[UP] = (tensors[UP] * 127 / tensors[UP].abs().max()).to(torch.int8)


def both(*damages: Damage) -> Damage:
    def run(folder: Path) -> None:
        for damage in damages:
            damage(folder)

    return run


def of_kind(other: Any) -> Damage:
    """The config of another kind of model; its weights are not even looked at."""
    return lambda folder: other.save_pretrained(folder)


def quantised(**settings: Any) -> Damage:
    return config(quantization_config=settings)


def spoilt(value: float) -> Damage:
    return weights(lambda tensors: tensors[UP].view(-1)[5].fill_(value))


TINY: dict[str, Any] = {
    "vocab_size": 62, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
ADAPTER = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"})
OWN_TOKENIZER = json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.T", None]}})
WORDY = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "model_max_length": "x"}
CARD = replaced("README.md", "---\nbase_model: org/full-precision\n---\n# Smaller\n")

# name -> what is done to a sound folder, what the line says
REFUSED: dict[str, tuple[Damage, str]] = {
    "weights: one is missing": (weights(lambda t: t.pop(UP)), rf"missing: {UP}\)"),
    "weights: many are missing": (weights(lambda t: [t.pop(key) for key in list(t) if ".mlp." in key]),
        r"missing: .*layers\.0\.mlp.* and 9 more"),
    "weights: no head": (weights(lambda t: t.pop("lm_head.weight")), r"missing: lm_head\.weight"),
    "weights: none": (weights(lambda t: t.clear()), r"missing: .* and 36 more"),
    "weights: fewer layers than the config says": (config(num_hidden_layers=6), r"missing: .*layers\.4"),
    "weights: more layers than the config says": (config(num_hidden_layers=3), r"beyond it: .*layers\.3"),
    "weights: an adapter's among them": (more(model__layers__1__mlp__up_proj__lora_A__weight=torch.ones(2, 32)), r"beyond it: .*lora_A"),
    "weights: a reward head": (more(score__weight=torch.ones(1, 32)), r"beyond it: score\.weight"),
    "weights: another shape": (weights(lambda t: t.update({UP: torch.ones(23, 32)})),
        rf"of another shape: {UP}: 23 x 32, not 24 x 32"),
    "weights: another vocabulary": (more(model__embed_tokens__weight=torch.zeros(70, 32)),
        r"of another shape: .*embed_tokens.*70 x 32, not 62 x 32"),
    "weights: a missing shard": (sharded(lambda folder: shard_of(folder).unlink()), r"model-0000\d-of"),
    "weights: a shard without its tensor": (sharded(emptied), rf"missing: {UP}\)"),
    "weights: a damaged index": (sharded(replaced("model.safetensors.index.json", "{")), "whole copy"),
    "weights: cut off": (cut_off, "deserializing header"),
    "weights: NaN": (spoilt(float("nan")), rf"NaN \({UP}\)"),
    "weights: infinite": (spoilt(float("-inf")), rf"infinite.*{UP}"),
    "weights: pickled with code": (
        both(without("model.safetensors"), replaced("pytorch_model.bin", b"cos\nsystem\n(S'touch ran'\ntR.")), r"pickle.*safetensors"
    ),
    "weights: a head of its own though tied": (config(tie_word_embeddings=True),
        r"tie_word_embeddings.*lm_head\.weight.*false"),
    "weights: integers": (weights(in_integers), rf"stored in I8 \({UP}\).*full-precision"),
    "weights: integers in a shard": (
        sharded(lambda folder: weights(in_integers, shard_of(folder).name)(folder)), rf"stored in I8 \({UP}\).*full-precision"
    ),
    "weights: bytes": (weights(lambda t: t.update({UP: t[UP].to(torch.uint8)})), rf"stored in U8 \({UP}\)"),
    "weights: yes and no": (weights(lambda t: t.update({UP: t[UP] > 0})), rf"stored in BOOL \({UP}\)"),
    "weights: complex numbers": (weights(lambda t: t.update({UP: t[UP].to(torch.complex64)})), rf"stored in C64 \({UP}\)"),
    "quantised: GPTQ": (both(quantised(quant_method="gptq", bits=4, group_size=32, desc_act=False), CARD),
        r"gptq.*org/full-precision"),
    "quantised: AWQ": (quantised(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True), r"awq.*full-precision"),
    "quantised: bitsandbytes, 4 bits": (quantised(quant_method="bitsandbytes", load_in_4bit=True), r"bitsandbytes.*full-precision"),
    "quantised: bitsandbytes, 8 bits, old": (quantised(load_in_8bit=True), r"quantised.*full-precision"),
    "quantised: compressed-tensors": (quantised(quant_method="compressed-tensors", config_groups={}, format="pack-quantized"),
        r"compressed-tensors.*full-precision"),
    "quantised: compressed-tensors, old": (config(compression_config={"quant_method": "compressed-tensors"}),
        r"compressed-tensors.*full-precision"),
    "quantised: unknown": (quantised(quant_method="tomorrow"), r"tomorrow.*full-precision"),
    "quantised: empty": (quantised(), r"quantised.*full-precision"),
    "quantised: damaged": (config(quantization_config=["gptq"]), r"quantised.*full-precision"),
    "quantised: fp8, damaged": (quantised(quant_method="fp8", weight_block_size=7), r"fp8"),
    "quantised: fp8, a scale is missing": (both(in_fp8, weights(lambda t: t.pop(f"{UP}_scale_inv"))), rf"scale.*\({UP}\)"),
    "quantised: fp8, all scales are missing": (
        both(in_fp8, weights(lambda t: [t.pop(key) for key in list(t) if key.endswith("_scale_inv")])), r"scale.* and 25 more"
    ),
    "kind: BERT": (of_kind(BertConfig(**TINY)), r"bert.*causal"),
    "kind: T5": (of_kind(T5Config(vocab_size=62, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)), r"\(t5\).*encoder-decoder"),
    "kind: BART": (of_kind(BartConfig(vocab_size=62, d_model=8)), r"\(bart\).*encoder-decoder"),
    "kind: XLNet": (of_kind(XLNetConfig(vocab_size=62, d_model=8, n_layer=1, n_head=2)), r"xlnet.*causal"),
    "kind: an embedding Gemma": (
        of_kind(Gemma3TextConfig(**TINY, head_dim=8, num_key_value_heads=1, use_bidirectional_attention=True)), r"gemma3_text.*causal"
    ),
    "kind: of tomorrow": (config(model_type="tomorrow"), r"tomorrow"),
    "code: of the model": (config(model_type="tomorrow", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
        r"its own code"),
    "config: missing": (without("config.json"), r"config\.json"),
    "config: empty": (replaced("config.json", ""), r"config"),
    "config: cut off": (replaced("config.json", '{"model_type": "lla'), r"config"),
    "config: null": (replaced("config.json", "null"), r"config\.json.*null"),
    "config: a list": (replaced("config.json", "[1]"), r"config\.json.*list"),
    "config: a number": (replaced("config.json", "7"), r"config\.json.*number"),
    "config: no text": (replaced("config.json", b"\xff\xfe\x00"), r"config"),
    "config: sizes that are words": (config(hidden_size="32"), r"hidden_size"),
    "config: sizes that are null": (config(hidden_size=None), r"hidden_size"),
    "config: model_type null": (config(model_type=None), r"model_type"),
    "config: model_type a list": (config(model_type=["llama"]), r"model_type"),
    "config: no layers": (config(num_hidden_layers=0), r"num_hidden_layers.*0"),
    "config: fewer than no layers": (config(num_hidden_layers=-1), r"num_hidden_layers.*-1"),
    "config: no heads": (config(num_attention_heads=0), r"num_attention_heads.*0"),
    "config: no KV heads": (config(num_key_value_heads=0), r"num_key_value_heads.*0"),
    "config: KV heads that do not divide": (config(num_key_value_heads=3), r"num_attention_heads.*4.*num_key_value_heads.*3"),
    "config: heads that do not divide": (config(num_attention_heads=5), r"5"),
    "config: no neurons": (config(intermediate_size=0), r"intermediate_size.*0"),
    "config: no vocabulary": (config(vocab_size=0), r"vocab_size.*0"),
    "config: rope of the wrong type": (config(rope_scaling="yarn", rope_parameters="yarn"), r"rope"),
    "tokenizer: missing": (without("tokenizer.json", "tokenizer_config.json"), r"tokenizer"),
    "tokenizer: its words are missing": (without("tokenizer.json"), r"tokenizer"),
    "tokenizer: cut off": (replaced("tokenizer.json", '{"version": "1.0", "mod'), r"tokenizer"),
    "tokenizer: empty": (replaced("tokenizer.json", "{}"), r"tokenizer"),
    "tokenizer: null": (replaced("tokenizer_config.json", "null"), r"tokenizer"),
    "tokenizer: a length that is a word": (replaced("tokenizer_config.json", json.dumps(WORDY)), r"model_max_length 'x'.*number"),
    "tokenizer: its own code": (both(without("tokenizer.json"), replaced("tokenizer_config.json", OWN_TOKENIZER)), r"its own code"),
    "adapter: alone": (both(without("config.json", "model.safetensors"), replaced("adapter_config.json", ADAPTER)),
        r"adapter.*some/base.*merge"),
    "adapter: beside a model": (replaced("adapter_config.json", ADAPTER), r"adapter.*some/base.*merge"),
    "adapter: damaged": (both(without("config.json"), replaced("adapter_config.json", "[")), r"adapter.*merge"),
}  # fmt: skip


# What looks like a fault and is none.
ACCEPTED: dict[str, Damage] = {
    "tied embeddings without a head": both(weights(lambda t: t.pop("lm_head.weight")), config(tie_word_embeddings=True)),
    "tied embeddings and the head": both(
        config(tie_word_embeddings=True), weights(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0}))
    ),
    "buffers of older versions": more(
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4), model__layers__0__attn__masked_bias=torch.ones(1)
    ),
    "several files": sharded(lambda folder: None),
    "integers that are no weights": more(model__layers__0__attn__masked_bias=torch.ones(1, dtype=torch.int8)),
    "return_dict false": config(return_dict=False),
    "half precision": weights(lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()})),
    "weights pickled without code": pickled,
    "quantization_config null": config(quantization_config=None),
    "code that nobody needs": config(auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}),
    "a smaller tokenizer": both(
        config(vocab_size=64), more(model__embed_tokens__weight=torch.ones(64, 32), lm_head__weight=torch.ones(64, 32))
    ),
}  # fmt: skip


def invoke(folder: Path, *words: object, **options: Any) -> Result:
    """A command in `folder`, in this process."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with chdir(folder):
            return CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "200"}, **options)
    finally:
        signal.signal(signal.SIGTERM, before)


def refusal(result: Result) -> str:
    """The one line that a command ended with."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and "[y/N]" not in result.output
    (line,) = [line for line in result.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith("error: ")
    return line


@pytest.fixture
def damaged(model_folder: Path, tmp_path: Path) -> Callable[[Damage], Path]:
    """A copy of the tiny llama to which something happens. `code.py` beside the weights leaves a file `ran` behind if it is run."""

    def copy(damage: Damage) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
        damage(folder)
        return folder

    return copy


@pytest.fixture
def commands(text_file: Path) -> dict[str, tuple[object, ...]]:
    """Commands that load a model, up to its name."""
    text = ("--device", "cpu", "--text", f"text:{text_file}", "--window", 16)
    tokens = ("--calibration-tokens", 64, "--proxy-tokens", 64, "--heldout-tokens", 64)
    return {
        "optimize": (
            "optimize",
            "--budget",
            2,
            *text,
            *tokens,
            "--heldout-text",
            "none",
            "--name",
            "run",
            "--quiet",
            "--model",
        ),
        "evaluate": ("evaluate", *text, "--tokens", 200),
        "recover": ("recover", "--out", "small", *text, "--steps", 1),
    }


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_model_is_refused_in_one_line(
    name: str, damaged: Callable[[Damage], Path], commands: dict[str, Any], tmp_path: Path
) -> None:
    damage, said = REFUSED[name]
    folder = damaged(damage)
    for command in commands.values():
        line = refusal(invoke(tmp_path, *command, folder, input="y\ny\n"))
        assert str(folder) in line and re.search(said, line), line
    assert not [path for path in tmp_path.rglob("*") if path.name in ("ran", "small", "study.db")]


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_no_fault_is_loaded(name: str, damaged: Callable[[Damage], Path], tmp_path: Path) -> None:
    folder = damaged(ACCEPTED[name])
    loaded = load_model(str(folder), "float32", "cpu")
    assert loaded.notes == () and loaded.model.num_parameters() > 0
    assert bool(loaded.model(torch.ones(1, 4, dtype=torch.long)).logits.isfinite().all())
    assert not (tmp_path / "ran").exists()


def test_fp8_is_dequantised_and_says_so(
    damaged: Callable[[Damage], Path], commands: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    folder = damaged(in_fp8)
    loaded, dense = (load_model(str(place), "float32", "cpu") for place in (folder, model_folder))
    half = load_model(str(folder), "bfloat16", "cpu")
    for found, dtype in ((loaded, torch.float32), (half, torch.bfloat16)):
        assert {weight.dtype for weight in found.model.parameters()} == {dtype}
    for name, weight in dense.model.named_parameters():
        torch.testing.assert_close(loaded.model.get_parameter(name), weight, rtol=0.07, atol=0.01)
    assert re.search(r"stored in fp8 and dequantised", *loaded.notes)
    assert "quantization_config" not in loaded.model.config.to_dict()  # nor in what is exported
    with pytest.raises(ModelError, match=rf"'{folder}' are dequantised .* cannot be mapped: use --offload cpu"):
        load_model(str(folder), "float32", "cpu", "disk")
    assert "dequantised" in invoke(tmp_path, *commands["evaluate"], folder).output
    told = [word for word in commands["optimize"] if word != "--quiet"]
    result = invoke(tmp_path, *told, folder, "--dtype", "bfloat16")
    assert result.exit_code == 0 and "dequantised" in result.output


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (weights(lambda t: t.pop(NARROW)), rf"missing: {NARROW}"),
        (more(model__layers__2__self_attn__q_proj__weight=torch.ones(8, 32)), r"beyond it: .*layers\.2\.self_attn"),
        (weights(lambda t: t.update({NARROW: torch.ones(8, 32)})), rf"of another shape: {NARROW}: 8 x 32, not 7 x 32"),
        (weights(lambda t: t[NARROW].fill_(torch.nan)), rf"NaN \({NARROW}\)"),
        (config(pruned_blocks=None), r"whole copy"),
        (config(pruned_values={}), r"whole copy"),
        (config(architectures=["Nothing"]), r"whole copy"),
        (config(architectures=[]), r"whole copy"),
    ],
    ids=["missing", "extra", "shape", "nan", "no places", "no widths", "no class", "no architecture"],
)
def test_a_damaged_export_is_refused(
    damage: Damage, said: str, exported: Path, commands: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(exported, folder)
    damage(folder)
    for command in ("evaluate", "recover"):
        line = refusal(invoke(tmp_path, *commands[command], folder))
        assert str(folder) in line and re.search(said, line), line


def test_what_is_pruned_is_not_pruned_again(exported: Path, commands: dict[str, Any], tmp_path: Path) -> None:
    assert "pruned already" in refusal(invoke(tmp_path, *commands["optimize"], exported, input="y\n"))
    assert invoke(tmp_path, *commands["evaluate"], exported).exit_code == 0


def test_no_command_runs_foreign_code_or_asks(
    damaged: Callable[[Damage], Path], finished: Any, commands: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    """The other commands that load a model; `test_a_bad_model_is_refused_in_one_line` has the first three."""
    foreign = damaged(REFUSED["code: of the model"][0])
    run = finished.folder / "runs" / "tiny"
    for words in (
        ("profile", "--latency-target", "cpu", "--model", foreign),
        ("export", run, "--trial", 0, "--format", "hf", "--out", "small", "--model", foreign),
        ("rerank", run, "--model", foreign),
        (*commands["recover"], model_folder, "--distil", "--teacher", foreign),
        (*commands["optimize"], model_folder, "--advisor", f"transformers:{foreign}"),
    ):
        assert "its own code" in refusal(invoke(tmp_path, *words, input="y\ny\n"))
    assert not [path for path in tmp_path.rglob("*") if path.name in ("ran", "small", "study.db")]


def test_foreign_code_runs_when_the_option_was_typed(
    damaged: Callable[[Damage], Path], commands: dict[str, Any], tmp_path: Path
) -> None:
    foreign = damaged(REFUSED["code: of the model"][0])
    line = refusal(invoke(tmp_path, *commands["evaluate"], foreign, "--trust-remote-code"))
    assert (tmp_path / "ran").exists() and "has no attribute 'C'" in line  # it holds nothing else


def test_an_advisor_that_is_not_there_is_refused_before_any_work(
    commands: dict[str, Any], model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llmbo[local-advisor]'")
    result = invoke(tmp_path, *commands["optimize"], model_folder, "--advisor", "transformers:./nope")
    assert "'./nope'" in refusal(result) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda model: model.get_parameter(UP).data[0].fill_(torch.nan), rf"NaN \({UP}\)"),
        (lambda model: setattr(model.config, "is_causal", False), "no causal language model"),
        (lambda model: setattr(model.config, "quantization_config", {"quant_method": "hqq"}), r"quantised \(hqq\)"),
    ],
    ids=["nan", "encoder", "quantised"],
)
def test_a_loaded_model_obeys_the_same_rules(
    change: Callable[[PreTrainedModel], Any], said: str, model_folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    change(model)
    with pytest.raises(ModelError, match=said):
        adopt_model(model, AutoTokenizer.from_pretrained(model_folder))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_not_called_a_damaged_copy(
    error: Exception, model_folder: Path, commands: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", fail)
    for command in ("optimize", "recover"):
        assert refusal(invoke(tmp_path, *commands[command], model_folder)).startswith("error: Out of memory: free some")


@pytest.fixture
def with_new_tokens(damaged: Callable[[Damage], Path]) -> Path:
    """A fine-tuner added two tokens to the tokenizer and forgot the embedding."""
    folder = damaged(lambda folder: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["optimize", "evaluate", "recover"])
def test_a_text_with_tokens_that_the_embedding_does_not_have(
    command: str, with_new_tokens: Path, commands: dict[str, Any], tmp_path: Path
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("w1 w2 <tool> w3 </tool> w4 w5 " * 200)
    words = [f"text:{text}" if str(word).startswith("text:") else word for word in commands[command]]
    line = refusal(invoke(tmp_path, *words, with_new_tokens))
    assert str(with_new_tokens) in line and "64 tokens" in line and "62 rows" in line
    assert invoke(tmp_path, *commands[command], with_new_tokens).exit_code == 0  # a text without them, as with Gemma 3


@pytest.fixture(scope="module")
def massive(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One channel overflows float16, as in Gemma 3. Multi-query attention."""
    folder = tmp_path_factory.mktemp("massive") / "model"
    shutil.copytree(model_folder, folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**TINY, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, bos_token_id=1, eos_token_id=None)
        )  # fmt: skip
    model.model.layers[0].post_feedforward_layernorm.weight.data[7] = 6e4
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def our_words(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a Gemma AutoTokenizer takes Gemma's own tokenizer, whatever the folder says, and it has no words of ours."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer)


@pytest.mark.usefixtures("our_words")
def test_numbers_that_overflow_the_dtype_are_said_after_the_first_pass(
    massive: Path, commands: dict[str, Any], tmp_path: Path
) -> None:
    for command in ("optimize", "evaluate"):
        for more in ((), ("--no-compensation",)) if command == "optimize" else ((),):
            line = refusal(invoke(tmp_path, *commands[command], massive, "--dtype", "float16", *more))
            assert str(massive) in line and "in float16: try --dtype bfloat16 or float32" in line
    assert not list(tmp_path.rglob("study.db"))
    assert invoke(tmp_path, *commands["evaluate"], massive, "--dtype", "bfloat16").exit_code == 0
    shutil.copytree(massive, tmp_path / "wide")
    weights(lambda tensors: tensors[UP].fill_(1e5))(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"infinite values.*may not fit float16: try --dtype bfloat16 or float32"):
        load_model(str(tmp_path / "wide"), "float16", "cpu")


@pytest.mark.usefixtures("our_words")
def test_attention_of_one_head_is_said_to_stay_whole(
    model_folder: Path, commands: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**TINY | {"num_attention_heads": 1}, num_key_value_heads=1)
        LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    told = [word for word in commands["optimize"] if word != "--quiet"]
    result = invoke(tmp_path, *told, tmp_path / "model", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stderr.splitlines() if "has one head in a layer" in line]
    assert line.startswith("note: ") and result.stderr.index(line) < result.stderr.index("importance")
    events: list[str] = []
    JsonLines(events.append).noted(line)
    assert json.loads(events[0])["text"] == line


def test_one_table_has_one_dtype(
    model_folder: Path, exported: Path, commands: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock decides, and may decide otherwise each time it is asked."""
    answers = iter(("float32", "bfloat16", "float32"))
    monkeypatch.setattr(
        "llmbo.evaluation.table.choose_dtype", lambda dtype, *rest: next(answers) if dtype == "auto" else dtype
    )
    result = invoke(tmp_path, *commands["evaluate"], model_folder, exported, model_folder, "--json", "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["dtype"] for line in lines] == ["float32"] * 3
    assert "everything is measured in float32" in result.stderr
