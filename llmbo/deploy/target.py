"""What a trial is to be written as: format, how weights are stored, and how large that is, told before anything is cut."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pkgutil import resolve_name

import torch

from llmbo.config.formats import FORMATS, Format
from llmbo.config.numbers import bytes_of
from llmbo.config.run import exported_as
from llmbo.errors import ConfigError, ModelError, unknown
from llmbo.models.loading import LoadedModel, find_prunable, load_tokenizer
from llmbo.models.placement import DTYPES
from llmbo.models.stored import model_of_config
from llmbo.problem.file_size import size_as
from llmbo.report.schema import Report
from pruning.anatomy import Sizes, anatomy_of
from pruning.architecture import Architecture
from pruning.export.quantise import RECIPE, SEARCHED, Mixture
from pruning.export.rebuild import is_uniform

Base = str | LoadedModel | None  # the base model, or where it is now; None for where the run had it


@dataclass(frozen=True)
class Target:
    """A format and how it stores weights. Make one by `of`, which checks it.

    Args:
        dtype: A key of `format.dtypes`, or what `--quantize` said.
        max_shard_size: Of the largest safetensors file in bytes, for formats that have some.
        note: What was not asked for but follows from the run, for the user; empty if nothing does.
    """

    format: Format
    dtype: str
    max_shard_size: int
    note: str = ""

    @classmethod
    def of(
        cls, report: Report, format: str = "", dtype: str = "", quantize: str = "", max_shard_size: str = "5GB"
    ) -> "Target":
        """Check what was asked for; what was not is as the run counted `file_bytes`, or as its first engine takes it.

        Args:
            format: A name in `FORMATS`.
            dtype: One of the format's choices.
            quantize: In place of `dtype`: one of `Format.quantised`, `recipe:FILE`, or `searched:SIZE`.
            max_shard_size: In bytes, or in KB, MB, GB or TB (powers of ten).

        Raises:
            ConfigError, UnsupportedExport: One line for the user.
        """
        shard_size = bytes_of("--max-shard-size", max_shard_size)
        usual, counted = exported_as(report.run.settings)
        row = FORMATS.get(format or usual)
        if row is None:
            raise ConfigError(f"Unknown --format '{format}': expected one of {', '.join(FORMATS)}.")
        if quantize.startswith(SEARCHED):
            quantize = f"{SEARCHED}{bytes_of('--quantize searched:', quantize.removeprefix(SEARCHED))}"
        if quantize:
            _check_quantize(row, quantize, dtype)
        follows = counted if row.name == usual and not (quantize or dtype) else ""
        kind = quantize or dtype or follows or row.default
        if quantize or follows:
            Mixture.of(kind).check_library(report.model.hidden_size)
        elif kind not in row.choices:
            raise ConfigError(f"--format {row.name} has no --dtype '{kind}': expected one of {', '.join(row.choices)}.")
        note, written = "", f"--format {row.name}{row.flag(kind)}"
        if follows and row.flag(follows):
            note = f"{written}, of which the run counted file_bytes."
        elif not format:
            note = f"{written}, since no --format is named."
        return cls(row, report.run.dtype if kind == "auto" else kind, shard_size, note)

    @property
    def label(self) -> str:
        """What the weights are stored as, in a word."""
        known = self.dtype in (*self.format.choices, *self.format.quantised)
        return self.dtype if known else Mixture.of(self.dtype).name

    def check(self, report: Report, architecture: Architecture) -> None:
        """Refuse what no model is needed to refuse.

        Raises:
            UnsupportedExport: The format cannot hold the sub-network.
        """
        if self.format.check_type:
            resolve_name(self.format.check_type)(report.model.model_type, architecture)
        if self.format.check_attention:
            resolve_name(self.format.check_attention)(report.model.num_key_value_heads, architecture)

    def sizes(self, report: Report, architectures: Sequence[Architecture], base: Base = None) -> list[int]:
        """Bytes of the weights' files of sub-networks that the format holds, to the byte. No weights are read.

        Raises:
            ConfigError: Types that are searched for a size have none before.
            ModelError: The base model's config or tokenizer is not there, or another model's.
            UnsupportedExport: The format cannot hold the base model, or a recipe fits none of them.
        """
        if self.dtype.startswith(SEARCHED):
            raise ConfigError(
                f"--fit file_bytes and --quantize {SEARCHED}SIZE both say how large the file may be: leave one out."
            )
        if isinstance(base, LoadedModel):
            model, tokenizer = base.model, base.tokenizer
        else:
            found = find_prunable(base or report.run.settings["model"])
            model, tokenizer = model_of_config(found, DTYPES[report.run.dtype]), load_tokenizer(found)
        anatomy = anatomy_of(model)
        for name in (part.name for part in fields(Sizes)):
            had, has = getattr(report.model, name), getattr(anatomy, name)
            if had != has:
                raise ModelError(
                    f"The run '{report.run.name}' had another model ({name} {had}, now {has}): "
                    "bring it back (--model says where the base model is)."
                )
        uniform = all(map(is_uniform, architectures))
        count = size_as(self.format, self.dtype, model, tokenizer, report.model.name, uniform, self.max_shard_size)
        widths = (torch.tensor([each.units(kind) for each in architectures]) for kind in ("attention", "mlp"))
        sizes: list[int] = count(*widths).tolist()
        return sizes


def _check_quantize(format: Format, quantize: str, dtype: str) -> None:
    """Refuse what cannot be.

    Raises:
        ConfigError: One line for the user.
    """
    if not format.quantised:
        known = ", ".join(row.name for row in FORMATS.values() if row.quantised)
        raise ConfigError(f"--format {format.name} cannot be quantised (--quantize {quantize}): take --format {known}.")
    if dtype:
        raise ConfigError(f"--dtype {dtype} and --quantize {quantize} both say how weights are stored: leave one out.")
    if quantize not in format.quantised and not quantize.startswith((RECIPE, SEARCHED)):
        raise ConfigError(unknown("--quantize", quantize, [*format.quantised, f"{RECIPE}FILE", f"{SEARCHED}SIZE"]))
