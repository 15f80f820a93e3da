"""Flags -> checked config. Everything that can be refused without a model is refused here."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from llmbo.config.advisor import CONTEXT_LEVELS, DEFAULT_HOOKS, check_hooks, parse_spec
from llmbo.config.formats import ENGINES, FILE_TYPE, counted_types, engines_of
from llmbo.config.numbers import (
    MOST,
    MOST_CONTEXT,
    MOST_DOLLARS,
    MOST_SECONDS,
    MOST_SERVED,
    MOST_TOKENS,
    SEED,
    Within,
    bytes_of,
    check_numbers,
    check_values,
)
from llmbo.config.objectives import OBJECTIVES, check_objectives, parse_limits
from llmbo.config.strategies import STRATEGIES, strategy_plugin
from llmbo.errors import ConfigError, first_fault, unknown

MAX_NAME_BYTES = 250  # file systems take 255
FREE = (  # what may change between two starts of a run
    "budget", "name", "storage", "advisor_max_calls", "advisor_max_tokens", "advisor_max_cost", "advisor_max_seconds",
    "advisor_deadline", "advisor_price", "advisor_reply_tokens", "memory", "offload", "samples", "refit_front",
    "artifacts",
)  # fmt: skip
TOLD = (
    "budget",
    "refit_front",
    "memory",
    "offload",
)  # those of `FREE` that a report tells: exports and advice go by them
EARLIER: dict[str, Any] = {
    "chat": False,
    "heldout_text": "none",
    "recipe": "dense-prices",
    "recipe_search": False,
    "neuron_multiple": 32,
    "deploy": (),
    "quantize": "auto",
    "query_heads": False,
    "refit_anchors": 0,
    "elastic": "",
}  # what a run did that was started before there was the setting; rounds of a comparison are found by it, too
RESTATED = (
    "advisor_hooks",
    "advisor_share",
    "advisor_warm_start",
)  # other defaults, or another meaning, than in older runs
DTYPE_CHOICES = ("auto", "float32", "bfloat16", "float16")
OFFLOAD_CHOICES = ("auto", "none", "gpu", "cpu", "disk")


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run.

    Args:
        model: Alias, local folder or hub name.
        budget: Candidates to evaluate.
        batch: Candidates proposed at a time.
        deploy: Engines that are to run what is found (`llmbo.config.formats.ENGINES`): only what all of them can run is searched. Where one
            needs equal layers, the strategy is `uniform`.
        objectives: Two or three names; at least one measured quality and one known cost.
        reference_point: One number per objective, or None for the defaults.
        maximum: Limits, each `NAME=VALUE` with the name of any minimised objective.
        context: Tokens that a new token attends to, for `flops` and `kv_bytes`.
        serve_batch: Sequences served at a time, for `kv_bytes`.
        quantize: File type of llama.cpp that `file_bytes` is counted of, and a reason to count it; "auto" for what the first engine of
            `deploy` takes, without any a GGUF file in f16.
        latency_target: Device for latency, energy and peak memory, "auto" for the run's own.
        items: JSONL file of items, or several. The finished front is judged on them; with the objective `accuracy` they must be multiple
            choice, and one half is for the search, the other for the judgement.
        samples: Let some of the finished front continue three prompts, for people to read.
        refit_front: So many points of the finished front are refitted in sequence, each for itself, and measured again.
        racing: Stop candidates whose first windows say that the front dominates them.
        recipe: What the allocation path is made by: `default`, `dense-prices`, a JSON file of numbers (`llmbo.problem.recipe`),
            or a finished run, whose best recipe is taken.
        recipe_search: Let the search try members of other recipes' paths too.
        text: `builtin`, `python`, `text:PATH`, `hf:DATASET:CONFIG:SPLIT[:COLUMN]`, `mix:SOURCE=WEIGHT,…` of these, or `self`.
        chat: Put the text through the tokenizer's chat template.
        heldout_text: Text of another domain that a dozen models of the finished front are judged on as well, or `none`.
        min_share: Smallest parameter share a candidate may have.
        neuron_step: Neurons per grid level, 0 for about a twelfth of `intermediate_size`.
        neuron_multiple: What such a twelfth is rounded to a multiple of, where it is as much. K-quants of GGUF files cut rows into
            blocks of 256 values, GPTQ and AWQ into groups of 128.
        query_heads: Whether KV groups may lack some of their query heads; None for where a layer has a single group.
        refit_anchors: At so many members of the path refits are fitted beside those of the dense model (`pruning.anchored`); None for as
            many as this machine gets through in two minutes, three at most, which is then a setting of the run.
        elastic: Folder of an adapter that `llmbo elastic` wrote for this model, merged into its weights before anything is measured;
            KL, and the dense model's values, are of the model without it.
        calibration_tokens, proxy_tokens, heldout_tokens: Sizes of the three disjoint parts of the text; of the first 0 for what this
            machine gets through in a minute (`llmbo.run.tokens`), which is then a setting of the run.
        window: Tokens per window.
        memory: Most that may be taken on the device, e.g. `24GB`; empty for what is free there.
        offload: Where the decoder layers wait: "none" (on the device), "gpu" (on this machine's other GPUs), "cpu" (in the host's
            memory), "disk" (mapped files), or "auto" for the first of these that has room, other GPUs left out.
        storage: Database URL, or None for SQLite in the run folder.
        artifacts: Folder or `s3://BUCKET/PREFIX` that the preparation is put into, for workers on machines that share no other folder.
        advisor: See `llmbo.config.advisor`. The next three say where, on what grounds and how often it is heard; the others are
            caps for the whole run: calls, tokens, tokens of one reply, dollars (None for no cap), seconds of waiting, seconds
            that a dead or misbehaving model may cost, and the price in dollars per million prompt and reply tokens.
        advisor_warm_start: Places in the initial design that the advisor may fill, half of it at most.
        advisor_share: Part of the trials that may stem from the advisor, those places included: of the first n trials at most
            advisor_share * n, or the places in the initial design where these are more. They are at most advisor_share * budget.

    Raises:
        ConfigError: One line that names the flag, the value and what was expected.
    """

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}  # for what has been stored

    model: str
    budget: Annotated[int, Within(1, MOST)] = 60
    batch: Annotated[int, Within(1, MOST)] = 4
    seed: Annotated[int, SEED] = 0
    strategy: str = "qnehvi"
    deploy: tuple[str, ...] = ()
    objectives: tuple[str, ...] = ("kl", "params_share")
    reference_point: tuple[float, ...] | None = None
    maximum: tuple[str, ...] = ()
    context: Annotated[int, Within(1, MOST_CONTEXT)] = 2048
    serve_batch: Annotated[int, Within(1, MOST_SERVED)] = 1
    quantize: str = "auto"
    latency_target: str = "auto"
    items: str | tuple[str, ...] = ""
    samples: bool = True
    refit_front: Annotated[int, Within(0, MOST)] = 0
    racing: bool = False
    compensation: bool = True
    recipe: str = "default"
    recipe_search: bool = False
    text: str = "builtin"
    chat: bool = False
    heldout_text: str = "python"
    min_share: Annotated[float, Within(0, 1, apart=True)] = 0.4
    neuron_step: Annotated[int, Within(0, MOST)] = 0
    neuron_multiple: Annotated[int, Within(1, MOST)] = 256
    query_heads: bool | None = None
    refit_anchors: Annotated[int | None, Within(0, 6)] = None
    elastic: str = ""
    calibration_tokens: Annotated[int, Within(0, MOST_TOKENS)] = 0
    proxy_tokens: Annotated[int, Within(1, MOST_TOKENS)] = 3072
    heldout_tokens: Annotated[int, Within(1, MOST_TOKENS)] = 1536
    window: Annotated[int, Within(8, MOST)] = 256
    dtype: str = "auto"
    device: str = "auto"
    memory: str = ""
    offload: str = "auto"
    name: str = ""
    storage: str | None = None
    artifacts: str = ""
    advisor: str = "none"
    advisor_hooks: tuple[str, ...] = DEFAULT_HOOKS
    advisor_share: Annotated[float, Within(0, 1)] = 0.3
    advisor_warm_start: Annotated[int, Within(0, 6)] = 3
    advisor_context: str = "full"
    advisor_every: Annotated[int, Within(1, MOST)] = 2
    advisor_max_calls: Annotated[int, Within(1, MOST)] = 8
    advisor_max_tokens: Annotated[int, Within(1, MOST_TOKENS)] = 150_000
    advisor_reply_tokens: Annotated[int, Within(1, MOST_TOKENS)] = 4000
    advisor_max_cost: Annotated[float | None, Within(0, MOST_DOLLARS, apart=True)] = None
    advisor_max_seconds: Annotated[float, Within(1, MOST_SECONDS)] = 900.0
    advisor_deadline: Annotated[float, Within(1, MOST_SECONDS)] = 120.0
    advisor_price: Annotated[tuple[float, ...] | None, Within(0, MOST_DOLLARS)] = None

    def __post_init__(self) -> None:
        check_numbers(self)
        for flag in ("calibration_tokens", "proxy_tokens", "heldout_tokens"):
            if getattr(self, flag) < self.window and (flag, getattr(self, flag)) != ("calibration_tokens", 0):
                raise ConfigError(
                    f"--{flag.replace('_', '-')} must be at least one window ({self.window}), got {getattr(self, flag)}."
                )
        if self.chat and self.text == "self":
            raise ConfigError("--chat is of no use with --text self, which is sampled and not read: leave one out.")
        if self.heldout_text == "self" or self.heldout_text.startswith("mix:"):
            raise ConfigError(f"--heldout-text must be one text that can be read, or none, got '{self.heldout_text}'.")
        equal = [engine.name for engine in engines_of(self.deploy) if engine.equal_layers]
        if equal and self.strategy == "qnehvi":  # the default
            object.__setattr__(self, "strategy", "uniform")
        if equal and self.strategy != "uniform":
            raise ConfigError(
                f"--deploy {equal[0]} has a strategy of its own, uniform: leave out --strategy {self.strategy}."
            )
        if strategy_plugin(self.strategy) is None:
            STRATEGIES[self.strategy].check(self.strategy, self.recipe_search)
        if self.dtype not in DTYPE_CHOICES:
            raise ConfigError(f"Unknown dtype '{self.dtype}': expected one of {', '.join(DTYPE_CHOICES)}.")
        if self.memory:
            bytes_of("--memory", self.memory)
        if self.offload not in OFFLOAD_CHOICES:
            raise ConfigError(unknown("--offload", self.offload, OFFLOAD_CHOICES))
        if self.quantize not in ("auto", *counted_types()):
            raise ConfigError(unknown("--quantize", self.quantize, ("auto", *counted_types())))
        if self.refit_anchors and not self.compensation:
            raise ConfigError(f"--refit-anchors {self.refit_anchors} asks for refits: leave out --no-compensation.")
        check_objectives(self.objectives, self.reference_point)
        share = self.limits.get("params_share", 1.0)
        if share < self.min_share:
            raise ConfigError(
                f"--max params_share={share:g} is below --min-share {self.min_share:g}: no model is left."
            )
        if self.racing and [name for name in self.objectives if not OBJECTIVES[name].known] not in (["kl"], ["loss"]):
            raise ConfigError(
                f"--racing needs kl or loss as the only measured objective, got {','.join(self.objectives)}."
            )
        if "accuracy" in self.objectives and not self.items:
            raise ConfigError("The objective accuracy needs --items FILE with multiple-choice items.")
        if not isinstance(self.items, str) and len(self.items) < 2:  # one file is stored as it always was
            object.__setattr__(self, "items", "".join(self.items))
        self._check_advisor()
        if not self.name:
            object.__setattr__(
                self, "name", re.sub(r"[^\w.-]+", "-", self.model).strip("-.")[-60:].strip("-.") or "run"
            )
        if len(self.name.encode()) > MAX_NAME_BYTES:
            raise ConfigError(f"--name must not be longer than {MAX_NAME_BYTES} bytes, got '{self.name}'.")
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.strip(".") == "":
            raise ConfigError(f"--name may hold letters, digits, '.', '_' and '-' only, got '{self.name}'.")

    def _check_advisor(self) -> None:
        parse_spec(self.advisor)
        check_hooks(self.advisor_hooks)
        if self.advisor != "none" and self.strategy != "qnehvi":
            raise ConfigError(f"--advisor advises the strategy qnehvi only, got '{self.strategy}'.")
        if self.advisor_context not in CONTEXT_LEVELS:
            raise ConfigError(unknown("--advisor-context", self.advisor_context, CONTEXT_LEVELS))
        if self.advisor_price is not None and len(self.advisor_price) != 2:
            raise ConfigError(
                f"--advisor-price needs dollars per million prompt and reply tokens, e.g. 0.4,1.6, got {self.advisor_price}."
            )
        if self.advisor_max_cost is not None and self.advisor_price is None:
            raise ConfigError(f"--advisor-max-cost {self.advisor_max_cost} needs --advisor-price.")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any], **changes: Any) -> "RunConfig":
        """The config behind a report's `settings`, with `changes`.

        Raises:
            ConfigError: Another version of llmbo wrote them.
        """
        from pydantic import TypeAdapter, ValidationError

        settings = {**restated(settings), **changes}
        check_values(cls, settings)
        try:
            return TypeAdapter(cls).validate_python(settings)
        except ValidationError as error:
            raise ConfigError(f"The settings do not fit this version of llmbo ({first_fault(error)}).") from error

    @property
    def item_files(self) -> tuple[str, ...]:
        """Paths of the files of items."""
        return ((self.items,) if self.items else ()) if isinstance(self.items, str) else self.items

    @property
    def limits(self) -> dict[str, float]:
        """Largest allowed values by name."""
        return parse_limits(self.maximum)

    @property
    def counted_type(self) -> str:
        """File type that `file_bytes` is counted of, in a GGUF file; empty where nobody wants to know."""
        if self.quantize != "auto":
            return self.quantize
        return FILE_TYPE if "file_bytes" in (*self.objectives, *self.limits) else ""

    @property
    def counted_format(self) -> str:
        """What `file_bytes` is counted of: what the first engine takes; GGUF where none is named, or a file type of llama.cpp is."""
        return "gguf" if self.quantize != "auto" or not self.deploy else engines_of(self.deploy)[0].format

    @property
    def memory_bytes(self) -> int | None:
        """What `memory` allows; None without a limit."""
        return bytes_of("--memory", self.memory) if self.memory else None

    @property
    def windows(self) -> dict[str, int]:
        """Windows in each split."""
        return {
            "calibration": self.calibration_tokens // self.window,
            "proxy": self.proxy_tokens // self.window,
            "heldout": self.heldout_tokens // self.window,
        }

    def handed_on(self) -> dict[str, Any]:
        """What may change when a run is continued, and is no matter of one machine or database."""
        own = ("name", "storage", "artifacts", "memory", "offload", "budget")
        return {key: getattr(self, key) for key in FREE if key not in own}

    def settings(self) -> dict[str, Any]:
        """What must not change when a run is continued. The budget, the advisor's caps and what fits the machine may."""
        return {key: value for key, value in asdict(self).items() if key not in FREE}


def exported_as(settings: Mapping[str, Any]) -> tuple[str, str]:
    """What models of a run are exported as where nothing else is said: a name in `FORMATS`, and how weights are stored.

    It is what the run counted `file_bytes` of, if it did, else what its first engine takes. The latter is empty for the format's default.

    Args:
        settings: Of a report, whatever version wrote them.
    """
    known = restated(settings)
    if known["quantize"] != "auto":
        return "gguf", str(known["quantize"])
    formats = [ENGINES[name].format for name in known["deploy"] if name in ENGINES]
    return (formats or ["gguf" if _counts_files(known) else "hf"])[0], ""


def _counts_files(settings: Mapping[str, Any]) -> bool:
    return "file_bytes" in f"{settings.get('objectives')} {settings.get('maximum')}"


def restated(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings in the words of this version, with what a run did that was started before there was a setting.

    `advisor_share` used to be the advisor's part of the initial design, which had twelve trials; nothing bounded what came later. No
    `quantize` used to mean a GGUF file in f16, whatever the engine.
    """
    settings, share = {**EARLIER, **settings}, settings.get("advisor_share")
    if "advisor_warm_start" not in settings and isinstance(share, int | float) and 0 <= share <= 0.5:
        settings |= {"advisor_warm_start": round(12 * share), "advisor_share": 1.0}
    if settings["quantize"] == "":
        settings["quantize"] = FILE_TYPE if _counts_files(settings) else "auto"
    return settings
