"""What the studies of training share: their options, their result file, and the texts that they judge by."""

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmbo.cli.common import EXIT_BAD_INPUT
from llmbo.config import RunConfig
from llmbo.errors import LlmboError, StorageError, first_line
from llmbo.files import replace_file
from llmbo.models.loading import LoadedModel
from llmbo.models.placement import DTYPES
from llmbo.problem.texts import searched
from llmbo.training.plan import RANK
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows, fresh_windows
from pruning.errors import PruningError, UnreadableText
from pruning.export.rebuild import cast
from pruning.likelihood import DenseDistribution, dense_distribution, quality
from pruning.text import read_mix, read_text

Cut = tuple[PreTrainedModel, Architecture]


def keep(file: Path, made: Any) -> None:
    """Leave what is expensive to a command that goes on later, whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(made, file.with_suffix(".partial"))
    file.with_suffix(".partial").replace(file)


def work_of(out: Path, settings: Mapping[str, Any]) -> Path:
    """Folder for what a stopped command with these settings goes on from; its parent is deleted at the end."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return out.with_name(f"{out.name}.work") / digest[:16]


def kept(file: Path) -> Any:
    """What `keep` has left."""
    return torch.load(file, weights_only=False)  # written by the same command


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a study: what its user can mend is one line on stderr, with the exit code of `llmbo`."""
    try:
        yield
    except (LlmboError, PruningError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None


class Results:
    """Entries by key in a JSON file beside the settings that they hold for. Written anew behind every entry.

    Raises:
        StorageError: The file cannot be read, or holds results of other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file, self._settings = file, json.loads(json.dumps(settings))
        self.entries: dict[str, Any] = {}
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                stored, entries = found["settings"], dict(found["entries"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise StorageError(
                    f"'{file}' holds no results ({first_line(error)}): move it away, then run again."
                ) from error
            if stored != self._settings:
                raise StorageError(f"'{file}' holds results of other settings: move it away, then run again.")
            self.entries = entries

    def add(self, key: str, entry: Mapping[str, Any]) -> None:
        self.entries[key] = entry
        content = {"settings": self._settings, "entries": self.entries}
        replace_file(self._file, json.dumps(content, indent=1) + "\n")


class Judges:
    """Windows of some texts that neither cutting nor training has seen, and what the dense model predicts there.

    Args:
        config, windows: What models are cut by.
    """

    def __init__(
        self,
        texts: Sequence[str],
        loaded: LoadedModel,
        tokens: int,
        config: RunConfig,
        windows: TokenWindows,
        window: int,
    ) -> None:
        data = {"sha256": windows.sha256, "sources": [asdict(source) for source in windows.sources]}
        self._texts: dict[str, tuple[Tensor, DenseDistribution]] = {}
        for text in texts:
            seen = searched(config, data)
            fresh = fresh_windows(read_text(text), loaded.tokenizer, tokens // window, window, 0, seen).heldout
            self._texts[text] = fresh, dense_distribution(loaded.model, fresh)

    def of(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """`loss` and `kl` by text, in nats per token."""
        return {name: asdict(quality(model, *judged)) for name, judged in self._texts.items()}


def teacher_of(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """The dense model in the dtype of the products, a key of `DTYPES`: in float32 itself, otherwise a copy."""
    if dtype == "float32":
        return model
    teacher = copy.deepcopy(model)
    cast(teacher, DTYPES[dtype])
    return teacher


def parser_of(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options that all studies have, with a study's own defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--shares", nargs="+", default=["0.8", "0.65"], help="of the blocks' parameters")
    parser.add_argument("--text", default="python", help="to train on; should hold no judged domain")
    parser.add_argument(
        "--judge", action="append", default=[], help="text to measure on, e.g. text:FILE; several are given one by one"
    )
    parser.add_argument("--tokens", type=int, help="of each training")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rank", type=int, default=RANK, help="of adapters")
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--calibration", type=int, default=16384, help="tokens to cut by")
    parser.add_argument("--judged", type=int, default=16384, help="tokens of each judged text")
    parser.add_argument("--validation", type=int, default=12, help="windows")
    parser.add_argument("--dtype", default="auto", help="of the products while training")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(**defaults)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What was typed; a judged text that is trained on is refused, whatever either is called."""
    options = parser.parse_args()
    options.judge = options.judge or ["builtin"]
    try:
        learned = () if options.text == "self" else [text.sha256 for text, _ in read_mix(options.text).parts]
        twice = [text for text in options.judge if read_text(text).sha256 in learned]
    except UnreadableText as error:
        parser.error(first_line(error))
    if twice:
        parser.error(f"--judge {twice[0]} is what --text {options.text} trains on: judge by another text.")
    return options


def settings_of(options: argparse.Namespace, *left_out: str) -> dict[str, Any]:
    """The options that results hold for."""
    return {name: value for name, value in vars(options).items() if name not in ("out", "device", *left_out)}
