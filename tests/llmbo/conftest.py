"""A toy search problem whose quality is a formula, and a tiny llama on disk with a tokenizer and a text. Nothing is downloaded."""

import itertools
import json
import math
import random
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from llmbo.cli import app
from llmbo.evaluate import known_values
from llmbo.family import ThresholdFamily
from llmbo.objectives import Objective, build_objectives
from llmbo.space import SearchSpace
from llmbo.types import Proposal, Trial, TrialState
from pruning.anatomy import Anatomy, anatomy_of
from pruning.importance import Importance

WORDS = [f"w{index}" for index in range(60)]
TEXT_TOKENS = 1200


@dataclass(frozen=True)
class Toy:
    """A search problem without a model: quality is a smooth function of x, 0 for the dense model and worse for every unit removed.

    What a block is worth differs from what the family's importance says, so that there is something to find.
    """

    space: SearchSpace
    importance: Importance
    names: tuple[str, ...] = ("kl", "params_share")
    reference_point: tuple[float, ...] | None = None

    @cached_property
    def family(self) -> ThresholdFamily:
        return ThresholdFamily.from_importance(self.space, self.importance)

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
            self.names, self.dense, known_values(self.space, self.family.at(0.0)), self.reference_point
        )

    def evaluate(self, x: tuple[int, ...]) -> dict[str, float]:
        """Implements `types.Evaluator`."""
        missing = [1 - level / most for level, most in zip(x, self.space.max_levels, strict=True)]
        weights = [0.5 + 2.5 * ((7 * index + 3) % 10) / 10 for index in range(self.space.d)]
        neighbours = sum(a * b for a, b in itertools.pairwise(missing))
        kl = (
            (sum(weight * gone**2 for weight, gone in zip(weights, missing, strict=True)) + neighbours)
            * 3
            / self.space.d
        )
        return {"kl": kl, "loss": 3 + kl, "perplexity": math.exp(3 + kl), **known_values(self.space, x)}

    def trial(self, number: int, proposal: Proposal, round: int = 0, state: TrialState = TrialState.COMPLETE) -> Trial:
        values = self.evaluate(proposal.x) if state is TrialState.COMPLETE else {}
        return Trial(number, round, proposal.x, proposal.origin, state, values, 0.0)

    def trials(self, points: Iterable[tuple[int, ...]], origin: str = "threshold") -> list[Trial]:
        """The points as complete trials."""
        return [self.trial(number, Proposal(tuple(x), origin)) for number, x in enumerate(points)]

    def with_objectives(self, *names: str, reference_point: tuple[float, ...] | None = None) -> "Toy":
        return replace(self, names=names, reference_point=reference_point)

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


@pytest.fixture
def toy(make_toy: Callable[..., Toy]) -> Toy:
    return make_toy()


@pytest.fixture
def is_member() -> Callable[[ThresholdFamily, Sequence[int]], bool]:
    return lambda family, x: bool((family.path == torch.tensor(x, dtype=torch.float64)).all(-1).any())


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


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`TEXT_TOKENS` random words."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(rng.choice(WORDS) for _ in range(TEXT_TOKENS)), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Llmbo:
    """The command line in this process, in a working directory of its own. Keyword arguments become flags."""

    folder: Path
    defaults: Mapping[str, object]

    def flags(self, **flags: object) -> list[str]:
        words: list[str] = []
        for name, value in {**self.defaults, **flags}.items():
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [] if value is None else [flag, str(value)]
        return ["optimize", *words]

    def __call__(self, **flags: object) -> Result:
        before = signal.getsignal(signal.SIGTERM)
        try:
            with chdir(self.folder):
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


def _llmbo(folder: Path, model_folder: Path, text_file: Path) -> Llmbo:
    tiny = {
        "model": model_folder, "name": "tiny", "text": f"text:{text_file}", "budget": 6, "window": 16, "calibration_tokens": 128,
        "proxy_tokens": 64, "heldout_tokens": 64, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    return Llmbo(folder, tiny)


@pytest.fixture
def llmbo(tmp_path: Path, model_folder: Path, text_file: Path) -> Llmbo:
    """`llmbo(budget=8)` runs `llmbo optimize` on a tiny llama, in seconds."""
    return _llmbo(tmp_path, model_folder, text_file)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, text_file: Path) -> Llmbo:
    """A finished run of every phase of the search. Read it only."""
    done = _llmbo(tmp_path_factory.mktemp("finished"), model_folder, text_file)
    result = done(budget=18)
    assert result.exit_code == 0, result.output
    return done
