"""Tiny random decoders and seeded sub-networks of them, shared by all tests. Nothing is downloaded.

Everything is a fixture: tests are collected with `--import-mode=importlib` and cannot import from here.
"""

import copy
import functools
import gc
import io
import json
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    dynamic_module_utils,
)

import pruning.export.reader
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.importance import within_groups
from pruning.masks import PruningMask, Ranking
from pruning.text import read_text

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # logits far from uniform, or every law would hold for every mask
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MHA = {name: size for name, size in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
WINDOW = 6  # of sliding attention, shorter than the test windows
PROSE, TRAINING_STEPS, TRAINING_RATE = 32, 70, 1e-2  # characters in a window; it ends at about 2.5 nats
FULL, SLIDING = "full_attention", "sliding_attention"

SLIDES = [SLIDING, SLIDING, FULL, SLIDING, FULL]
MIXED: dict[str, Any] = {"sliding_window": WINDOW, "layer_types": SLIDES}
UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def of(kind: str, sizes: Mapping[str, Any] = SIZES, **own: Any) -> Callable[[], PreTrainedConfig]:
    """A config of this `model_type`, of which many are imported only when they are asked for."""
    return lambda: CONFIG_MAPPING[kind](**sizes, **own)


# One row per structure that families have; a row added here joins every test that takes `model`.
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-biased": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-tied": lambda: LlamaConfig(**SIZES | {"tie_word_embeddings": True}),
    "qwen2-sliding": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, layer_types=[FULL, SLIDING, SLIDING, FULL, SLIDING]
    ),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma2": lambda: Gemma2Config(
        **SIZES | {"tie_word_embeddings": True}, sliding_window=WINDOW, query_pre_attn_scalar=8,
        final_logit_softcapping=20.0, attn_logit_softcapping=5.0,
    ),
    "phi3": lambda: Phi3Config(**SIZES, sliding_window=WINDOW),
    "gpt-neox": lambda: GPTNeoXConfig(**MHA),
    "gpt-neox-sequential": lambda: GPTNeoXConfig(**MHA, use_parallel_residual=False, attention_bias=False),
    "gpt2": lambda: GPT2Config(**MHA | {"tie_word_embeddings": True}, n_inner=24, **UNDROPPED),
    "opt": lambda: OPTConfig(
        **MHA | {"tie_word_embeddings": True}, ffn_dim=24, word_embed_proj_dim=32, init_std=0.3, dropout=0.0
    ),
    "cohere2": of("cohere2", SIZES | {"tie_word_embeddings": True}, logit_scale=0.25, **MIXED),
    "granite": of(
        "granite", residual_multiplier=0.5, logits_scaling=2.0, embedding_multiplier=3.0, attention_multiplier=0.3
    ),
    "exaone4": of("exaone4", **MIXED),
}  # fmt: skip

# Families built like one of those, and variants: a row here joins `test_lookalikes.py`, and tests that name it.
LOOKALIKES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-mha": lambda: LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "gemma3-mqa": lambda: Gemma3TextConfig(
        **SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 1}, query_pre_attn_scalar=8, **MIXED
    ),
    "gemma3": lambda: Gemma3TextConfig(**SIZES | {"tie_word_embeddings": True}, query_pre_attn_scalar=8, **MIXED),
    "apertus": of("apertus"),
    "arcee": of("arcee"),
    "biogpt": of("biogpt", MHA, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layerdrop=0.0),
    "cohere": of("cohere", logit_scale=0.25),
    "cwm": of("cwm", rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **MIXED),
    "ernie4_5": of("ernie4_5", use_bias=True),
    "gemma": of("gemma"),
    "glm": of("glm", attention_bias=True),
    "glm4": of("glm4"),
    "gpt_bigcode": of("gpt_bigcode", MHA, n_inner=24, **UNDROPPED),
    "gptj": of("gptj", MHA, n_inner=24, rotary_dim=4, **UNDROPPED),
    "helium": of("helium"),
    "hunyuan_v1_dense": of("hunyuan_v1_dense"),
    "hyperclovax": of("hyperclovax", residual_multiplier=0.5, logits_scaling=4.0, use_post_norm=True),
    "hyperclovax-plain": of("hyperclovax", use_post_norm=False),
    "internlm3": of("internlm3"),
    "iquestcoder": of("iquestcoder"),
    "jais2": of("jais2"),
    "ministral": of("ministral", **MIXED),
    "ministral3": of("ministral3"),
    "nanochat": of("nanochat"),
    "nemotron": of("nemotron"),
    "olmo": of("olmo", clip_qkv=1.0),
    "olmo2": of("olmo2"),
    "olmo3": of("olmo3", **MIXED),
    "phi": of("phi", **UNDROPPED),
    "phi-normed": of("phi", qk_layernorm=True, **UNDROPPED),
    "seed_oss": of("seed_oss", attention_bias=True, residual_dropout=0.0),
    "smollm3": of("smollm3", no_rope_layers=[1, 0, 1, 1, 0]),
    "stablelm": of("stablelm", use_qkv_bias=True),
    "starcoder2": of(
        "starcoder2", sliding_window=WINDOW, residual_dropout=0.0, embedding_dropout=0.0, attention_dropout=0.0
    ),
    "vaultgemma": of("vaultgemma", query_pre_attn_scalar=8, **MIXED),
    "xglm": of(
        "xglm", MHA, ffn_dim=24, init_std=0.3, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0
    ),
}


# The first row of every family, by `model_type`.
FAMILIES: dict[str, str] = {}
for _name, _make in CONFIGS.items():
    FAMILIES.setdefault(_make().model_type, _name)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # the models are too small to share
    gc.freeze()  # a million objects of libraries are not looked through again and again for garbage: half a second each time


# A fork's first `set_num_threads` throws away the thread pool it inherited, and two threads that do so at once (weights are read
# by several) can find none: "Invalid thread pool!", once in thousands of forks. So it is done before there are threads.
os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def forked(body: Callable[[], object]) -> tuple[int, str]:
    """Run `body` in a fork of this process: where the start of a new one is not what is tested, its four seconds of imports are saved.

    Returns:
        Exit code, and what it wrote to its stderr.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(writing, 2)
            code = int(body() or 0)  # type: ignore[call-overload]
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8", errors="replace") as said:
        stderr = said.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stderr


def forked_apart(body: Callable[[], object], modules_cache: str) -> tuple[int, str]:
    """As `forked`, but nothing of this project can be imported, and code that comes with models goes to `modules_cache`."""

    def apart() -> object:
        own = ("llmbo", "prompts", "pruning")
        for name in list(sys.modules):
            if name.partition(".")[0] in (*own, "transformers_modules"):
                del sys.modules[name]
        sys.modules.update(dict.fromkeys(own))
        dynamic_module_utils.HF_MODULES_CACHE = modules_cache
        return body()

    return forked(apart)


@pytest.fixture
def apart() -> Callable[[Callable[[], object], str], tuple[int, str]]:
    return forked_apart


@dataclass
class _Forked:
    """What is asked of a `subprocess.Popen` of `reload_hf.py`: a folder is read back in a fork that knows nothing of this project."""

    program: str
    env: Mapping[str, str]
    stdin: io.StringIO = field(default_factory=io.StringIO)
    returncode: int | None = None

    def communicate(self) -> tuple[None, str]:
        arguments = json.loads(self.stdin.getvalue())
        main = lambda: runpy.run_path(self.program)["main"](*arguments)  # noqa: E731
        self.returncode, stderr = forked_apart(main, self.env["HF_MODULES_CACHE"])
        return None, stderr

    def kill(self) -> None:
        """It has ended."""


def _popen(command: Sequence[str], *, env: Mapping[str, str], **options: Any) -> Any:
    program = command[-1]
    if not program.endswith("reload_hf.py"):
        return subprocess.Popen(command, env=env, **options)
    return nullcontext(_Forked(program, env))


@pytest.fixture(scope="session", autouse=True)
def _read_back_in_a_fork() -> Iterator[None]:
    replaced = SimpleNamespace(Popen=_popen, PIPE=subprocess.PIPE, DEVNULL=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning.export.reader, "subprocess", replaced)
        yield


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is read back as it is for users, by a new Python, which takes four seconds to import what it needs."""
    monkeypatch.setattr(pruning.export.reader, "subprocess", subprocess)


@pytest.fixture(scope="session", autouse=True)
def _prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests prepare is kept for other tests, and not among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMBO_PREPARED", str(tmp_path_factory.mktemp("prepared")))
        yield


@functools.cache
def _template(name: str) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config((CONFIGS | LOOKALIKES)[name]()).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # biases start at zero and norms at one: make them matter
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.fixture
def build() -> Callable[[str], PreTrainedModel]:
    """Row name of `CONFIGS` or `LOOKALIKES` -> a float64 model of one's own; equal names give equal weights."""
    return lambda name: copy.deepcopy(_template(name))


@pytest.fixture(scope="session")
def prose() -> Callable[[int, int], Tensor]:
    """(number, seed) -> `number x PROSE` ids of the characters of English text, windows drawn at random."""
    ids = torch.frombuffer(bytearray(read_text("builtin").content, "ascii", "replace"), dtype=torch.uint8).long()
    ids = (ids - 31).clamp(1, SIZES["vocab_size"] - 1)  # 0 pads

    def draw(number: int, seed: int) -> Tensor:
        starts = torch.randint(len(ids) - PROSE, (number, 1), generator=torch.Generator().manual_seed(seed))
        return ids[starts + torch.arange(PROSE)]

    return draw


@pytest.fixture(scope="session")
def trained(prose: Callable[[int, int], Tensor]) -> Callable[[str], PreTrainedModel]:
    """As `build`, a float32 model that has learnt from prose for a second: what random weights do hides faults.

    Equal names give one and the same model: leave it as it was.
    """

    @functools.cache
    def train(name: str) -> PreTrainedModel:
        config = (CONFIGS | LOOKALIKES)[name]()
        setattr(config, "init_std" if hasattr(config, "init_std") else "initializer_range", 0.08)
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).float().train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=TRAINING_RATE)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TRAINING_RATE, TRAINING_STEPS)
            for step in range(TRAINING_STEPS):
                batch = prose(16, step)
                optimizer.zero_grad()
                model(batch, labels=batch, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
        model.zero_grad(set_to_none=True)
        return model.eval()

    return train


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest, build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Every row of `CONFIGS` in turn. `parametrize("model", ["llama"], indirect=True)` narrows it."""
    return build(request.param)


@pytest.fixture(params=LOOKALIKES)
def lookalike(request: pytest.FixtureRequest, build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """Every row of `LOOKALIKES` in turn."""
    return build(request.param)


@pytest.fixture(params=FAMILIES.values())
def family_model(request: pytest.FixtureRequest, build: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    """One model of every family of `CONFIGS` in turn."""
    return build(request.param)


@pytest.fixture
def tested_families() -> set[str]:
    """Every `model_type` that has a row in `CONFIGS` or `LOOKALIKES`."""
    return {*FAMILIES, *(make().model_type for make in LOOKALIKES.values())}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """(name, code, entry points) -> a third party's package, as pip would leave it. Entry points: the text of `entry_points.txt`, or
    `{"group": {"entry": "name:object"}}`."""
    modules: list[str] = []

    def put(name: str, code: str, points: str | Mapping[str, Mapping[str, str]]) -> None:
        if not isinstance(points, str):
            rows = [
                (f"[{group}]", *(f"{key} = {value}" for key, value in own.items())) for group, own in points.items()
            ]
            points = "\n".join(line for lines in rows for line in lines)
        site = (
            tmp_path / f"site-{name}"
        )  # another folder for each package: what is installed is looked up once for each `sys.path`
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (site / f"{name}.py").write_text(code, encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(points, encoding="utf-8")
        monkeypatch.syspath_prepend(str(site))
        sys.modules.pop(name, None)
        modules.append(name)

    yield put
    for name in modules:
        sys.modules.pop(name, None)


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(found) if isinstance(leaf, Tensor)}
        return found


@pytest.fixture
def shapes() -> type[Shapes]:
    """`with shapes() as made: ...` leaves the shapes of all tensors that the body made in `made.seen`."""
    return Shapes


@pytest.fixture
def anatomy(model: PreTrainedModel) -> Anatomy:
    return anatomy_of(model)


@pytest.fixture
def windows() -> Tensor:
    """`5 x 10` token ids."""
    return torch.randint(SIZES["vocab_size"], (5, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def random_architecture() -> Callable[..., Architecture]:
    """(anatomy, seed, pattern) -> random widths. The pattern has one letter per layer, shuffled when none is given:
    B keeps both blocks, A attention alone, M the MLP alone, - nothing. `whole` keeps all query heads of a KV group."""

    def draw(anatomy: Anatomy, seed: int, pattern: str | None = None, whole: bool = False) -> Architecture:
        rng = random.Random(seed)
        letters = pattern or rng.sample("BBAM-", 5)
        groups = tuple((letter in "BA") * rng.randint(1, anatomy.num_key_value_heads) for letter in letters)
        neurons = tuple((letter in "BM") * rng.randint(1, anatomy.intermediate_size) for letter in letters)
        fewer = tuple(rng.randrange(anatomy.attention.queries) if kept and not whole else 0 for kept in groups)
        return Architecture(groups, neurons, fewer)

    return draw


@pytest.fixture
def random_ranking() -> Callable[[Anatomy, int], Ranking]:
    """(anatomy, seed) -> random permutations, so that every mask cut from them is scattered."""

    def draw(anatomy: Anatomy, seed: int) -> Ranking:
        rng = torch.Generator().manual_seed(seed)

        def orders(units: int) -> Tensor:
            return torch.stack([torch.randperm(units, generator=rng) for _ in range(anatomy.num_hidden_layers)])

        groups, neurons = orders(anatomy.num_key_value_heads), orders(anatomy.intermediate_size)
        queries, heads = anatomy.attention.queries, orders(anatomy.attention.units * anatomy.attention.queries)
        inside = [within_groups(*each, queries) for each in zip(heads, groups, strict=True)]
        return Ranking(groups, neurons, torch.stack(inside) if queries > 1 else None)

    return draw


@pytest.fixture
def random_mask(
    random_architecture: Callable[..., Architecture], random_ranking: Callable[[Anatomy, int], Ranking]
) -> Callable[..., PruningMask]:
    """(anatomy, seed, pattern) -> a scattered mask of a random architecture."""
    return lambda anatomy, seed, pattern=None: PruningMask.from_architecture(
        random_architecture(anatomy, seed, pattern), random_ranking(anatomy, seed)
    )


@pytest.fixture
def logits() -> Callable[[PreTrainedModel, Tensor], Tensor]:
    """(model, windows) -> `B x T x V` logits, without gradient or cache."""

    def compute(model: PreTrainedModel, windows: Tensor) -> Tensor:
        with torch.no_grad():
            return model(windows, use_cache=False).logits

    return compute


@pytest.fixture
def unchanged() -> Callable[[PreTrainedModel], AbstractContextManager[None]]:
    """`with unchanged(model): ...` fails unless the body leaves objects, bits, flags, hooks and config alone."""

    @contextmanager
    def check(model: PreTrainedModel) -> Iterator[None]:
        modules, parameters, config = _modules(model), _parameters(model), copy.deepcopy(model.config.to_dict())
        values = [parameter.detach().clone() for _, parameter, _ in parameters]
        yield
        assert _modules(model) == modules
        after = _parameters(model)
        assert [(name, id(p), flag) for name, p, flag in after] == [(name, id(p), flag) for name, p, flag in parameters]
        assert all(torch.equal(p, value) for (_, p, _), value in zip(after, values, strict=True))
        assert model.config.to_dict() == config

    return check


def _modules(model: PreTrainedModel) -> list[tuple[object, ...]]:
    return [
        (
            name,
            id(module),
            *(len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)),
            *((key, value) for key, value in vars(module).items() if isinstance(value, int | float | str)),
        )
        for name, module in model.named_modules()
    ]


def _parameters(model: PreTrainedModel) -> list[tuple[str, Tensor, bool]]:
    return [(name, p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)]


@pytest.fixture
def files_at_most() -> Callable[[int], AbstractContextManager[None]]:
    """(bytes) -> what a full disk does, as far as this process can tell: writes fail half-way."""

    @contextmanager
    def limited(limit: int) -> Iterator[None]:
        former, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, former[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, former)
            signal.signal(signal.SIGXFSZ, handler)

    return limited
