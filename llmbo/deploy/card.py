"""What goes along with an exported model: `README.md` for people (a Hugging Face model card), `llmbo.json` for programs."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmbo.config.formats import caveat
from llmbo.deploy.request import ExportRequest
from llmbo.errors import printable
from llmbo.models.aliases import ALIASES
from llmbo.models.loading import LoadedModel
from llmbo.report.origin import ModelPart
from llmbo.report.schema import Refitted, Report, TrialPart
from llmbo.run.rebuild import Cut
from pruning.export.folder import SIZE
from pruning.masks import PruningMask


def details(request: ExportRequest, cut: Cut, command: str, recovery: Mapping[str, Any] | None = None) -> str:
    """`llmbo.json`.

    Args:
        recovery: How the model was trained after it was cut.
    """
    report, trial = request.report, request.trial
    content: dict[str, Any] = {
        "format": request.format.name,
        "dtype": request.dtype,
        "run": report.run.name,
        "trial": trial.number,
        "base_model": report.model.model_dump(),
        "architecture": trial.architecture.model_dump(),
        "architecture_digest": cut.mask.architecture.digest,
        "mask_digest": mask_digest(cut.mask),
        "refit": cut.refit,
        **cut.measured.model_dump(),
        "text": report.data.model_dump(),
        "elsewhere_text": report.elsewhere.model_dump() if report.elsewhere else None,
        "settings": report.run.settings,
        "versions": report.run.versions,
        "command": command,
        **({"recovery": recovery} if recovery else {}),
    }
    return json.dumps(content, indent=2) + "\n"


def mask_digest(mask: PruningMask) -> str:
    """Sixteen hexadecimal digits that name which units stay, not only how many."""
    heads = [] if mask.heads is None else [mask.heads.flatten()]
    bits = torch.cat([mask.groups.flatten(), mask.neurons.flatten(), *heads]).to(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()[:16]


def model_card(request: ExportRequest, cut: Cut, licence: str, load: str, command: str, recovery: str = "") -> str:
    """`README.md`, with the header that the Hugging Face hub reads.

    Args:
        load: How to load the result, as `Format.load` has it.
        recovery: A section on its training after it was cut; empty if there was none.
    """
    report, trial = request.report, request.trial
    values = cut.measured.objectives
    base = report.model
    header = ["---", f"base_model: {base.name}", f"license: {licence}", "library_name: transformers"]
    header += ["pipeline_tag: text-generation", "tags: [pruned, llmbo]", "---"]
    warning = caveat(request.format)
    text = "\n".join(
        [
            *header,
            "",
            f"# {base.name}, pruned to {values.params / 1e6:.1f}M parameters",
            "",
            f"{values.params:,} of {base.params:,} parameters; {values.params_share:.1%} of the decoder layers' parameters. "
            f"Cut from `{base.name}` ({base.model_type}, licence {licence}) by [llmbo](https://pypi.org/project/llmbo), "
            f"trial {trial.number} of the run `{report.run.name}`. Stored as {request.target.label}. {SIZE} on disk. "
            f"{'Trained briefly after pruning, see below' if recovery else 'Not trained after pruning'}.",
            "",
            "## Load",
            "",
            load.format(path=request.out, name=request.name, dtype=request.target.label),
            "",
            *([f"**{warning}**", ""] if warning else []),
            f"## Measured{' before training' * bool(recovery)}",
            "",
            _quality_table(report, cut.measured),
            "",
            _recipe(report, cut.refit),
            "",
            *([recovery] if recovery else []),
            "## Architecture",
            "",
            _architecture_table(base, trial),
            "",
            "## Made by",
            "",
            f"```\n{report.run.command}\n{command}\n```",
            "",
        ]
    )
    return printable(text)


def licence_of(loaded: LoadedModel) -> str:
    """The base model's licence, as its package or its own model card tells it; `unknown` if neither does."""
    if loaded.name in ALIASES:
        return ALIASES[loaded.name].licence.lower()
    card = Path(loaded.source) / "README.md"
    if card.is_file():
        header = card.read_text(encoding="utf-8", errors="replace").partition("---")[2].partition("---")[0]
        for line in header.splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "license" and value.strip():
                return value.strip()
    return "unknown"


_REPAIRED = {
    "sequential": "Output projections were refitted in sequence, for this model alone (`--refit sequential`).",
    "table": "Output projections were refitted at the dense model's inputs (`--refit table`).",
}


ADAPTED = "Before it was cut, an adapter for all sub-networks (`llmbo elastic`) was merged; the dense model is the one without it. "


def _quality_table(report: Report, measured: Refitted) -> str:
    another = report.elsewhere.source if report.elsewhere else ""
    rows = [
        ("this model, proxy", measured.objectives),
        ("dense model, proxy", report.dense.objectives),
        ("this model, held-out", measured.heldout),
        ("dense model, held-out", report.dense.heldout),
        (f"this model, {another}", measured.elsewhere),
        (f"dense model, {another}", report.dense.elsewhere),
    ]
    lines = ["| | kl | loss | perplexity |", "|---|---|---|---|"]
    lines += [f"| {name} | {v.kl:.3f} | {v.loss:.3f} | {v.perplexity:.1f} |" for name, v in rows if v is not None]
    return "\n".join(lines)


def _recipe(report: Report, refit: str) -> str:
    data = report.data
    how = f"{' with BOS' if data.bos else ''}{' in the chat template' if data.chat else ''}"
    return (
        f"Nats per token over windows of {data.window} tokens{how} of the text {data.source}, where no other is named. "
        "The search saw the proxy windows; nothing saw the held-out windows. `kl` is from the dense model's distribution. "
        f"{ADAPTED if report.run.settings.get('elastic') else ''}"
        f"{_REPAIRED[refit] if refit == 'sequential' or report.run.settings.get('compensation', True) else ''}"
    )


def _architecture_table(base: ModelPart, trial: TrialPart) -> str:
    widths = trial.architecture
    shown = f"KV groups of {base.num_key_value_heads}, {base.intermediate_size} neurons"
    lines = [
        f"Per layer of the base model; the dense layer has {shown}.",
        "",
        "| layer | KV groups | heads | neurons |",
    ]
    lines.append("|---|---|---|---|")
    queries = base.num_attention_heads // base.num_key_value_heads
    fewer = widths.fewer_queries or [0] * len(widths.neurons)
    for layer, (groups, neurons, gone) in enumerate(zip(widths.kv_groups, widths.neurons, fewer, strict=True)):
        kept = f"{groups} | {groups * (queries - gone)} | {neurons}" if groups or neurons else "dropped | | "
        lines.append(f"| {layer} | {kept} |")
    return "\n".join(lines)
