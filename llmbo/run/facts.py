"""What a run keeps of its model and text: enough to notice another one behind the same name, and to say so in the report."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmbo.config import RunConfig
from llmbo.models.loading import LoadedModel
from llmbo.report import DataPart, ElsewherePart, ImportancePart, ModelPart, SourcePart, SplitPart
from pruning.anatomy import Anatomy, anatomy_of
from pruning.architecture import Architecture
from pruning.calibration import TokenWindows
from pruning.cost import cost_of


def facts_of(loaded: LoadedModel, windows: TokenWindows) -> dict[str, Any]:
    """What a run keeps of its model and text, so that others are noticed."""
    return {
        "dtype": loaded.dtype,
        "device": loaded.device,
        "model": _model_part(loaded, anatomy_of(loaded.model)),
        "data": _data_part(windows),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two settings, one line each. Compared as JSON, as they are stored."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def changed_facts(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Another model or text behind the same name. Where the model lies does not matter."""
    return differences({**stored["model"], "source": None}, {**found["model"], "source": None}) + differences(
        DataPart.model_validate(stored["data"]).model_dump(),
        found["data"],  # an older version's has fewer keys
    )


def elsewhere_part(windows: TokenWindows) -> dict[str, Any]:
    """Where the windows of another domain come from; `digest` is of the tokens."""
    return ElsewherePart(
        source=windows.source,
        sha256=windows.sha256,
        available_tokens=windows.available_tokens,
        windows=len(windows.heldout),
        tokens=windows.heldout.numel(),
        digest=hashlib.sha256(windows.heldout.numpy().tobytes()).hexdigest(),
    ).model_dump()


def items_digest(config: RunConfig) -> str | None:
    """Of the files of items as they are now; None without any."""
    contents = [Path(file).expanduser().read_bytes() for file in config.item_files]
    return hashlib.sha256(b"".join(contents)).hexdigest() if contents else None


def _model_part(loaded: LoadedModel, anatomy: Anatomy) -> dict[str, Any]:
    cost = cost_of(anatomy, Architecture.full(anatomy))
    return ModelPart(
        name=loaded.name,
        source=loaded.source,
        model_type=anatomy.family.model_type,
        fingerprint=loaded.fingerprint,
        num_hidden_layers=anatomy.num_hidden_layers,
        hidden_size=anatomy.hidden_size,
        num_attention_heads=anatomy.num_attention_heads,
        num_key_value_heads=anatomy.num_key_value_heads,
        head_dim=anatomy.head_dim,
        intermediate_size=anatomy.intermediate_size,
        vocab_size=anatomy.vocab_size,
        params=cost.parameters,
        block_params=cost.block_parameters,
    ).model_dump()


def importance_parts(layers: Mapping[str, Mapping[str, torch.Tensor]]) -> list[dict[str, Any]]:
    """Scores per layer to four digits: they are looked at, not computed with."""
    return [
        ImportancePart.model_validate(
            {"method": method, "kind": kind, "scores": [float(f"{score:.4g}") for score in scores.tolist()]}
        ).model_dump()
        for method, kinds in layers.items()
        for kind, scores in kinds.items()
    ]


def _data_part(windows: TokenWindows) -> dict[str, Any]:
    def split(part: torch.Tensor) -> SplitPart:
        return SplitPart(windows=len(part), tokens=math.prod(part.shape))

    return DataPart(
        source=windows.source,
        sha256=windows.sha256,
        available_tokens=windows.available_tokens,
        window=windows.length,
        bos=windows.bos,
        chat=windows.chat,
        sources=[SourcePart(**asdict(source)) for source in windows.sources],
        calibration=split(windows.calibration),
        proxy=split(windows.proxy),
        heldout=split(windows.heldout),
    ).model_dump()
