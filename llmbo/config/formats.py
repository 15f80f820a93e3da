"""What a trial can be exported as, and where it is to run: one row for each format and engine, from which all else follows.

Flags, messages, disk check, model card and report page go by the formats, the search space by the engines. A new format is a row here and
a writer in `pruning/export/`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmbo.errors import ConfigError, unknown

SAVES_NOTHING = "saves no memory and no time"
FOLDER_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Format:
    """One way to write a pruned model.

    Functions are named (`module:function`), not imported: the flags' help and the report page read this table without torch.

    Args:
        name: What the user types after `--format`.
        title: What comes out, in a line.
        loads_with: What loads it, Markdown.
        dtypes: Bytes per parameter on disk, by what `--dtype` may say.
        default: One of `dtypes`, or "auto" for the dtype the run measured in.
        save: Writes and reads back: `(Pruned, out, files, **options) -> Check`.
        options: What `save` takes by keyword, some of `dtype`, `name`, `max_shard_size`, `windows`, `title`, `on_layer` and `read`.
        load: For the model card, Markdown. `{path}` is the folder, `{name}` what `save` gets as `name`, `{dtype}` the dtype.
        load_unequal: Instead of `load`, where no stock class of transformers can hold the layers' sizes.
        check_type: `(model_type, Architecture)`, refuses what no model is needed to refuse; empty if there is nothing.
        check_model: `(dense model, its tokenizer, Architecture)`, refuses before anything is cut, without looking at weights.
        check_attention: `(KV groups of a dense layer, Architecture)`, refuses widths of attention; empty if there is nothing to refuse.
        saves: Whether the result is smaller and faster than the dense model. If not, it has up to as many parameters.
        checking: Bytes per parameter of what lies beside the result while it is checked.
        quantised: What `--quantize` may say, beside `recipe:FILE`; nothing where the format has no blocks.
        held: What a folder holds, `Pruned -> model`, where that has other tensors than the pruned model.
        widened: `(dense model, Architecture) -> Architecture`, where a folder is as large as that of another architecture.
    """

    name: str
    title: str
    loads_with: str
    dtypes: Mapping[str, float]
    default: str
    save: str
    options: tuple[str, ...]
    check_model: str
    load: str
    load_unequal: str = ""
    check_type: str = ""
    check_attention: str = ""
    saves: bool = True
    checking: float = 0.0
    quantised: tuple[str, ...] = ()
    held: str = ""
    widened: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """What `--dtype` may say, the default first."""
        return tuple(dict.fromkeys((self.default, *self.dtypes)))

    @property
    def description(self) -> str:
        """For the flag's help, the report page and the documentation."""
        return self.title if self.saves else f"{self.title}: {SAVES_NOTHING}"

    def flag(self, dtype: str) -> str:
        """How `llmbo export` is told to store weights so; empty where it would without."""
        kind = "dtype" if dtype in self.choices else "quantize"
        return "" if dtype == self.default else f" --{kind} {dtype}"

    def bytes_on_disk(self, dtype: str, params: int, dense_params: int) -> int:
        """What the weights take, at most.

        Args:
            params, dense_params: Parameters of the pruned and of the dense model.
        """
        coarse = (
            self.dtypes["q8_0"] if dtype in self.quantised else max(self.dtypes.values())
        )  # what rows may fall back to
        return round(self.dtypes.get(dtype, coarse) * (params if self.saves else dense_params))


def caveat(format: Format) -> str:
    """What a user of the format must know; empty for one that saves memory and time."""
    better = " or ".join(other.name for other in FORMATS.values() if other.saves)
    return "" if format.saves else f"This format {SAVES_NOTHING}: use {better} for that."


def title(model: str) -> str:
    """What a file says its model is, the same for every trial: sizes are known of what is not there yet.

    Args:
        model: The base model's name or folder.
    """
    return f"{Path(model).name}, pruned"


_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""

_WITH_CODE = _TRANSFORMERS.replace('{path}")', '{path}", trust_remote_code=True)', 1)

# The first is what the report page shows until another one is chosen.
_ROWS = (
    Format(
        name="hf",
        title="Hugging Face folder",
        loads_with="all layers equal: plain `from_pretrained`. Unequal layers: `trust_remote_code=True`, transformers ≥ 5.15",
        dtypes=FOLDER_DTYPES,
        default="auto",
        save="pruning.export:save_hf",
        options=("max_shard_size", "read"),
        check_model="pruning.export.hf:check_hf",
        load=_TRANSFORMERS,
        load_unequal=f"""{_WITH_CODE}

Its layers differ in size, which no stock class of transformers can hold: `modeling_pruned.py` in this folder does (transformers >= 5.15).
`per_layer_config` in `config.json` tells the sizes.""",
    ),
    Format(
        name="gguf",
        title="GGUF file for llama.cpp, with tokenizer and chat template",
        loads_with="llama.cpp, llama-cpp-python and what builds on them",
        dtypes={"f16": 2, "bf16": 2, "q8_0": 1.0625, "f32": 4},
        default="f16",
        save="pruning.export:save_gguf",
        options=("dtype", "name", "windows", "title", "on_layer"),
        load="""```python
from llama_cpp import Llama

model = Llama("{path}/{name}-{dtype}.gguf")
```

or, on the command line, `llama-cli --model {path}/{name}-{dtype}.gguf`.""",
        check_type="pruning.export.gguf_file:gguf_architecture",
        check_model="pruning.export.llama_cpp:check_model",
        checking=2,  # what f16 and f32 are coarser than is checked by an f16 twin
        quantised=("q8_0", "q6_k", "q5_k_m", "q5_0", "q4_k_m", "q4_0"),
    ),
    Format(
        name="vllm",
        title="folder for vLLM, attention whole or absent in each layer",
        loads_with="vLLM (`--trust-remote-code`, for the config's class), and transformers with `trust_remote_code=True`",
        dtypes=FOLDER_DTYPES,
        default="auto",
        save="pruning.export:save_vllm",
        options=("max_shard_size", "read"),
        load=f"""{_WITH_CODE}

or, in vLLM, `vllm serve {{path}} --trust-remote-code`: the model's class is vLLM's own (`DeciLMForCausalLM`), that of its config is in
`modeling_decilm.py`.""",
        check_type="pruning.export.vllm:check_type",
        check_attention="pruning.export.vllm:check_attention",
        check_model="pruning.export.vllm:check_vllm",
        held="pruning.export.vllm:decilm",
    ),
    Format(
        name="padded",
        title="stock Hugging Face folder, every layer padded with zeros to the widest",
        loads_with="plain `from_pretrained`, in tools that know no other shape",
        dtypes=FOLDER_DTYPES,
        default="auto",
        save="pruning.export:save_padded",
        options=("max_shard_size", "read"),
        check_model="pruning.export.hf:check_padded",
        load=_TRANSFORMERS,
        saves=False,
        widened="pruning.export.hf:widest",
    ),
)
FORMATS = {row.name: row for row in _ROWS}


@dataclass(frozen=True)
class Engine:
    """Where pruned models are to run: a search for it finds nothing that it cannot run.

    Args:
        name: What the user types after `--deploy`.
        title: What it is, in a line.
        format: What to export for it, a name in `FORMATS`, which brings weights, writer and check.
        all_heads: Families by `model_type` whose layers must keep all of their heads or none. "*" stands for every family.
        equal_layers: Whether all layers must have the same size.
        check_model: Instead of the format's.
    """

    name: str
    title: str
    format: str
    all_heads: tuple[str, ...] = ()
    equal_layers: bool = False
    check_model: str = ""

    @property
    def check(self) -> str:
        """`(dense model, its tokenizer, Architecture)`, as `Format.check_model`."""
        return self.check_model or FORMATS[self.format].check_model

    def needs_all_heads(self, model_type: str) -> bool:
        return bool({"*", model_type} & {*self.all_heads})


_ENGINES = (
    Engine("hf", "transformers, with the modelling file that is exported along", "hf"),
    Engine(
        "hf-stock",
        "whatever loads transformers' own classes: equal layers, no code",
        "hf",
        all_heads=("gpt2", "gpt_neox", "opt"),
        equal_layers=True,
        check_model="pruning.export.hf:check_stock",
    ),
    Engine("llama.cpp", "llama.cpp and what builds on it", "gguf", all_heads=("gpt2", "gpt_neox")),
    Engine("vllm", "vLLM: Llama-like families, attention whole or absent", "vllm", all_heads=("*",)),
    Engine(
        "vllm-transformers",
        "vLLM's Transformers backend: more families, any number of heads in each layer",
        "hf",
        check_model="pruning.export.vllm:check_backend",
    ),
)
ENGINES = {row.name: row for row in _ENGINES}


def engines_help() -> str:
    """All rows, for `--help`."""
    return "; ".join(f"{row.name}: {row.title}" for row in ENGINES.values())


def engines_of(names: Sequence[str]) -> tuple[Engine, ...]:
    """Rows by name.

    Raises:
        ConfigError: A name is unknown, or given twice.
    """
    for name in names:
        if name not in ENGINES:
            raise ConfigError(unknown("--deploy", name, ENGINES))
        if names.count(name) > 1:
            raise ConfigError(f"--deploy {name} is given twice: keep one.")
    return tuple(ENGINES[name] for name in names)


FILE_TYPE = "f16"  # of the files whose size is counted, where nothing else is said


def counted_types() -> tuple[str, ...]:
    """What files `file_bytes` can count."""
    row = FORMATS["gguf"]
    return tuple(dict.fromkeys((*row.dtypes, *row.quantised)))
