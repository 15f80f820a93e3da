"""`optimize` searches, `plan` says what that takes, `load_run` opens what a search has stored."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmbo.api.run import Run, call_text
from llmbo.config import RunConfig
from llmbo.display.progress import Show, build_display
from llmbo.errors import ConfigError
from llmbo.models.loading import LoadedModel, adopt_model
from llmbo.models.silence import libraries_silenced
from llmbo.report.files import RUNS, find_run
from llmbo.run.assemble import assemble
from llmbo.run.database import check_shared, url_of
from llmbo.run.execute import execute
from llmbo.run.plan import Plan, plan_of
from llmbo.run.rebuild import read_run
from llmbo.run.worker import helpers


def optimize(
    model: str | PreTrainedModel,
    budget: int = RunConfig.budget,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch: int = RunConfig.batch,
    seed: int = RunConfig.seed,
    strategy: str = RunConfig.strategy,
    deploy: Sequence[str] = RunConfig.deploy,
    objectives: Sequence[str] = RunConfig.objectives,
    reference_point: Sequence[float] | None = None,
    maximum: Mapping[str, float] | Sequence[str] = (),
    context: int = RunConfig.context,
    serve_batch: int = RunConfig.serve_batch,
    quantize: str = RunConfig.quantize,
    latency_target: str = RunConfig.latency_target,
    items: str | Sequence[str] = RunConfig.items,
    samples: bool = RunConfig.samples,
    refit_front: int = RunConfig.refit_front,
    racing: bool = RunConfig.racing,
    compensation: bool = RunConfig.compensation,
    recipe: str = RunConfig.recipe,
    recipe_search: bool = RunConfig.recipe_search,
    text: str = RunConfig.text,
    chat: bool = RunConfig.chat,
    heldout_text: str = RunConfig.heldout_text,
    min_share: float = RunConfig.min_share,
    neuron_step: int = RunConfig.neuron_step,
    neuron_multiple: int = RunConfig.neuron_multiple,
    query_heads: bool | None = RunConfig.query_heads,
    refit_anchors: int | None = RunConfig.refit_anchors,
    elastic: str = RunConfig.elastic,
    calibration_tokens: int = RunConfig.calibration_tokens,
    proxy_tokens: int = RunConfig.proxy_tokens,
    heldout_tokens: int = RunConfig.heldout_tokens,
    window: int = RunConfig.window,
    dtype: str = RunConfig.dtype,
    device: str = RunConfig.device,
    memory: str = RunConfig.memory,
    offload: str = RunConfig.offload,
    name: str = RunConfig.name,
    storage: str | None = None,
    artifacts: str = RunConfig.artifacts,
    advisor: str = RunConfig.advisor,
    advisor_hooks: Sequence[str] = RunConfig.advisor_hooks,
    advisor_share: float = RunConfig.advisor_share,
    advisor_warm_start: int = RunConfig.advisor_warm_start,
    advisor_context: str = RunConfig.advisor_context,
    advisor_every: int = RunConfig.advisor_every,
    advisor_max_calls: int = RunConfig.advisor_max_calls,
    advisor_max_tokens: int = RunConfig.advisor_max_tokens,
    advisor_reply_tokens: int = RunConfig.advisor_reply_tokens,
    advisor_max_cost: float | None = None,
    advisor_max_seconds: float = RunConfig.advisor_max_seconds,
    advisor_deadline: float = RunConfig.advisor_deadline,
    advisor_price: Sequence[float] | None = None,
    devices: Sequence[str] = (),
    fresh: bool = False,
    show: Show = "auto",
    command: str = "",
) -> Run:
    """Search for smaller models, judge the front on held-out windows, and write `runs/NAME`. As `llmbo optimize`, keyword by keyword.

    The same call continues a run that was stopped, whatever stopped it; a larger `budget` extends a finished one.

    Args:
        model: Alias, local folder or hub name; or a loaded causal language model, which is left as it was.
        budget: Candidates to evaluate.
        tokenizer: Of a loaded model.
        maximum: Limits by objective, e.g. `{"params_share": 0.6}`, or as `NAME=VALUE`.
        devices: Evaluate on all of these at once, e.g. `["cuda:0", "cuda:1"]`: here on the first, in a worker process on each other.
        fresh: Forget what this run has stored and start over.
        show: "auto" suits a terminal, a notebook or a file; "json" writes events to stderr; "nothing" is silent.
        command: What the report says the run was started with; by default this call.
        batch, seed, strategy, deploy, objectives, reference_point, context, serve_batch, quantize, latency_target, items, samples,
            refit_front, racing, compensation, recipe, recipe_search, text, chat, heldout_text, min_share, neuron_step, neuron_multiple,
            query_heads, elastic, refit_anchors, calibration_tokens, proxy_tokens, heldout_tokens, window, dtype, device, memory, offload,
            name, storage, artifacts, advisor, advisor_hooks, advisor_share, advisor_warm_start, advisor_context, advisor_every,
            advisor_max_calls, advisor_max_tokens, advisor_reply_tokens, advisor_max_cost, advisor_max_seconds, advisor_deadline,
            advisor_price: See `llmbo.config.RunConfig`.

    Returns:
        The finished run.

    Raises:
        LlmboError, PruningError: One line that names the value, what was expected and the remedy.
        ReplyAwaited: With `advisor="mail:DIR"`: `letter` is the prompt, `reply` where its reply goes; the same call then goes on.
        KeyboardInterrupt: After what was measured has been stored and reported.
    """
    typed = locals()  # the arguments, while nothing else is here
    settings = {item.name: typed[item.name] for item in fields(RunConfig)}
    command = command or call_text("optimize", settings | ({"fresh": True} if fresh else {}))
    settings |= _first(devices, model, device)
    given = None
    if not isinstance(model, str):
        given = adopt_model(model, tokenizer)
        _check_placed(given, dtype, device, offload, memory)
        settings |= {"model": given.name, "dtype": given.dtype, "device": given.device}
    elif tokenizer is not None:
        raise ConfigError(f"tokenizer= belongs to a loaded model: '{model}' brings its own, so leave it out.")
    config = _config(settings)
    if devices:
        check_shared(url_of(RUNS / config.name, config.storage))
    with (
        _evaluating(given),
        libraries_silenced(),
        build_display(show, config.budget, config.name) as display,
        assemble(config, fresh, display, given) as parts,
        helpers(devices, parts, display.note),
    ):
        execute(parts, display, command)
    return Run(parts.folder, read_run(str(parts.folder)), given, show)


def plan(model: str, devices: Sequence[str] = (), **settings: Any) -> Plan:
    """What `optimize` with these settings would take, before anything is loaded: memory, disk, minutes, the advisor's cost.

    Of the model its config alone is read, so that weights need not be here.

    Args:
        model: Alias, local folder or hub name.
        devices: As `optimize` takes them.
        settings: Those of `llmbo.config.RunConfig`, as `optimize` takes them.

    Raises:
        LlmboError, PruningError: What `optimize` would refuse before it loads anything.
    """
    defaults = {item.name: item.default for item in fields(RunConfig) if item.default is not MISSING}
    settings |= _first(devices, model, settings.get("device", "auto"))
    with libraries_silenced():
        return plan_of(_config({**defaults, "model": model, **settings}), devices=tuple(devices))


def load_run(
    run: str | Path,
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    show: Show = "auto",
) -> Run:
    """Open a stored run.

    Args:
        run: Its folder, or its name below `runs/`.
        model: Where the base model is now, if it has moved, or the loaded model itself.
        tokenizer: Of a loaded model.

    Raises:
        StorageError: There is no such run or no report yet, or it cannot be read.
    """
    folder = find_run(str(run))
    base = model if isinstance(model, str) or model is None else adopt_model(model, tokenizer)
    return Run(folder, read_run(str(folder)), base, show)


def _config(settings: Mapping[str, Any]) -> RunConfig:
    maximum = settings.get("maximum", ())
    if isinstance(maximum, Mapping):
        settings = {**settings, "maximum": [f"{key}={value}" for key, value in maximum.items()]}
    return RunConfig.from_settings({key: _stored(value) for key, value in settings.items()})


def _first(devices: Sequence[str], model: Any, device: str) -> dict[str, str]:
    """The setting that the first of `devices` is."""
    if isinstance(devices, str):
        raise ConfigError(f"devices='{devices}' is one text: give a list, devices={devices.split(',')!r}.")
    if devices and (device not in ("auto", devices[0]) or not isinstance(model, str)):
        raise ConfigError("devices= says where workers load a model: give its name, and no other device=.")
    return {"device": devices[0]} if devices else {}


def _stored(value: Any) -> Any:
    """Sequences as settings hold them."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _check_placed(given: LoadedModel, dtype: str, device: str, offload: str, memory: str) -> None:
    for setting, wanted, found in (("dtype", dtype, given.dtype), ("device", device, given.device)):
        if wanted not in ("auto", found):
            raise ConfigError(
                f"{setting}='{wanted}', but the loaded model is in {found}: leave {setting} out, or move the model."
            )
    if memory or offload not in ("auto", "none"):
        setting = f"memory='{memory}'" if memory else f"offload='{offload}'"
        raise ConfigError(
            f"{setting} says where llmbo loads a model, but this one is loaded: give its name, or leave it out."
        )


@contextmanager
def _evaluating(given: LoadedModel | None) -> Iterator[None]:
    """A loaded model without dropout, and afterwards as it was."""
    training = [module for module in given.model.modules() if module.training] if given else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
