"""Several models, dense and pruned, measured alike and shown side by side."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from llmbo.config.numbers import MOST, MOST_TOKENS, Within, check_numbers
from llmbo.errors import ConfigError, ModelError, StorageError
from llmbo.evaluation.items import Exam, items_part, read_item_files
from llmbo.evaluation.perplexity import Perplexity, check_window, measure
from llmbo.evaluation.tasks import Tasks
from llmbo.models.checks import check_finite
from llmbo.models.loading import Checkpoint, Found, find_checkpoint, load_checkpoint, load_tokenizer
from llmbo.models.placement import check_dtype, choose_device, choose_dtype
from llmbo.report import environment
from llmbo.types import Phases
from pruning.items import ItemFile
from pruning.text import Text, read_text


@dataclass(frozen=True)
class Settings:
    """What is measured. An empty `text` leaves perplexity out; `num_fewshot` and `apply_chat_template` are as in `Tasks`; `items` are
    paths, of which `limit` holds as well.

    Raises:
        ConfigError: A value that is out of range.
    """

    text: str
    tokens: Annotated[int, Within(0, MOST_TOKENS)]
    window: Annotated[int, Within(2, MOST)]
    stride: Annotated[int, Within(1, MOST)]
    tasks: tuple[str, ...]
    limit: Annotated[int | None, Within(0, MOST)]
    dtype: str
    device: str
    trust_remote_code: bool
    num_fewshot: Annotated[int | None, Within(0, MOST)] = None
    apply_chat_template: bool = False
    items: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self)
        if not self.tasks and (self.num_fewshot is not None or self.apply_chat_template):
            flag = "--apply-chat-template" if self.num_fewshot is None else f"--num-fewshot {self.num_fewshot}"
            raise ConfigError(f"{flag} is of no use without --tasks, whose prompts it shapes: name some.")
        check_dtype(self.dtype)


@dataclass(frozen=True)
class Result:
    """Measurements of one model. `prompts` tells how the tasks were put, None without tasks; `items` has scores by file name."""

    name: str
    source: str
    parameters: int
    dtype: str
    device: str
    quality: Perplexity | None
    tasks: dict[str, dict[str, float]]
    notes: tuple[str, ...]
    prompts: dict[str, Any] | None = None
    items: Sequence[tuple[ItemFile, dict[str, float]]] = ()

    def to_dict(self) -> dict[str, Any]:
        """As a line of the JSON file."""
        quality = self.quality and {"loss": self.quality.loss, "perplexity": self.quality.perplexity}
        return {
            "model": self.name,
            "source": self.source,
            "params": self.parameters,
            "dtype": self.dtype,
            "device": self.device,
            **(quality or {}),
            "recipe": asdict(self.quality.recipe) if self.quality else None,
            "tasks": self.tasks,
            "prompts": self.prompts,
            "items": {
                file.name: {**items_part(file).model_dump(exclude={"name"}), **scores} for file, scores in self.items
            },
            "versions": environment()["versions"],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }


def compare(names: Sequence[str], settings: Settings, phases: Phases, file: Path | None = None) -> Iterator[Result]:
    """Measure the models one after the other; each is in `file` before the next is loaded.

    Whatever can be refused is refused before the first weights are read.

    Raises:
        LlmboError, PruningError: One line for the user.
    """
    found = [find_checkpoint(name, settings.trust_remote_code) for name in names]
    for each in found:
        if settings.text:
            check_window(each.config, settings.window, settings.stride)
        if settings.apply_chat_template:
            _check_chat_template(each)
    text = read_text(settings.text) if settings.text else None
    items = read_item_files(settings.items, settings.limit)
    if file is not None:
        _append(file, "")
    tasks = None
    if settings.tasks:
        tasks = Tasks.load(settings.tasks, settings.limit, settings.num_fewshot, settings.apply_chat_template)
    if settings.dtype == "auto":  # one for all, or they could not be compared
        dtype = choose_dtype("auto", choose_device(settings.device), found[0].config.get_text_config())
        settings = replace(settings, dtype=dtype)
        phases.note(f"everything is measured in {dtype}, the faster one here")
    for name in names:
        result = _measure(name, settings, text, items, tasks, phases)
        if file is not None:
            _append(file, json.dumps(result.to_dict()) + "\n")
        yield result


def _measure(
    name: str, settings: Settings, text: Text | None, items: Sequence[ItemFile], tasks: Tasks | None, phases: Phases
) -> Result:
    with phases.phase(f"{name}: loading"):
        checkpoint = load_checkpoint(name, settings.dtype, settings.device, settings.trust_remote_code)
    quality, scores = None, {}
    if text:
        with phases.phase(f"{name}: perplexity", settings.tokens or None) as advance:
            quality = measure(
                checkpoint.model,
                checkpoint.tokenizer,
                text,
                settings.window,
                settings.stride,
                settings.tokens,
                advance,
            )
            check_finite(name, checkpoint.dtype, quality.loss)
    taken = []
    for each in items:
        with phases.phase(f"{name}: {each.name}"):
            exam = Exam.of(each, checkpoint.model, checkpoint.tokenizer)
            taken.append((each, exam.taken_by(checkpoint.model, own_logits=True)))
    if tasks:
        with phases.phase(f"{name}: {', '.join(settings.tasks)}"):
            scores = tasks.evaluate(checkpoint)
    return Result(
        name,
        checkpoint.source,
        checkpoint.parameters,
        checkpoint.dtype,
        checkpoint.device,
        quality,
        scores,
        (*_notes(checkpoint, text), *(tasks.notes if tasks else ())),
        {name: getattr(settings, name) for name in ("num_fewshot", "apply_chat_template")} if tasks else None,
        taken,
    )


def _check_chat_template(found: Found) -> None:
    if not load_tokenizer(found).chat_template:
        raise ModelError(
            f"--apply-chat-template: the tokenizer of '{found.name}' has no chat template. Leave the option out."
        )


def _notes(checkpoint: Checkpoint, text: Text | None) -> Iterator[str]:
    """What makes a number less than it seems."""
    yield from checkpoint.notes
    details = Path(checkpoint.source) / "llmbo.json"
    if text and details.is_file():
        used = json.loads(details.read_text(encoding="utf-8")).get("text") or {}
        if text.sha256 in {part.get("sha256") for part in (used, *used.get("sources", ()))}:
            yield (
                f"'{checkpoint.name}' was pruned on windows of this very text ({text.source}), so this is no held-out loss: "
                "the run's report has that one, or give another --text."
            )


def table(results: Sequence[Result]) -> Table:
    """One row per model, one column per measurement."""
    scores = [[*r.tasks.items(), *((file.name, found) for file, found in r.items)] for r in results]
    columns = dict.fromkeys(
        (place, task, metric) for own in scores for place, (task, found) in enumerate(own) for metric in found
    )
    shown = [column for column in columns if "stderr" not in column[2]]
    made = Table("model", "params", "dtype")
    if any(result.quality for result in results):
        made.add_column("loss", justify="right")
        made.add_column("perplexity", justify="right")
    for _, task, metric in shown:
        made.add_column(f"{task} {metric}", justify="right")
    for result, own in zip(results, scores, strict=True):
        row = [result.name, f"{result.parameters / 1e6:.1f}M", result.dtype]
        if result.quality:
            row += [f"{result.quality.loss:.4f}", f"{result.quality.perplexity:.2f}"]
        row += [_score(own[place][1], metric) for place, _, metric in shown]
        made.add_row(*row)
    return made


def _score(found: dict[str, float], metric: str) -> str:
    name, _, filtered = metric.partition(",")
    error = found.get(f"{name}_stderr{',' if filtered else ''}{filtered}")
    return f"{found[metric]:.4f}" + (f" ± {error:.4f}" if error else "") if metric in found else ""


def _append(file: Path, line: str) -> None:
    try:
        with file.open("a", encoding="utf-8") as out:
            out.write(line)
    except OSError as error:
        raise StorageError(
            f"Cannot write --json '{file}' ({error.strerror}): give a file in a writable folder."
        ) from error
