"""A toy search problem whose quality is a formula, and a tiny llama on disk with a tokenizer and a text. Nothing is downloaded."""

import contextlib
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from alembic.util import pyfiles
from click.testing import Result
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmbo.__main__ import main
from llmbo.advisor.context import Context, Setting
from llmbo.advisor.roles import Question
from llmbo.advisor.store import AdviceStore, MemoryNotes
from llmbo.cli import app
from llmbo.config.advisor import CONTEXT_LEVELS
from llmbo.config.objectives import feasible
from llmbo.problem.family import Expansions, ThresholdFamily
from llmbo.problem.marginals import Marginals
from llmbo.problem.objectives import Objective, build_objectives
from llmbo.problem.prices import TINY, Prices
from llmbo.problem.proxy import known_values
from llmbo.problem.recipe import DENSE_PRICES, AllocationRecipe
from llmbo.problem.space import SearchSpace
from llmbo.problem.statistics import LayerStatistics
from llmbo.types import Measurement, Outlook, Proposal, Source, Trial, TrialState
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.export.hf import Pruned, save_hf
from pruning.importance import Importance
from pruning.masks import PruningMask, Ranking
from pruning.sampling import sample_windows
from pruning.shrinking import shrink
from pruning.text import MODULES

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WORDS = [f"w{index}" for index in range(60)]
TEXT_TOKENS = 1200
WHOLE = Figure.savefig
TIMEOUT = 300.0  # seconds until a process has said what it is waited for, on a busy machine
FACTORS = (0.5, 0.9, 1.2, 1.4)  # of the toy's windows, with mean 1
FAMILIES = [(4, 24, 0.4, 0), (3, 100, 0.1, 7), (2, 24, 0.9, 24), (5, 24, 0.05, 3)]  # as `make_toy` takes them


@dataclass(frozen=True)
class ToyEvaluator:
    """Implements `types.Evaluator`."""

    toy: "Toy"
    at_once: int = 1

    def evaluate(self, batch: Sequence[tuple[int, ...]]) -> list[Measurement]:
        return [self.toy.evaluate(x) for x in batch]


@dataclass(frozen=True)
class Toy:
    """A search problem without a model: quality is a smooth function of x, 0 for the dense model and worse for every unit removed.

    What a block is worth differs from what the family's importance says, so that there is something to find.
    """

    space: SearchSpace
    importance: Importance
    names: tuple[str, ...] = ("kl", "params_share")
    reference_point: tuple[float, ...] | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def family(self) -> ThresholdFamily:
        return ThresholdFamily.from_importance(self.space, self.importance)

    @property
    def threshold_family(self) -> ThresholdFamily:
        return self.family

    @property
    def fisher_family(self) -> ThresholdFamily:
        return self.family

    @cached_property
    def taylor_family(self) -> ThresholdFamily:
        """Another family than `family`: its scores are the other way round."""
        groups, neurons = self.importance.groups.flip(0), self.importance.neurons.flip(0)
        return ThresholdFamily.from_importance(self.space, Importance(groups, neurons, self.importance.layers.flip(0)))

    @cached_property
    def dense(self) -> dict[str, float]:
        return self.evaluate(self.space.max_levels)

    @cached_property
    def objectives(self) -> tuple[Objective, ...]:
        return build_objectives(
            self.names, self.dense, known_values(self.space, self.family.at(0.0)), self.reference_point, self.limits
        )

    @property
    def weights(self) -> list[float]:
        """What each block is worth."""
        return [0.5 + 2.5 * ((7 * index + 3) % 10) / 10 for index in range(self.space.d)]

    def evaluate(self, x: tuple[int, ...]) -> Measurement:
        """Every quantity of a candidate, of which some windows are harder than others."""
        missing = [1 - level / most for level, most in zip(x, self.space.max_levels, strict=True)]
        neighbours = sum(a * b for a, b in itertools.pairwise(missing))
        kl = (
            (sum(weight * gone**2 for weight, gone in zip(self.weights, missing, strict=True)) + neighbours)
            * 3
            / self.space.d
        )
        windows = {"kl": [factor * kl for factor in FACTORS], "loss": [factor * (3 + kl) for factor in FACTORS]}
        values = {"kl": kl, "loss": 3 + kl, "perplexity": math.exp(3 + kl), **known_values(self.space, x)}
        return Measurement(values, windows)

    @property
    def evaluator(self) -> "ToyEvaluator":
        return ToyEvaluator(self)

    def trial(self, number: int, proposal: Proposal, round: int = 0, state: TrialState = TrialState.COMPLETE) -> Trial:
        found = self.evaluate(proposal.x) if state is TrialState.COMPLETE else Measurement({})
        kept = not found or feasible(found, self.limits)
        return Trial(
            number, round, proposal.x, proposal.origin, state, found, 0.0, feasible=kept, source=proposal.source,
            windows=found.windows, recipe=proposal.recipe, predicted=proposal.predicted,
        )  # fmt: skip

    def trials(self, points: Iterable[tuple[int, ...]], origin: str = "threshold") -> list[Trial]:
        """The points as complete trials."""
        source = Source.of_origin(origin)
        return [self.trial(number, Proposal(tuple(x), origin, source=source)) for number, x in enumerate(points)]

    def with_objectives(self, *names: str, reference_point: tuple[float, ...] | None = None) -> "Toy":
        return replace(self, names=names, reference_point=reference_point)

    def with_prices(self) -> "Toy":
        """The same toy; its family knows prices, and expansions around two of its members."""
        rng, space = torch.Generator().manual_seed(0), self.space
        costs = [
            (6 * torch.rand(2, int(top), generator=rng)).exp().sort(descending=True).values.tolist()
            for top in space.bounds[1]
        ]
        prices = Prices.of(space, *([row[one] for row in costs] for one in (0, 1)))
        rows = prices.members(DENSE_PRICES.theta[None], torch.linspace(0.4, 1.0, 100, dtype=torch.float64))[0]
        family = ThresholdFamily.along(space, space.increasing(rows), self.importance)
        members = torch.tensor([family.at(0.5), family.at(0.7), space.max_levels], dtype=torch.float64)
        away = torch.arange(int(space.bounds[1].max()) + 1) - members[..., None]
        changes = -0.01 * away * (1 + torch.rand(len(members), space.d, 1, generator=rng))
        corrections = torch.cat([torch.randn(2, space.d, generator=rng).double(), torch.zeros(1, space.d)])
        shares = space.share(members)
        known = {
            "prices": replace(prices, anchors=shares, corrections=corrections),
            "expansions": Expansions(shares, changes),
        }
        self.__dict__["family"] = replace(family, **known)
        return self

    def random_points(self, n: int, seed: int) -> list[tuple[int, ...]]:
        """Distinct legal points other than the dense model, of all sizes."""
        rng, found = random.Random(seed), dict[tuple[int, ...], None]()
        while len(found) < n:
            rate = rng.uniform(0.3, 1.0)
            x = tuple(sum(rng.random() < rate for _ in range(most)) for most in self.space.max_levels)
            if x != self.space.max_levels and bool(self.space.legal(torch.tensor([x], dtype=torch.float64))):
                found[x] = None
        return list(found)


def tiny_config(layers: int = 4, neurons: int = 24) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(WORDS) + 2, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=neurons, initializer_range=0.3, max_position_embeddings=64, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip


@functools.cache
def _anatomy(layers: int, neurons: int) -> Anatomy:
    return anatomy_of(AutoModelForCausalLM.from_config(tiny_config(layers, neurons)))


@pytest.fixture
def make_space() -> Callable[..., SearchSpace]:
    """(layers, neurons, min_share, neuron_step) -> the space of a tiny llama."""
    return lambda layers=4, neurons=24, min_share=0.4, neuron_step=0: SearchSpace(
        _anatomy(layers, neurons), min_share, neuron_step
    )


@pytest.fixture
def make_toy(make_space: Callable[..., SearchSpace]) -> Callable[..., Toy]:
    """The same arguments as `make_space`, and a seed of the family's importances -> a toy problem."""

    def make(*args: float, seed: int = 0, **options: float) -> Toy:
        space = make_space(*args, **options)
        rng = torch.Generator().manual_seed(seed)

        def scores(units: int, scale: float) -> torch.Tensor:
            layer = torch.rand(space.num_layers, 1, generator=rng) + 0.2
            return scale * layer * torch.rand(space.num_layers, units, generator=rng).add(0.05)

        groups, neurons = scores(space.anatomy.num_key_value_heads, 20.0), scores(space.anatomy.intermediate_size, 1.0)
        return Toy(space, Importance(groups, neurons, groups.sum(-1) + neurons.sum(-1)))

    return make


@pytest.fixture(scope="session", autouse=True)
def _quick_databases() -> Iterator[None]:
    """Tests kill processes, no machines: nobody need wait for the disk. And Optuna's twenty migrations are read from theirs once."""
    connect = sqlite3.connect

    def not_waiting(*words: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*words, **options)
        with contextlib.suppress(sqlite3.Error):  # of a damaged file, which is for others to tell
            connection.execute("PRAGMA synchronous = OFF")
        return connection

    with pytest.MonkeyPatch.context() as patch:
        for module in (sqlite3, sqlite3.dbapi2):  # the latter is SQLAlchemy's
            patch.setattr(module, "connect", not_waiting)
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(pyfiles, "load_module_py", functools.cache(pyfiles.load_module_py))
        yield


@pytest.fixture(scope="session", autouse=True)
def _little_code() -> Iterator[None]:
    """Two hundred thousand characters are more than anything here asks for of the text `python`; all of it takes as long as a search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pruning.text.MODULES", MODULES[:4])
        yield


@pytest.fixture(scope="session", autouse=True)
def _small_pictures() -> Iterator[None]:
    """Every run's front is drawn, by fewer dots and not laid out first: whole pictures take a fifth of a small run's time."""
    with pytest.MonkeyPatch.context() as patch:

        def small(figure: Figure, *where: Any, **how: Any) -> None:
            figure.set_layout_engine(None)
            WHOLE(figure, *where, **how | {"dpi": 30})

        patch.setattr(Figure, "savefig", small)
        yield


@pytest.fixture
def whole_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users get them."""
    monkeypatch.setattr(Figure, "savefig", WHOLE)


@pytest.fixture(params=[(case, seed) for case in FAMILIES for seed in range(2)], ids=str)
def family(request: pytest.FixtureRequest, make_toy: Callable[..., Any]) -> ThresholdFamily:
    case, seed = request.param
    return make_toy(*case, seed=seed).family


@pytest.fixture
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy()


@pytest.fixture
def geometric_mean() -> Callable[..., list[list[float]]]:
    """Of two marginal costs, step by step: what the dense model's prices are, but for their unit."""
    return lambda first, second: [
        [(max(a, TINY) * max(b, TINY)) ** 0.5 for a, b in zip(row, other, strict=True)]
        for row, other in zip(first, second, strict=True)
    ]


@pytest.fixture
def make_priced(make_toy: Callable[..., Toy]) -> Callable[..., Toy]:
    """The same arguments -> a toy `with_prices`."""
    return lambda *args, seed=0: make_toy(*args, seed=seed).with_prices()


@pytest.fixture
def priced(make_priced: Callable[..., Toy]) -> Toy:
    return make_priced(6, 60, 0.4, 7)


@pytest.fixture
def is_member() -> Callable[[ThresholdFamily, Sequence[int]], bool]:
    return lambda family, x: bool((family.path == torch.tensor(x, dtype=torch.float64)).all(-1).any())


@pytest.fixture
def facts() -> dict[str, Any]:
    """What every run stores about itself."""
    split = {"windows": 4, "tokens": 64}
    model = dict.fromkeys(("name", "source", "model_type", "fingerprint"), "tiny") | dict.fromkeys(
        ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
         "intermediate_size", "vocab_size", "params", "block_params"), 8,
    )  # fmt: skip
    data = {"source": "builtin", "sha256": "", "available_tokens": 999, "window": 16, "bos": True}
    data |= dict.fromkeys(("calibration", "proxy", "heldout"), split)
    return {"dtype": "float32", "device": "cpu", "model": model, "data": data, "dense": {"kl": 0.0}, "importance": []}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama with its tokenizer, as `save_pretrained` leaves it. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture
def write_otherwise(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From now on, models write another text for runs on `self`, as on another device."""

    def otherwise(model: Any, tokenizer: Any, counts: Any, length: int, seed: int, **options: Any) -> Any:
        return sample_windows(model, tokenizer, counts, length, seed + 1, **options)

    return lambda: monkeypatch.setattr("llmbo.problem.texts.sample_windows", otherwise)


@pytest.fixture(scope="session")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of unequal layers, as `llmbo export` writes it. Copy it before changing it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    anatomy = anatomy_of(model)
    ranking = Ranking(torch.arange(2).repeat(4, 1), torch.arange(24).repeat(4, 1))
    architecture = Architecture((1, 2, 0, 2), (24, 0, 7, 12))
    small = shrink(model, PruningMask.from_architecture(architecture, ranking))
    folder = tmp_path_factory.mktemp("exported") / "small"
    save_hf(Pruned(small, anatomy, architecture, AutoTokenizer.from_pretrained(model_folder)), folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`TEXT_TOKENS` random words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(TEXT_TOKENS)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Llmbo:
    """The command line in this process, in a working directory of its own. Keyword arguments become flags, of a list one for each."""

    folder: Path
    defaults: Mapping[str, object]

    def flags(self, **flags: object) -> list[str]:
        words: list[str] = []
        for name, value in {**self.defaults, **flags}.items():
            flag = f"--{name.replace('_', '-')}"
            for one in value if isinstance(value, list) else [value]:
                words += [flag] if one is True else [] if one is None else [flag, str(one)]
        return ["optimize", *words]

    def __call__(self, **flags: object) -> Result:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with contextlib.chdir(self.folder):
                return CliRunner().invoke(app, self.flags(**flags))
        finally:
            signal.signal(signal.SIGTERM, before)

    def report(self, name: str = "tiny") -> dict[str, Any]:
        return json.loads((self.folder / "runs" / name / "report.json").read_text(encoding="utf-8"))

    def files(self) -> dict[str, bytes]:
        """Everything in the working directory."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }


@pytest.fixture(scope="session")
def make_llmbo(model_folder: Path, text_file: Path) -> Callable[[Path], Llmbo]:
    """Working directory -> `llmbo` there."""
    tiny = {
        "model": model_folder, "name": "tiny", "text": f"text:{text_file}", "budget": 6, "window": 16, "calibration_tokens": 128,
        "proxy_tokens": 64, "heldout_tokens": 64, "dtype": "float32", "device": "cpu",
        "heldout_text": "none", "no_samples": True,  # but for the run that shows both: they take as long as a search
    }  # fmt: skip
    return lambda folder: Llmbo(folder, tiny)


@pytest.fixture
def llmbo(tmp_path: Path, make_llmbo: Callable[[Path], Llmbo]) -> Llmbo:
    """`llmbo(budget=8)` runs `llmbo optimize` on a tiny llama, in seconds."""
    return make_llmbo(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, make_llmbo: Callable[[Path], Llmbo]) -> Llmbo:
    """A finished run of every phase of the search. Read it only."""
    done = make_llmbo(tmp_path_factory.mktemp("finished"))
    done = replace(done, defaults={**done.defaults, "heldout_text": "python", "no_samples": None})
    result = done(budget=18)
    assert result.exit_code == 0, result.output
    return done


class Forked:
    """`llmbo WORDS` in a process of its own that need not import anything: a fork of this one. That saves five seconds of a start.

    Args:
        ends: Descriptors to read from and write to in place of the files `out` and `err` in `folder`.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, ends: tuple[int, int, int] | None = None, **env: str
    ) -> None:
        number = len(list(folder.glob("*.out")))
        self.out, self.err = (folder / f"{number}.{name}" for name in ("out", "err"))
        self._read = 0
        for path in (self.out, self.err):
            path.touch()
        self.process = get_context("fork").Process(target=self._body, args=(words, folder, ends, env))
        self.process.start()

    def _body(
        self, words: Sequence[str], folder: Path, ends: tuple[int, int, int] | None, env: Mapping[str, str]
    ) -> None:
        os.setsid()
        os.chdir(folder)
        os.environ.update(env)
        given = ends or (os.open(os.devnull, os.O_RDONLY), *(os.open(p, os.O_WRONLY) for p in (self.out, self.err)))
        for descriptor, own in enumerate(given):
            os.dup2(own, descriptor)
        sys.stdout, sys.stderr = (
            os.fdopen(n, "w", n - 2 or 1, "utf-8", closefd=False) for n in (1, 2)
        )  # as Python has them
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.SIG_DFL)
        sys.argv = ["llmbo", *words]
        main()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def kill(self) -> int | None:
        """Exit code, of a process that has ended or is made to."""
        self.process.kill()
        return self.wait()

    def wait(self) -> int | None:
        self.process.join(TIMEOUT)
        return self.process.exitcode

    def until(self, text: str, file: Path | None = None) -> None:
        """Wait until it has written this, after what was waited for before."""
        end = time.monotonic() + TIMEOUT
        while (place := (file or self.out).read_text().find(text, self._read)) < 0:
            assert self.running and time.monotonic() < end, f"it ended before '{text}': {self.err.read_text()}"
            time.sleep(0.02)
        self._read = place + len(text)


@pytest.fixture
def forked() -> type[Forked]:
    return Forked


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None or importlib.util.find_spec("playwright") is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium): pages are not tested")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


SECRET = "sk-secret-that-must-turn-up-nowhere"
Answering = Callable[[dict[str, Any], BaseHTTPRequestHandler], str | None]


@dataclass
class ChatServer:
    """An HTTP server on loopback that speaks OpenAI's chat protocol, as well or badly as `answer` wants.

    `answer` takes the request's body and the handler; it returns the reply's text, or sends a response itself and returns None.
    """

    url: str
    answer: Answering
    requests: list[dict[str, Any]]
    secret: str = SECRET

    def send(self, handler: BaseHTTPRequestHandler, status: int, body: bytes | str, **headers: str) -> None:
        data = body.encode() if isinstance(body, str) else body
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    def completion(self, text: str | None, message: Mapping[str, Any] = {}, **choice: Any) -> str:
        usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
        whole = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
        return json.dumps(
            {
                "id": "x", "object": "chat.completion", "created": 0, "model": "test-model", "usage": usage,
                "choices": [whole | choice],
            }
        )  # fmt: skip

    @property
    def advisor(self) -> str:
        """What to type after `--advisor`."""
        return f"openai:test-model@{self.url}"

    def good(self, body: dict[str, Any], handler: object = None) -> str:
        return good_reply(body)


@pytest.fixture
def chat_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    """Starts out with `good_reply`. The key in the environment is a secret that must turn up nowhere."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == f"Bearer {chat.secret}"
            chat.requests.append(body)
            with contextlib.suppress(OSError):  # the client may have gone
                text = chat.answer(body, self)
                if text is not None:
                    chat.send(self, 200, chat.completion(text))

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    chat = ChatServer(f"http://127.0.0.1:{server.server_port}/v1", lambda body, handler: good_reply(body), [])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield chat
    server.shutdown()
    server.server_close()


def good_reply(body: dict[str, Any]) -> str:
    """What a sensible model might say, whatever the hook: it reads the schema's name and answers in its format."""
    user = body["messages"][-1]["content"]
    share = 0.45 + 0.35 * (zlib.crc32(user.encode()) % 100) / 100
    edits = [{"layers": ["0-1"], "neurons_delta": -1}, {"layers": [2], "neurons_delta": 1}]
    replies = {
        "recipes": [
            {"numbers": {"mlp_slope": 0.3, "mlp_first": 0.1 * n}, "at": [share + 0.03 * n, share + 0.1], "why": "?"}
            for n in range(3)
        ] + [{"formula": "is_mlp * depth", "coefficient": 0.5, "at": [share]}],
        "formulas": [{"name": "late MLPs", "formula": "is_mlp * depth"}, {"name": "kept", "formula": "kept > 0.5"}],
        "proposals": [
            {"base": f"threshold:{share:.2f}", "edits": edits, "target_share": share + 0.03 * n, "also_at": [share + 0.1], "why": "?"}
            for n in range(3)
        ],
        "directions": [{"name": "early for late", "edits": edits}, {"name": "attention", "edits": [{"layers": ["0-1"], "kv_delta": 1}]}],
        "decisions": [{"id": 1, "keep": False, "confidence": 0.7, "why": "poor"}],
    }  # fmt: skip
    key = next(key for key in replies if f'{{"{key}":' in user)
    return json.dumps({key: replies[key]})


@pytest.fixture
def advice() -> AdviceStore:
    """Advice that dies with the test."""
    return AdviceStore(MemoryNotes())


@pytest.fixture
def question(make_toy: Callable[..., Toy]) -> Callable[..., Question]:
    """(hook, layers, count, level, extra, recipes) -> a question about a toy with members of the family and `extra` other trials.

    With `recipes` the toy is one `with_prices`, every third of the other trials is the advisor's and stems from a recipe, and the optimiser
    thinks something.
    """

    def make(
        hook: str = "propose",
        layers: int = 6,
        count: int = 4,
        level: str = "full",
        extra: int = 3,
        recipes: bool = False,
    ) -> Question:
        toy = make_toy(layers).with_prices() if recipes else make_toy(layers)
        points = [*map(tuple, toy.family.path[:-1:12].int().tolist()), *toy.random_points(extra, 1)]
        members = len(points) - extra
        proposals = [
            Proposal(x, "threshold", source=Source.PATH)
            if n < members
            else Proposal(x, "qnehvi", predicted=(0.012, 0.008))
            for n, x in enumerate(points)
        ]
        named: tuple[Proposal, ...] = ()
        picks: tuple[Proposal, ...] = ()
        if recipes and toy.family.prices:
            recipe = {**DENSE_PRICES.to_dict(), "mlp_slope": 0.3}
            theta, shares = AllocationRecipe.of(recipe).theta, torch.linspace(0.5, 0.9, extra, dtype=torch.float64)
            rows = [tuple(x) for x in toy.family.prices.members(theta[None], shares)[0].int().tolist()]
            told = [Proposal(x, "advisor:propose", "", Source.ADVICE, recipe, (0.012, 0.008)) for x in rows]
            proposals[members::3], named = told[::3], tuple(told[1:10:3])
            picks = tuple(Proposal(told[n].x, "recipe", recipe=recipe, predicted=(0.021, 0.004)) for n in (-1, -2))
        trials = [toy.trial(n, proposal, n // 4) for n, proposal in enumerate(proposals)]
        rng = random.Random(0)
        table = {kind: tuple(rng.uniform(0.1, 9) for _ in range(layers)) for kind in ("attention", "mlp")}
        statistics = LayerStatistics(table, table, table) if "tables" in CONTEXT_LEVELS[level] else None
        x = toy.family.at(0.7)
        cost = tuple(rng.uniform(-0.01, 0.05) if level else None for level in x)
        marginals = Marginals(x, cost, 0.0031, 5.0) if statistics else None
        setting = Setting(toy.family, toy.objectives, toy.dense, statistics, level)
        candidates = tuple(toy.random_points(4, 9)) if hook == "filter" else ()

        def look() -> Outlook:
            reach = tuple(1.0 + n for n in range(toy.space.d))
            return Outlook(picks, (0.0012,) * len(picks), reach, lambda xs: [(0.033, 0.007)] * len(xs))

        thinks = look if recipes and "optimiser" in setting.tells else None
        context = Context(setting, trials, marginals, ("layer 31 does not exist",), named, thinks)
        return Question(hook, context, 3, 2 if hook == "filter" else count, 0, candidates)

    return make
